"""Forward passes over one window: a student's logits and the teacher's, a slice at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparselogits.causal_lm import split
from sparselogits.documents import Documents
from sparselogits.errors import InvalidArgumentError
from sparselogits.positions import positions_explained
from sparselogits.teacher import Engine

_SLICE = 256


class StudentLogits:
    """A student's logits over a run of positions, from hidden states computed once a window.

    Args:
        model: a transformers causal language model. One whose head cannot be run apart from its
            trunk gives the logits of the whole window at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = split(model)

    @cached_property
    def documents(self) -> Documents:
        """How the student runs packed windows; probed when it is first asked for."""
        return Documents.probe(self.model, self._run)

    def over(self, inputs: dict[str, Tensor]) -> Callable[[slice], Tensor]:
        """Return a function from a run of positions to float32 logits [P, V].

        Args:
            inputs: the `model_inputs` of one window.
        """
        states = self._states(inputs)
        if self.parts is None:
            return lambda positions: states[positions].float()
        head = self.parts.bound_head()
        return lambda positions: head(states[positions])

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Hidden states [L, D], or logits [L, V] where the student is not taken apart."""
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
            # a prompt that an adapter puts before the text has logits of its own
            return logits[:, logits.shape[1] - inputs["input_ids"].shape[1] :]
        states: Tensor = self.parts.trunk(**inputs, use_cache=False).last_hidden_state
        return states


def model_inputs(item: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model reads of a window."""
    return {k: v for k, v in item.items() if k in ("input_ids", "position_ids")}


def document_starts(item: Mapping[str, Any]) -> np.ndarray | None:
    """Where attention starts anew in a window; None where it does not."""
    if "position_ids" not in item:
        return None
    starts: np.ndarray = (item["position_ids"] == 0).nonzero().flatten().numpy()
    return starts


def teacher_slices(
    teacher: Engine | None, item: Mapping[str, Any]
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
