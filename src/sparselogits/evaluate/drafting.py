"""Measure the acceptance of tokens that a student drafts from held-out prefixes for its teacher.

A draft of n tokens after a prefix of l tokens costs n forward passes of the student, over l to
l + n - 1 tokens, and one of the teacher, over l + n. No key-value cache is used, and an engine
applies its head to the whole prefix, so the module is for measuring, not for serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.data import DraftVocabulary, TextDataset
from sparselogits.documents import restarting_positions
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.acceptance import Round, draft_and_verify
from sparselogits.evaluate.passes import (
    StudentLogits,
    document_starts,
    require_ids,
    without_padding,
)
from sparselogits.language_model import in_eval_mode
from sparselogits.teacher import Engine


@dataclass(frozen=True)
class Drafting:
    """Result of drafting tokens from held-out prefixes and verifying them.

    Args:
        drafts: number of drafts, each verified once.
        verified: number of drafted tokens up to and including each draft's first rejection.
        accepted: number of verified tokens that were accepted.
        expected: mean of sum_i min(p_i, s_i) over the verified positions.
        error: standard deviation of `acceptance - expected`, which is the square root of the sum
            of a (1 - a) over the verified positions, divided by `verified`. Here a is the
            probability that a token is accepted, given its prefix.
    """

    drafts: int
    verified: int
    accepted: int
    expected: float
    error: float

    @property
    def acceptance(self) -> float:
        """Share of the verified tokens that were accepted."""
        return self.accepted / self.verified

    @property
    def tokens_per_pass(self) -> float:
        """Mean number of tokens per forward pass of the teacher, including one from the teacher."""
        return 1 + self.accepted / self.drafts

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the derived metrics as JSON values."""
        derived = {"acceptance": self.acceptance, "tokens_per_pass": self.tokens_per_pass}
        return asdict(self) | derived


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
    """Draft tokens from prefixes of held-out windows and verify them, both models at temperature 1.

    Args:
        student: transformers causal language model, set to eval mode during the call.
        windows: held-out text. With a draft vocabulary (`windows.draft`), the student drafts only
            the ids of that vocabulary.
        teacher: teacher that verifies the drafts.
        draft: number of tokens per draft, at least 1.
        prefixes: number of prefixes per window, at least 1, at evenly spaced positions.
        seed: random seed. The drafts in a window do not depend on the windows after it.
        progress: function that is called with the number of windows done and the total number.

    Raises:
        InvalidArgumentError: there are no windows, a window is not longer than a draft, `draft` or
            `prefixes` is less than 1, or the student is a masked language model, has fewer ids than
            the teacher, or not one output per class of the draft vocabulary.
    """
    length = windows.corpus.packing.window_length
    if not len(windows) or draft < 1 or prefixes < 1 or length <= draft:
        raise InvalidArgumentError(
            f"found {len(windows)} windows of {length} tokens, {draft} drafted tokens and "
            f"{prefixes} prefixes per window, expected at least one of each and windows longer "
            "than a draft; build the cache with a hold-out (--holdout 0.05), or draft fewer tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    logits = StudentLogits(student)
    rounds = []
    with in_eval_mode(student):
        for index in range(len(windows)):
            item = without_padding(windows[index])
            room = max(len(item["input_ids"]) - draft, 1)
            for i in range(prefixes):
                end = 1 + (2 * i + 1) * room // (2 * prefixes)
                rounds.append(
                    _draft_once(item, end, logits, teacher, draft, windows.draft, generator)
                )
            if progress is not None:
                progress(index + 1, len(windows))
    acceptances = torch.cat([each.acceptances for each in rounds])
    variance = float((acceptances * (1 - acceptances)).clamp(min=0).sum())
    return Drafting(
        drafts=len(rounds),
        verified=len(acceptances),
        accepted=sum(each.accepted for each in rounds),
        expected=float(acceptances.mean()),
        error=math.sqrt(variance) / len(acceptances),
    )


def _draft_once(
    item: Mapping[str, Any],
    end: int,
    student: StudentLogits,
    teacher: Engine,
    draft: int,
    vocabulary: DraftVocabulary | None,
    generator: torch.Generator,
) -> Round:
    """Draft tokens that continue the document at position `end` of a window, and verify them."""
    starts = document_starts(item)
    starts = None if starts is None else starts[starts < end]

    def next_logits(tokens: Tensor) -> Tensor:
        inputs = {"input_ids": tokens}
        if starts is not None:
            inputs["position_ids"] = restarting_positions(len(tokens), [starts])[0]
        logits = student.over(inputs)(slice(len(tokens) - 1, len(tokens)))
        if vocabulary is not None:
            vocabulary.require_head(logits.shape[1])
            logits = vocabulary.logits_of_ids(logits, teacher.vocab_size)
        require_ids(logits.shape[1], teacher.vocab_size)
        return logits[0]

    def last_logits(tokens: Tensor, count: int) -> Tensor:
        # a drafted id beyond the teacher's vocabulary is rejected, and logits after a rejection are
        # not used, so any id can replace it
        known = tokens.clamp(max=teacher.vocab_size - 1)
        first, found = len(tokens) - count, []
        for piece in teacher.logits(known[None], None if starts is None else [starts]):
            skipped = max(0, first - piece.positions.start)
            if skipped < len(piece.logits):
                found.append(piece.logits[skipped:].cpu())
        return torch.cat(found)

    return draft_and_verify(item["input_ids"][:end], next_logits, last_logits, draft, generator)
