"""A few windows ahead of the work: is this teacher sane on this text, and how many rounds?

A budget is a mean number of entries a position, which depends on the teacher's entropy on the
text; rounds are what a sampler takes. The translation is made once, by whoever starts the build,
and written into the identity; resuming reads it from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselogits.build.plan import spread
from sparselogits.corpus import PackedCorpus, Window
from sparselogits.errors import TeacherError
from sparselogits.samplers import Sampler, fit_budget
from sparselogits.teacher import Engine

PILOT_POSITIONS = 1024
"""About as many positions make the mean entries certain to two or three per cent."""

NATS_WORSE_THAN_UNIFORM = 1.0


def pilot_windows(corpus: PackedCorpus) -> list[Window]:
    """Windows spread evenly over the corpus."""
    count = max(1, PILOT_POSITIONS // corpus.packing.window_length)
    return [corpus.read(i, i + 1)[0] for i in spread(corpus.windows, count)]


def resolve_budget(
    engine: Engine, windows: Sequence[Window], sampler: Sampler, budget: float, **how: Any
) -> Sampler:
    """The same sampler with the rounds (k, tau) whose mean entries come closest to a budget.

    Args:
        engine: the teacher.
        windows: pilot windows.
        sampler: one that a single parameter governs.
        budget: mean entries a position.
        how: temperature and reset_attention of the build.
    """
    return fit_budget(sampler, _pilot_logits(engine, windows, **how), budget)


def check_teacher_on_text(engine: Engine, windows: Sequence[Window], **how: Any) -> float:
    """The teacher's mean loss on pilot windows, nats.

    Raises:
        TeacherError: when it is worse than guessing, as with another model's tokenizer.
    """
    window = windows[0]
    tokens = torch.from_numpy(window.tokens.astype(np.int64))
    total, count, first = 0.0, 0, 0
    for logits in _pilot_logits(engine, [window], temperature=1.0, **how):
        labels = tokens[first + 1 : first + 1 + len(logits)].to(logits.device)
        rows = logits[: len(labels)]
        total += float((rows.logsumexp(1) - rows.gather(1, labels[:, None])[:, 0]).double().sum())
        count, first = count + len(labels), first + len(logits)
    loss = total / max(1, count)
    uniform = math.log(float(engine.token_mask.sum()))
    if not loss <= uniform + NATS_WORSE_THAN_UNIFORM:
        raise TeacherError(
            f"the teacher's loss on this text is {loss:.2f} nats, worse than guessing among its "
            f"{int(engine.token_mask.sum())} tokens ({uniform:.2f}); the tokenizer is most likely "
            "not the teacher's own, or the weights are damaged"
        )
    return loss


def _pilot_logits(
    engine: Engine, windows: Sequence[Window], *, temperature: float, reset_attention: bool
) -> Iterator[Tensor]:
    for window in windows:
        tokens = torch.from_numpy(window.tokens.astype(np.int64))[None]
        starts = [window.document_starts] if reset_attention else None
        for piece in engine.logits(tokens, starts):
            yield piece.logits / temperature
