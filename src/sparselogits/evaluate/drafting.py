"""Realised acceptance: a student that drafts from held-out prefixes for its teacher.

A prefix of l tokens costs one forward of the student over its l to l + n - 1 tokens for each of n
drafted tokens and one forward of the teacher over l + n; no keys and values are kept, and an engine
applies its head to the whole prefix. That is for measuring, not for serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.data import TextDataset
from sparselogits.documents import restarting_positions
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.acceptance import Round, draft_and_verify
from sparselogits.evaluate.passes import StudentLogits, document_starts, require_ids
from sparselogits.teacher import Engine


@dataclass(frozen=True)
class Drafting:
    """What came of a student's drafts.

    Args:
        drafts: rounds of drafting and verifying.
        verified: drafted tokens up to and including each draft's first rejection.
        accepted: those of them that were accepted.
        expected: mean of sum_i min(p_i, s_i) over the verified positions.
        error: standard deviation of `acceptance` about `expected`, were both models right about
            themselves: the square root of sum a (1 - a) over `verified`. Given its prefix a token
            is accepted with probability a, so the differences add up as independent ones do.
    """

    drafts: int
    verified: int
    accepted: int
    expected: float
    error: float

    @property
    def acceptance(self) -> float:
        """Accepted of the verified tokens."""
        return self.accepted / self.verified

    @property
    def tokens_per_pass(self) -> float:
        """Tokens emitted for each forward of the teacher: accepted ones and the teacher's own."""
        return 1 + self.accepted / self.drafts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {"acceptance": self.acceptance, "tokens_per_pass": self.tokens_per_pass}
        return asdict(self) | own


@torch.no_grad()
def draft_from_prefixes(
    student: nn.Module,
    windows: TextDataset,
    teacher: Engine,
    *,
    draft: int = 4,
    prefixes: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Drafting:
    """Draft from prefixes of held-out windows and verify, both models at temperature one.

    Args:
        student: a transformers causal language model; put in eval mode and back.
        windows: held-out text; of each window so many prefixes are taken, evenly spread.
        teacher: verifies.
        draft: tokens drafted at a time.
        prefixes: of each window.
        seed: of all chance. The first windows give the same whatever the number of windows.
        progress: called with windows done and in all.

    Raises:
        InvalidArgumentError: for no windows, windows too short for a draft, no draft or prefix, or
            a student with fewer ids than the teacher.
    """
    length = windows.corpus.packing.window_length
    if not len(windows) or draft < 1 or prefixes < 1 or length <= draft:
        raise InvalidArgumentError(
            f"drafting needs held-out windows longer than the draft, a draft and a prefix; got "
            f"{len(windows)} windows of {length} tokens, {draft} drafted tokens and {prefixes} "
            "prefixes a window"
        )
    generator = torch.Generator().manual_seed(seed)
    logits = StudentLogits(student)
    training = student.training
    student.eval()
    rounds = []
    try:
        for index in range(len(windows)):
            item = windows[index]
            for i in range(prefixes):
                end = 1 + (2 * i + 1) * (length - draft) // (2 * prefixes)
                rounds.append(_draft_once(item, end, logits, teacher, draft, generator))
            if progress is not None:
                progress(index + 1, len(windows))
    finally:
        student.train(training)
    acceptances = torch.cat([own.acceptances for own in rounds])
    variance = float((acceptances * (1 - acceptances)).clamp(min=0).sum())
    return Drafting(
        drafts=len(rounds),
        verified=len(acceptances),
        accepted=sum(own.accepted for own in rounds),
        expected=float(acceptances.mean()),
        error=math.sqrt(variance) / len(acceptances),
    )


def _draft_once(
    item: Mapping[str, Any],
    end: int,
    student: StudentLogits,
    teacher: Engine,
    draft: int,
    generator: torch.Generator,
) -> Round:
    """One round after the window's first `end` tokens; drafted tokens go on with its document."""
    starts = document_starts(item)
    starts = None if starts is None else starts[starts < end]

    def next_logits(tokens: Tensor) -> Tensor:
        inputs = {"input_ids": tokens}
        if starts is not None:
            inputs["position_ids"] = restarting_positions(len(tokens), [starts])[0]
        logits = student.over(inputs)(slice(len(tokens) - 1, len(tokens)))[0]
        require_ids(len(logits), teacher.vocab_size)
        return logits

    def last_logits(tokens: Tensor, count: int) -> Tensor:
        # an id the teacher has not is rejected; what it would say after it is not looked at
        known = tokens.clamp(max=teacher.vocab_size - 1)
        first, found = len(tokens) - count, []
        for piece in teacher.logits(known[None], None if starts is None else [starts]):
            skipped = max(0, first - piece.positions.start)
            if skipped < len(piece.logits):
                found.append(piece.logits[skipped:].cpu())
        return torch.cat(found)

    return draft_and_verify(item["input_ids"][:end], next_logits, last_logits, draft, generator)
