"""Run a model over packed windows so that no document attends to another one.

transformers' attention infers document boundaries from position ids that restart. Many
architectures ignore such position ids: recurrent and hybrid models carry a state across the
boundary; ALiBi and some learned positions depend on the position in the window. So
`Documents.probe` runs a model on two short packed windows, and compares the states with those of
each document run alone. If the states are equal up to rounding, the model runs packed windows;
otherwise it runs each document as a separate sequence, with an attention mask if it attends to
padding. A model that cannot separate documents in either way is rejected when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparselogits.errors import InvalidArgumentError
from sparselogits.language_model import (
    embedding_rows,
    in_eval_mode,
    predicts_masked,
    probe_tokens,
    text_config,
)

Forward = Callable[..., Tensor]
"""Forward pass from `input_ids` int64 [B, L] and further keyword inputs to states or logits
[B, L, D]."""

_PROBE_STARTS = ([0, 17], [0, 9, 10, 27])
_PROBE_LENGTH = 40

# Largest rounding differences between passes of different shapes, relative to the norm of a
# position's states. If a packed pass is rejected wrongly, separate documents only take longer.
_PACKED = {torch.float32: 1e-3, torch.float64: 1e-3}
_APART = {torch.float32: 1e-2, torch.float64: 1e-2}
_PACKED_HALF, _APART_HALF = 0.125, 0.5

# raised by models that do not support the inputs
_FAILURES = (
    *(AttributeError, IndexError, KeyError, NotImplementedError),
    *(RuntimeError, TypeError, ValueError, AssertionError),
)


@dataclass(frozen=True)
class Documents:
    """Method by which a model runs packed windows so that no document influences another.

    Args:
        model: name of the model's class, for messages.
        way: "packed" (position ids that restart are sufficient), "apart" (each document runs as a
            separate sequence) or "none" (neither way reproduces the states of a document alone).
        packed_up_to: length in tokens of the longest window that may run packed; None without a
            limit. In longer windows the model's results depend on the longest position of the
            batch, or on the position in the window.
        same_length_beyond: window length in tokens above which only documents of equal length share
            a batch, because the rotary frequencies depend on the longest sequence in the batch;
            None if the frequencies are fixed.
        masks_padding: whether separate documents need an attention mask if a call pads them,
            because the model attends to later positions.
    """

    model: str
    way: Literal["packed", "apart", "none"]
    packed_up_to: int | None = None
    same_length_beyond: int | None = None
    masks_padding: bool = False

    @classmethod
    @torch.no_grad()
    def probe(cls, model: nn.Module, run: Forward) -> Documents:
        """Determine how a model must run documents, by a few short passes of `run` in eval mode."""
        config = text_config(getattr(model, "config", None))
        rotary, chunk = _rotary_limit(config), getattr(config, "attention_chunk_size", None)
        limits = [limit for limit in (rotary, chunk) if limit is not None]
        with in_eval_mode(model):
            tokens, sees_padding = _probe_tokens(model), predicts_masked(model)
            way, masks = _probe_way(run, tokens, equal=rotary is not None, masked=sees_padding)
        return cls(type(model).__name__, way, min(limits, default=None), rotary, masks)

    def run(
        self,
        run: Forward,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        one_call: bool = False,
        mask_padding: bool = False,
        **inputs: Any,
    ) -> Tensor:
        """Run packed windows and return differentiable states or logits [B, L, D].

        Args:
            run: forward pass of the model.
            input_ids: int64 [B, L].
            position_ids: int64 [B, L], zero where a document starts.
            one_call: whether to run separate documents in one call, padded to the longest one, so
                that all ranks of a model with sharded weights make the same number of calls; has
                no effect in windows longer than `same_length_beyond`.
            mask_padding: whether to mark padding in `attention_mask`, for models that compute a
                loss over all tokens of a call.
            inputs: further inputs of `run`; tensors [B, L] are divided like `input_ids`.

        Raises:
            InvalidArgumentError: the model cannot separate the documents of a window.
        """
        if self.way == "none":
            raise InvalidArgumentError(
                f"{self.model}: the documents of one window influence each other, whether they run "
                "packed or separately, so attention cannot be reset. Build the cache without "
                "--reset-attention (or with --packing documents), or use another model"
            )
        length = input_ids.shape[1]
        limit = self.packed_up_to
        if self.way == "packed" and (limit is None or length <= limit):
            device = input_ids.device
            return run(input_ids=input_ids, position_ids=position_ids.to(device), **inputs)
        equal = self.same_length_beyond is not None and length > self.same_length_beyond
        if (mask_padding or self.masks_padding) and "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(input_ids)
        return _run_apart(run, input_ids, position_ids, equal=equal, one_call=one_call, **inputs)


@torch.no_grad()
def require_masked_padding(model: nn.Module, run: Forward) -> None:
    """Validate that padding marked by an attention mask does not change the outputs for a text.

    Args:
        model: a transformers masked language model.
        run: forward pass of the model.

    Raises:
        InvalidArgumentError: the model ignores the mask, as FNet does.
    """
    tokens = probe_tokens(model, model.get_input_embeddings().weight.device)  # type: ignore[operator]
    length = tokens.shape[1] // 2
    mask = (torch.arange(tokens.shape[1], device=tokens.device) < length).long()[None]
    with in_eval_mode(model):
        padded = run(input_ids=tokens, attention_mask=mask)[:, :length]
        alone = run(input_ids=tokens[:, :length])
    if _distance(padded, alone) > _APART.get(alone.dtype, _APART_HALF):
        raise InvalidArgumentError(
            f"{type(model).__name__} ignores the attention mask, so the padding of a window would "
            "change its predictions. Build the cache without --packing documents, or use another "
            "model"
        )


def restarting_positions(length: int, document_starts: Sequence[np.ndarray]) -> Tensor:
    """Return int64 [B, L] position ids that restart at zero with every document.

    Args:
        length: number L of positions per window.
        document_starts: integer positions at which documents start, one array per window.
    """
    rows = np.broadcast_to(np.arange(length), (len(document_starts), length)).copy()
    for row, starts in zip(rows, document_starts, strict=True):
        for start in starts:
            row[start:] = np.arange(length - start)
    return torch.from_numpy(rows)


def _run_apart(
    run: Forward,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    equal: bool,
    one_call: bool,
    **inputs: Any,
) -> Tensor:
    """Run every document as a separate sequence, and return the states [B, L, D] in window order.

    Documents of one group of `_groups_of` share a call.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    pieces, order = [], []
    for group in _groups_of(_spans(position_ids), equal=equal, one_call=one_call):
        first = torch.tensor([start for start, _ in group])[:, None]
        sizes = torch.tensor([size for _, size in group])[:, None]
        columns = torch.arange(int(sizes.max()))[None]
        # padding repeats the last token of a document; it is masked, or causal attention does not
        # read it
        source = (first + columns.minimum(sizes - 1)).to(device)
        not_padding = (columns < sizes).to(device)
        divided = {
            name: value.flatten()[source]
            if isinstance(value, Tensor) and value.shape == (batch, length)
            else value
            for name, value in inputs.items()
        }
        if "attention_mask" in divided:
            divided["attention_mask"] = divided["attention_mask"] * not_padding
        if equal:
            _reset_rotary(run, input_ids)
        states = run(input_ids=input_ids.flatten()[source], **divided)
        # an adapter may prepend a learned prompt, which has states as well
        states = states[:, states.shape[1] - source.shape[1] :]
        pieces.append(states[not_padding.to(states.device)])
        order.append(source[not_padding])
    in_window_order = torch.cat(order).argsort().to(pieces[0].device)
    states = torch.cat(pieces)[in_window_order]
    return states.view(batch, length, *states.shape[1:])


