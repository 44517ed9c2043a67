"""Run pilot windows before a build, to validate the teacher on the text and to fit a budget.

The process that starts the build fits the sampler's parameters once and stores them in the
identity, from which a resumed build reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparselogits.allowances import refuse
from sparselogits.caching.teacher_input import TeacherInput
from sparselogits.corpus import PackedCorpus, Window
from sparselogits.corruption import Corruption
from sparselogits.errors import TeacherError
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.samplers import Pilot, PilotSlice, Sampler
from sparselogits.store.ranges import spread
from sparselogits.teacher.engine import Engine, logits_at

PILOT_POSITIONS = 1024
"""Approximate number of tokens of text in the pilot windows; a single window may have more.

The mean entries estimated from as many positions are accurate to 2 or 3 %.
"""

CHECKED_POSITIONS = 32
"""Number of labelled positions that suffice to measure the teacher's loss."""

NATS_WORSE_THAN_UNIFORM = 1.0
"""Excess over the loss of a uniform distribution, in nats, above which a teacher is rejected."""


def pilot_windows(corpus: PackedCorpus) -> list[Window]:
    """Read pilot windows, evenly spaced over the corpus.

    If windows are padded, more windows are read, so that their text has about as many tokens as
    windows without padding would have.
    """
    length = corpus.packing.window_length
    count = max(1, PILOT_POSITIONS // length)
    windows = _spread_windows(corpus, count)
    text = sum(window.text_length or length for window in windows)
    if text < len(windows) * length:
        windows = _spread_windows(corpus, math.ceil(count * len(windows) * length / text))
    return windows


def _spread_windows(corpus: PackedCorpus, count: int) -> list[Window]:
    """Read at most `count` windows that are evenly spaced over the corpus."""
    return [corpus.read(i, i + 1)[0] for i in spread(corpus.windows, count)]


def resolve_budget(
    engine: Engine, windows: Sequence[Window], sampler: Sampler, budget: float | None, **how: Any
) -> Sampler:
    """Return the sampler with the fields of `Sampler.left_open` fitted on pilot windows.

    `how` contains the build's `temperature`, `reset_attention` and `corruption`.
    """
    if not sampler.left_open(budget):
        return sampler
    return sampler.fitted(Pilot([partial(_slices, engine, w, **how) for w in windows]), budget)


def check_teacher_on_text(engine: Engine, windows: Sequence[Window], **how: Any) -> float:
    """Validate the teacher on the first pilot windows, and return its mean loss in nats per label.

    Windows are run until `CHECKED_POSITIONS` of their positions have a label; the loss is 0 if none
    has. `how` contains the build's `reset_attention` and `corruption`.

    Raises:
        TeacherError: logits are not finite, or the loss exceeds that of uniform guessing by more
            than `NATS_WORSE_THAN_UNIFORM`, for example because the tokenizer belongs to another
            model.
        InvalidArgumentError: the windows are longer than the teacher supports, or a masked teacher
            ignores the attention mask of padded windows.
    """
    check_window = getattr(engine, "check_window", None)
    if check_window is not None:
        check_window(len(windows[0].tokens), restarts=how.get("reset_attention", False))
    check_padding = getattr(engine, "check_padding", None)
    padded = windows[0].text_length is not None and how.get("corruption") is not None
    if check_padding is not None and padded:
        check_padding()
    total, count = 0.0, 0
    for window in windows:
        if count >= CHECKED_POSITIONS:
            break
        length = len(window.tokens)
        wanted = TeacherInput.of(window, how.get("corruption")).labels
        for piece in _slices(engine, window, temperature=1.0, **how):
            positions = torch.arange(length)[piece.positions]
            _require_finite(engine, piece.logits, positions, length)
            labels = wanted[positions].to(piece.logits.device)
            labelled = labels != IGNORE_INDEX
            rows, labels = piece.logits[labelled], labels[labelled]
            nll = rows.logsumexp(1) - rows.gather(1, labels[:, None])[:, 0]
            total += float(nll.double().sum())
            count += len(labels)
    loss = total / max(1, count)
    uniform = math.log(float(engine.token_mask.sum()))
    if not loss <= uniform + NATS_WORSE_THAN_UNIFORM:
        half = ", or the range of float16 is too small"
        half = half if engine.identity.get("dtype") == "float16" else ""
        error = TeacherError(
            f"the teacher's loss on this text is {loss:.2f} nats, worse than guessing among its "
            f"{int(engine.token_mask.sum())} tokens ({uniform:.2f}). The tokenizer probably "
            f"belongs to another model, or the weights are damaged{half}. Check the tokenizer "
            "files of the teacher"
        )
        refuse(error, "worse-than-guessing")
    return loss


def _require_finite(engine: Engine, logits: Tensor, positions: Tensor, length: int) -> None:
    """Validate that the logits of all valid token ids are finite. Raises TeacherError."""
    tokens = engine.token_mask.to(logits.device)
    broken = ~logits[:, tokens].isfinite().all(1)
    if not bool(broken.any()):
        return
    position, dtype = int(positions[int(broken.nonzero()[0, 0])]), engine.identity.get("dtype", "")
    why = f", in {dtype}: weights are damaged or activations overflow. Download the weights again"
    why += "" if dtype == "float32" else ", or use --dtype float32"
    if dtype == "float16":
        why = ": activations overflow in float16, whose largest number is 65 504. Use --dtype "
        why += "bfloat16 or float32"
    raise TeacherError(
        f"the teacher's logits are NaN or infinite, first at position {position} of a window of "
        f"{length} tokens{why}"
    )


def _slices(
    engine: Engine,
    window: Window,
    *,
    temperature: float,
    reset_attention: bool,
    corruption: Corruption | None = None,
) -> Iterator[PilotSlice]:
    """Yield the teacher's logits, divided by the temperature, for one slice of positions at a time.

    Positions are those that a masked model predicts, or all positions before the padding for a
    causal model.
    """
    given = TeacherInput.of(window, corruption)
    text = given.inputs[: given.length]
    starts = [window.document_starts] if reset_attention else None
    wanted = None if corruption is None else given.carries[None, : given.length]
    for piece in logits_at(engine, text[None], starts, wanted):
        positions: slice | Tensor = piece.positions
        if wanted is not None:
            inside = torch.arange(piece.positions.start, piece.positions.stop)
            positions = inside[given.carries[piece.positions]]
        yield PilotSlice(window.index, text, positions, piece.logits / temperature)
