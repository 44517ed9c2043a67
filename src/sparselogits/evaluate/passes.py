"""Compute the logits of a student and its teacher over one window, in slices of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselogits.documents import Documents
from sparselogits.errors import InvalidArgumentError
from sparselogits.language_model import require_predicting, split
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.positions import positions_explained
from sparselogits.teacher import Engine
from sparselogits.teacher.engine import logits_at

_SLICE = 256


class StudentLogits:
    """Logits of a student for slices of a window, computed from the window's hidden states.

    Args:
        model: transformers language model. If trunk and head cannot be run separately, the logits
            of a whole window are computed at once.
        masked: whether the windows are corrupted, for a masked language model.

    Raises:
        InvalidArgumentError: the model is causal and `masked` is True, or the reverse.
    """

    def __init__(self, model: nn.Module, *, masked: bool = False) -> None:
        require_predicting(model, masked=masked, whose="the student", of="this text")
        self.model = model
        self.parts = split(model)

    @cached_property
    def documents(self) -> Documents:
        """Method by which the student runs packed windows, probed at the first access."""
        return Documents.probe(self.model, self._run)

    def over(self, inputs: dict[str, Tensor]) -> Callable[[slice | Tensor], Tensor]:
        """Run the student over one window.

        Args:
            inputs: result of `model_inputs` for the window.

        Returns:
            Function from P positions, a slice or int64 indices, to their logits, float32 [P, V].
        """
        states = self._states(inputs)
        if self.parts is None:
            return lambda positions: states[positions].float()
        head = self.parts.bound_head()
        return lambda positions: head(states[positions])

    def _states(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute hidden states [L, D], or logits [L, V] if the head cannot be run separately."""
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
            # an adapter may prepend a prompt, whose positions have logits too
            return logits[:, logits.shape[1] - inputs["input_ids"].shape[1] :]
        return self.parts.states(**inputs)


def without_padding(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item whose values per position end before the window's padding.

    Windows are evaluated singly, so no model needs to read padding or an attention mask.

    Args:
        item: item of a `CacheDataset` or `TextDataset`.
    """
    if "attention_mask" not in item:
        return dict(item)
    length, kept = len(item["input_ids"]), int(item["attention_mask"].sum())
    return {
        name: value[:kept] if name == "targets" or value.shape[:1] == (length,) else value
        for name, value in item.items()
        if name != "attention_mask"
    }


def joined_texts(items: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the tokens of windows without padding, joined and cut into windows, int64 [N, L].

    The last partial window is dropped. L is the length of the first item with its padding, or the
    number of tokens if that is less.

    Args:
        items: items of a `CacheDataset` or `TextDataset`, at least one.
    """
    joined = torch.cat([without_padding(item)["input_ids"] for item in items])
    length = min(len(items[0]["input_ids"]), len(joined))
    return joined[: len(joined) // length * length].view(-1, length)


def model_inputs(item: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the inputs of a forward pass for one window: tokens and, if present, position ids."""
    return {k: v for k, v in item.items() if k in ("input_ids", "position_ids")}


def document_starts(item: Mapping[str, Any]) -> np.ndarray | None:
    """Return where attention restarts in a window, int64 [S]; None without `position_ids`."""
    if "position_ids" not in item:
        return None
    starts: np.ndarray = (item["position_ids"] == 0).nonzero().flatten().numpy()
    return starts


def teacher_slices(
    teacher: Engine | None, item: Mapping[str, Any], wanted: Tensor | None = None
) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield the slices of positions of one window, each with the teacher's logits.

    Args:
        teacher: the teacher; None to yield None instead of logits.
        item: window of a `CacheDataset` or `TextDataset`, without padding.
        wanted: bool [L], true for positions whose logits are computed; None for all. The logits
            have one row per wanted position of the slice.
    """
    length = len(item["input_ids"])
    if teacher is None:
        for start in range(0, length, _SLICE):
            yield slice(start, min(start + _SLICE, length)), None
        return
    starts = document_starts(item)
    of_window = None if wanted is None else wanted[None]
    tokens = item["input_ids"][None]
    for piece in logits_at(teacher, tokens, None if starts is None else [starts], of_window):
        yield piece.positions, piece.logits


def labelled_positions(labels: Tensor, positions: slice) -> Tensor:
    """Return the positions of a slice that have a label, int64 indices into the window.

    Args:
        labels: labels of the window, int64 [L].
        positions: slice of positions with step 1.
    """
    found: Tensor = (labels[positions] != IGNORE_INDEX).nonzero()[:, 0] + positions.start
    return found


def require_ids(student: int, teacher: int) -> None:
    """Raise `InvalidArgumentError` if the student has fewer ids than the teacher."""
    if student < teacher:
        raise InvalidArgumentError(
            f"the student's vocabulary has {student} ids, fewer than the teacher's {teacher}; give "
            "a student with at least as many ids (padding rows are harmless)"
        )
