"""Forward passes over one window: a student's logits and the teacher's, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparselogits.causal_lm import agrees_with_model, split
from sparselogits.errors import InvalidArgumentError
from sparselogits.teacher import Engine

_SLICE = 256


class StudentLogits:
    """A student's logits over a run of positions, from hidden states computed once a window.

    Args:
        model: a transformers causal language model. One whose head cannot be run apart from its
            trunk gives the logits of the whole window at once.
    """

    def __init__(self, model: nn.Module) -> None:
        parts = split(model)
        self.model = model
        self.parts = parts if parts is not None and agrees_with_model(model, parts) else None

    def over(self, inputs: dict[str, Tensor]) -> Callable[[slice], Tensor]:
        """From a run of positions to float32 logits [P, V], for one window's `model_inputs`."""
        device = next(self.model.parameters()).device
        arguments = {k: v.to(device)[None] for k, v in inputs.items()} | {"use_cache": False}
        if self.parts is None:
            logits = self.model(**arguments).logits[0]
            return lambda positions: logits[positions].float()
        hidden = self.parts.trunk(**arguments).last_hidden_state[0]
        head = self.parts.bound_head()
        return lambda positions: head(hidden[positions])


def model_inputs(item: dict[str, Any]) -> dict[str, Tensor]:
    """What a model reads of a window."""
    return {k: v for k, v in item.items() if k in ("input_ids", "position_ids")}


def document_starts(item: dict[str, Any]) -> np.ndarray | None:
    """Where attention starts anew in a window; None where it does not."""
    if "position_ids" not in item:
        return None
    starts: np.ndarray = (item["position_ids"] == 0).nonzero().flatten().numpy()
    return starts


def teacher_slices(
    teacher: Engine | None, item: dict[str, Any]
) -> Iterator[tuple[slice, Tensor | None]]:
    """Runs of positions of one window, with the teacher's logits [P, V] if there is one."""
    length = len(item["input_ids"])
    if teacher is None:
        for start in range(0, length, _SLICE):
            yield slice(start, min(start + _SLICE, length)), None
        return
    starts = document_starts(item)
    for piece in teacher.logits(item["input_ids"][None], None if starts is None else [starts]):
        yield piece.positions, piece.logits


def require_ids(student: int, teacher: int) -> None:
    """Check that a student has an id for every id of its teacher.

    Raises:
        InvalidArgumentError: where it has fewer.
    """
    if student < teacher:
        raise InvalidArgumentError(
            f"the student's vocabulary has {student} ids, the teacher's {teacher}; "
            "a student may have more ids than its teacher, not fewer"
        )
