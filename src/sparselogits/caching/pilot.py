"""Run a few windows before a build: to check the teacher on the text, and to resolve a budget.

A budget is a mean number of entries per position, which depends on the teacher's entropy on the
text; a sampler takes rounds (k, tau). The translation is made once, by the process that begins the
build, and written into the identity; resuming reads it from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparselogits.allowances import refuse
from sparselogits.corpus import PackedCorpus, Window
from sparselogits.errors import TeacherError
from sparselogits.objectives import IGNORE_INDEX, Causal
from sparselogits.samplers import Pilot, PilotSlice, Sampler
from sparselogits.store.ranges import spread
from sparselogits.teacher import Engine

PILOT_POSITIONS = 1024
"""Number of pilot positions; they give the mean number of entries to two or three per cent."""

NATS_WORSE_THAN_UNIFORM = 1.0


def pilot_windows(corpus: PackedCorpus) -> list[Window]:
    """Return pilot windows, evenly spaced over the corpus."""
    count = max(1, PILOT_POSITIONS // corpus.packing.window_length)
    return [corpus.read(i, i + 1)[0] for i in spread(corpus.windows, count)]


def resolve_budget(
    engine: Engine, windows: Sequence[Window], sampler: Sampler, budget: float | None, **how: Any
) -> Sampler:
    """Return the sampler with the fields set that pilot windows settle: rounds (k, tau).

    Args:
        engine: the teacher.
        windows: pilot windows.
        sampler: the sampler.
        budget: mean entries per position; None where there is none to meet.
        how: temperature and reset_attention of the build.

    Raises:
        InvalidArgumentError: a budget out of reach, or for a sampler that takes none.
    """
    if not sampler.left_open(budget):
        return sampler
    return sampler.fitted(Pilot([partial(_slices, engine, w, **how) for w in windows]), budget)


def check_teacher_on_text(engine: Engine, windows: Sequence[Window], **how: Any) -> float:
    """Return the teacher's mean loss on a pilot window, in nats.

    Raises:
        TeacherError: the loss is worse than guessing, as with another model's tokenizer, or logits
            overflow.
        InvalidArgumentError: the window is longer than the teacher's positions.
    """
    window = windows[0]
    check_window = getattr(engine, "check_window", None)
    if check_window is not None:
        check_window(len(window.tokens), restarts=how.get("reset_attention", False))
    wanted = torch.from_numpy(Causal().labels(window.tokens))
    total, count, first = 0.0, 0, 0
    for piece in _slices(engine, window, temperature=1.0, **how):
        logits = piece.logits
        _require_finite(engine, logits, first, len(wanted))
        labels = wanted[piece.positions].to(logits.device)
        labelled = labels != IGNORE_INDEX
        rows, labels = logits[labelled], labels[labelled]
        total += float((rows.logsumexp(1) - rows.gather(1, labels[:, None])[:, 0]).double().sum())
        count, first = count + len(labels), first + len(logits)
    loss = total / max(1, count)
    uniform = math.log(float(engine.token_mask.sum()))
    if not loss <= uniform + NATS_WORSE_THAN_UNIFORM:
        half = "" if _dtype(engine) != "float16" else ", or float16 is too narrow for it"
        error = TeacherError(
            f"the teacher's loss on this text is {loss:.2f} nats, worse than guessing among its "
            f"{int(engine.token_mask.sum())} tokens ({uniform:.2f}); the tokenizer is most likely "
            f"not the teacher's own, or the weights are damaged{half}. Check the tokenizer files "
            "of the teacher"
        )
        refuse(error, "worse-than-guessing")
    return loss


def _require_finite(engine: Engine, logits: Tensor, first: int, length: int) -> None:
    """Raise an error that names damaged weights or overflow if a token's logit is not finite."""
    tokens = engine.token_mask.to(logits.device)
    broken = ~logits[:, tokens].isfinite().all(1)
    if not bool(broken.any()):
        return
    place = first + int(broken.nonzero()[0, 0])
    found = (
        f"the teacher's logits are NaN or infinite from position {place} of a window of {length} "
        "tokens on"
    )
    if _dtype(engine) == "float16":
        raise TeacherError(
            f"{found}: its activations overflow in float16, whose largest number is 65 504. Run it "
            "with --dtype bfloat16 or float32"
        )
    raise TeacherError(
        f"{found}, in {_dtype(engine)}: weights are damaged or activations overflow. "
        "Run it with --dtype float32, and download the weights again if that does not help"
    )


def _dtype(engine: Engine) -> str:
    return str(engine.identity.get("dtype", ""))


def _slices(
    engine: Engine, window: Window, *, temperature: float, reset_attention: bool
) -> Iterator[PilotSlice]:
    tokens = torch.from_numpy(window.tokens.astype(np.int64))
    starts = [window.document_starts] if reset_attention else None
    for piece in engine.logits(tokens[None], starts):
        yield PilotSlice(window.index, tokens, piece.positions, piece.logits / temperature)