@torch.no_grad()
def _reset_rotary(run: Forward, input_ids: Tensor) -> None:
    """Run one token to reset the rotary frequencies that a model has adapted to a long sequence."""
    run(input_ids=input_ids[:1, :1])


def _spans(position_ids: Tensor) -> list[tuple[int, int]]:
    """Return the first index, in the flattened batch, and the length of every document."""
    is_start = position_ids.cpu() == 0
    is_start[:, 0] = True
    starts = [*is_start.flatten().nonzero().flatten().tolist(), is_start.numel()]
    return [(a, b - a) for a, b in pairwise(starts)]


def _groups_of(
    spans: list[tuple[int, int]], *, equal: bool, one_call: bool
) -> Iterator[list[tuple[int, int]]]:
    """Yield the groups of documents that run in one call each.

    Lengths within a group are equal with `equal`; otherwise, without `one_call`, they differ by
    less than a factor of two, to limit padding.
    """
    if one_call and not equal:
        yield spans
        return
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, size in spans:
        groups.setdefault(size if equal else size.bit_length(), []).append((start, size))
    for key in sorted(groups):
        yield groups[key]


def _probe_tokens(model: nn.Module) -> Tensor:
    """Return token ids of the probe's windows, int64 [2, 40], on the model's device."""
    indices = torch.arange(len(_PROBE_STARTS) * _PROBE_LENGTH).reshape(len(_PROBE_STARTS), -1)
    tokens = (indices * 7919 + indices // 7) % embedding_rows(model)
    return tokens.to(model.get_input_embeddings().weight.device)  # type: ignore[operator]


def _probe_way(
    run: Forward, tokens: Tensor, *, equal: bool, masked: bool
) -> tuple[Literal["packed", "apart", "none"], bool]:
    """Return the fastest `way` that reproduces the states of documents that are run alone.

    If the states are not finite, the way is "apart" without a test. The second value is
    `Documents.masks_padding`. If the way is "apart" and the model is a masked language model
    (`masked`), the value is True without a test, because the effect of a little padding may be
    smaller than the bounds on rounding.
    """
    starts = [np.array(positions, np.int32) for positions in _PROBE_STARTS]
    positions = restarting_positions(_PROBE_LENGTH, starts).to(tokens.device)
    try:
        alone = _each_alone(run, tokens, equal=equal)
    except _FAILURES:
        return "none", False
    if alone.is_meta or not bool(alone.isfinite().all()):
        return "apart", masked  # damaged weights and overflow are reported when the model runs
    try:
        if _packed_equals(alone, run, tokens, positions):
            return "packed", False
    except _FAILURES:
        pass
    bound = _APART.get(alone.dtype, _APART_HALF)
    for masks in (True,) if masked else (False, True):
        mask = {"attention_mask": torch.ones_like(tokens)} if masks else {}
        try:
            apart = _run_apart(run, tokens, positions, equal=equal, one_call=False, **mask)
        except _FAILURES:
            continue
        if _distance(apart, alone) <= bound:
            return "apart", masks
    return "none", False


def _each_alone(run: Forward, tokens: Tensor, *, equal: bool) -> Tensor:
    """Run each document of the probe alone, and return the states in the shape of the windows."""
    rows = []
    for row, starts in zip(tokens, _PROBE_STARTS, strict=True):
        states = []
        for a, b in pairwise([*starts, _PROBE_LENGTH]):
            if equal:
                _reset_rotary(run, tokens)
            states.append(run(input_ids=row[None, a:b])[0][a - b :])
        rows.append(torch.cat(states))
    return torch.stack(rows)


def _packed_equals(alone: Tensor, run: Forward, tokens: Tensor, positions: Tensor) -> bool:
    """Return whether a packed pass gives `alone` up to rounding, and documents affect no later one.

    The second condition is tested by changing the first document of each window.
    """
    packed = run(input_ids=tokens, position_ids=positions)
    bound = _PACKED.get(alone.dtype, _PACKED_HALF)
    if packed.shape != alone.shape or not _distance(packed, alone) <= bound:
        return False
    changed = tokens.clone()
    for row, starts in zip(changed, _PROBE_STARTS, strict=True):
        row[: starts[1]] = row[: starts[1]].flip(0).roll(1)
    again = run(input_ids=changed, position_ids=positions)
    # masked positions add exact zeros, so a change in one document changes no bit of the others
    return all(
        torch.equal(one[starts[1] :], other[starts[1] :])
        for one, other, starts in zip(packed, again, _PROBE_STARTS, strict=True)
    )


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the maximum over positions of the relative distance between two tensors of states.

    In half precision the median is returned instead, because rounding may route a position to
    another expert, which changes its states completely.
    """
    half = one.dtype in (torch.float16, torch.bfloat16)
    one, other = one.float(), other.float().to(one.device)
    relative = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-30)
    return float(relative.median() if half else relative.max())


def _rotary_limit(config: Any) -> int | None:
    """Return the sequence length above which rotary frequencies change; None if they are fixed.

    The result is 0 if they change and the configuration does not state the length.
    """
    for name in ("rope_parameters", "rope_scaling"):
        for rope in _nested_dicts(getattr(config, name, None)):
            kind = rope.get("rope_type", rope.get("type"))
            if kind in ("dynamic", "longrope", "su"):
                original = rope.get("original_max_position_embeddings") or getattr(
                    config, "original_max_position_embeddings", None
                )
                return int(original or getattr(config, "max_position_embeddings", 0) or 0)
    return None


def _nested_dicts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a dict and all dicts among its values, at any depth."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _nested_dicts(inner)
