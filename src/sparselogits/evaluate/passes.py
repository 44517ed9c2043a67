"""Run a student and its teacher over one window, and yield their logits in slices of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparselogits.documents import Documents
from sparselogits.errors import InvalidArgumentError
from sparselogits.language_model import require_predicting, split
from sparselogits.positions import positions_explained
from sparselogits.teacher import Engine

_SLICE = 256


class StudentLogits:
    """Compute a student's logits of some positions, from hidden states computed once per window.

    Args:
        model: transformers causal language model. If its head cannot be run apart from its trunk,
            the logits of a whole window are computed at once.

    Raises:
        InvalidArgumentError: If the model is a masked language model.
    """

    def __init__(self, model: nn.Module) -> None:
        require_predicting(model, masked=False, whose="the student", of="this text")
        self.model = model
        self.parts = split(model)

    @cached_property
    def documents(self) -> Documents:
        """Way in which the student runs packed windows, probed at the first access."""
        return Documents.probe(self.model, self._run)

    def over(self, inputs: dict[str, Tensor]) -> Callable[[slice], Tensor]:
        """Return a function from a slice of positions to float32 logits [P, V].

        Args:
            inputs: the `model_inputs` of one window.
        """
        states = self._states(inputs)
        if self.parts is None:
            return lambda positions: states[positions].float()
        head = self.parts.bound_head()
        return lambda positions: head(states[positions])

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return hidden states [L, D], or logits [L, V] if head and trunk cannot be run apart."""
        device = next(self.model.parameters()).device
        tokens = inputs["input_ids"].to(device)[None]
        positions = inputs.get("position_ids")
        with positions_explained(self.model, tokens.shape[1]):
            if positions is None or int((positions == 0).sum()) == 1:
                return self._run(input_ids=tokens)[0]
            return self.documents.run(self._run, tokens, positions[None])[0]

    def _run(self, **inputs: Any) -> Tensor:
        if self.parts is None:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
            # the prompt that an adapter puts before the text has logits too
            return logits[:, logits.shape[1] - inputs["input_ids"].shape[1] :]
        return self.parts.states(**inputs)


def model_inputs(item: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of a model for one window."""
    return {k: v for k, v in item.items() if k in ("input_ids", "position_ids")}


def document_starts(item: Mapping[str, Any]) -> np.ndarray | None:
    """Return where attention restarts in a window; None if it does not."""
    if "position_ids" not in item:
        return None
    starts: np.ndarray = (item["position_ids"] == 0).nonzero().flatten().numpy()
    return starts


def teacher_slices(
    teacher: Engine | None, item: Mapping[str, Any]
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield slices of positions of one window, with logits [P, V] of the teacher if given."""
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
        InvalidArgumentError: If it has fewer.
    """
    if student < teacher:
        raise InvalidArgumentError(
            f"the student's vocabulary has {student} ids, the teacher's {teacher}; "
            "a student may have more ids than its teacher, not fewer"
        )
