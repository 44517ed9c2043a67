"""Run a model over packed windows so that the documents of one window do not see each other.

transformers' attention reads document boundaries from position ids that restart. Many architectures
ignore them: recurrent and hybrid models carry a state across the boundary; ALiBi and some learned
positions depend on the position in the window. So `Documents.probe` runs a model on two short
packed windows and compares the result with each document alone. A model that separates the
documents runs packed windows; any other runs each document as a separate sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparselogits.causal_lm import embedding_rows, text_config
from sparselogits.errors import InvalidArgumentError

Forward = Callable[..., Tensor]
"""Maps `input_ids` int64 [B, L], and further inputs by name, to states or logits [B, L, D]."""

_PROBE_STARTS = ([0, 17], [0, 9, 10, 27])
_PROBE_LENGTH = 40

# Rounding differences of two passes of different shapes, as a share of the norm of a position's
# states. A false alarm about packed windows costs only time: separate documents are always right.
_PACKED = {torch.float32: 1e-3, torch.float64: 1e-3}
_APART = {torch.float32: 1e-2, torch.float64: 1e-2}
_PACKED_HALF, _APART_HALF = 0.125, 0.5

_FAILURES = (
    *(AttributeError, IndexError, KeyError, NotImplementedError),
    *(RuntimeError, TypeError, ValueError, AssertionError),
)


@dataclass(frozen=True)
class Documents:
    """How one model runs packed windows.

    Args:
        model: name of the model's class, for messages.
        way: "packed" (position ids that restart are enough), "apart" (each document runs as a
            separate sequence) or "none" (documents are not independent even then).
        packed_up_to: longest window that runs packed; None without a limit. Beyond it the model
            depends on the longest position of the batch or on the position in the window.
        same_length_beyond: window length above which only documents of equal length run together,
            because the rotary frequencies depend on the longest sequence of the batch; or None.
    """

    model: str
    way: Literal["packed", "apart", "none"]
    packed_up_to: int | None = None
    same_length_beyond: int | None = None

    @classmethod
    @torch.no_grad()
    def probe(cls, model: nn.Module, run: Forward) -> Documents:
        """Find out how a model runs documents, by a few short forward passes.

        Args:
            model: a transformers causal language model; set to eval mode and back.
            run: forward pass of the model, up to states or logits.
        """
        config = text_config(getattr(model, "config", None))
        rotary, chunk = _rotary_limit(config), getattr(config, "attention_chunk_size", None)
        limits = [limit for limit in (rotary, chunk) if limit is not None]
        was_training = model.training
        model.eval()
        try:
            way = _way(run, _probe_tokens(model), equal=rotary is not None)
        finally:
            model.train(was_training)
        return cls(type(model).__name__, way, min(limits, default=None), rotary)

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
        """Run packed windows and return states (or logits) [B, L, D], differentiable.

        Args:
            run: forward pass of the model.
            input_ids: int64 [B, L].
            position_ids: int64 [B, L], zero where a document starts.
            one_call: whether to run all documents in one call, padded to the longest, because other
                ranks expect the same number of calls (sharded weights).
            mask_padding: whether to mark padding in `attention_mask`, for a loss that the model
                computes over all tokens of a call.
            inputs: further inputs; tensors [B, L] are divided like `input_ids`.

        Raises:
            InvalidArgumentError: the model cannot separate the documents of a window.
        """
        if self.way == "none":
            raise InvalidArgumentError(
                f"{self.model}: the documents of one window influence each other, packed or run "
                "one by one; resetting attention needs a causal model. Build the cache without "
                "--reset-attention, or use another model"
            )
        length = input_ids.shape[1]
        limit = self.packed_up_to
        if self.way == "packed" and (limit is None or length <= limit):
            where = input_ids.device
            return run(input_ids=input_ids, position_ids=position_ids.to(where), **inputs)
        beyond = self.same_length_beyond
        equal = beyond is not None and length > beyond
        if mask_padding and "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(input_ids)
        return _run_apart(run, input_ids, position_ids, equal=equal, one_call=one_call, **inputs)


def restarting_positions(length: int, document_starts: Sequence[np.ndarray]) -> Tensor:
    """Return int64 [B, L] position ids that restart at zero with every document.

    Args:
        length: number L of positions.
        document_starts: positions at which documents start, for each of B windows.
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
    """Run every document as a separate sequence and return the states in the windows' order."""
    batch, length = input_ids.shape
    device = input_ids.device
    spans = _spans(position_ids)
    pieces, order = [], []
    for group in _grouped(spans, equal=equal, one_call=one_call):
        first = torch.tensor([start for start, _ in group])[:, None]
        sizes = torch.tensor([size for _, size in group])[:, None]
        columns = torch.arange(int(sizes.max()))[None]
        # a causal model ignores the padding, which repeats the document's last token
        places = (first + columns.minimum(sizes - 1)).to(device)
        own = (columns < sizes).to(device)
        divided = {
            name: value.flatten()[places]
            if isinstance(value, Tensor) and value.shape == (batch, length)
            else value
            for name, value in inputs.items()
        }
        if "attention_mask" in divided:
            divided["attention_mask"] = divided["attention_mask"] * own
        if equal:
            _forget_lengths(run, input_ids)
        states = run(input_ids=input_ids.flatten()[places], **divided)
        # a model may put a prompt before the text, which has states as well
        states = states[:, states.shape[1] - places.shape[1] :]
        pieces.append(states[own.to(states.device)])
        order.append(places[own])
    back = torch.cat(order).argsort().to(pieces[0].device)
    states = torch.cat(pieces)[back]
    return states.view(batch, length, *states.shape[1:])


@torch.no_grad()
def _forget_lengths(run: Forward, input_ids: Tensor) -> None:
    """Run one token, so that rotary frequencies that grew with a long sequence are reset."""
    run(input_ids=input_ids[:1, :1])


def _spans(position_ids: Tensor) -> list[tuple[int, int]]:
    """Return (first index in the flattened batch, length) of every document."""
    starts_here = position_ids.cpu() == 0
    starts_here[:, 0] = True
    starts = [*starts_here.flatten().nonzero().flatten().tolist(), starts_here.numel()]
    return [(a, b - a) for a, b in pairwise(starts)]


def _grouped(
    spans: list[tuple[int, int]], *, equal: bool, one_call: bool
) -> Iterator[list[tuple[int, int]]]:
    """Yield documents that share a call: of lengths within a factor of two, to limit padding."""
    if one_call and not equal:
        yield spans
        return
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, size in spans:
        groups.setdefault(size if equal else size.bit_length(), []).append((start, size))
    for key in sorted(groups):
        yield groups[key]


def _probe_tokens(model: nn.Module) -> Tensor:
    places = torch.arange(len(_PROBE_STARTS) * _PROBE_LENGTH).reshape(len(_PROBE_STARTS), -1)
    tokens = (places * 7919 + places // 7) % embedding_rows(model)
    return tokens.to(model.get_input_embeddings().weight.device)  # type: ignore[operator]


def _way(run: Forward, tokens: Tensor, *, equal: bool) -> Literal["packed", "apart", "none"]:
    starts = [np.array(own, np.int32) for own in _PROBE_STARTS]
    positions = restarting_positions(_PROBE_LENGTH, starts).to(tokens.device)
    try:
        alone = _each_alone(run, tokens, equal=equal)
    except _FAILURES:
        return "none"
    if alone.is_meta or not bool(alone.isfinite().all()):
        return "apart"  # damaged or overflowing, which is reported elsewhere
    try:
        if _packed_is_right(run, tokens, positions, alone):
            return "packed"
    except _FAILURES:
        pass
    try:
        apart = _run_apart(run, tokens, positions, equal=equal, one_call=False)
    except _FAILURES:
        return "none"
    return "apart" if _distance(apart, alone) <= _APART.get(alone.dtype, _APART_HALF) else "none"


def _each_alone(run: Forward, tokens: Tensor, *, equal: bool) -> Tensor:
    rows = []
    for row, starts in zip(tokens, _PROBE_STARTS, strict=True):
        ends = [*starts[1:], _PROBE_LENGTH]
        found = []
        for a, b in zip(starts, ends, strict=True):
            if equal:
                _forget_lengths(run, tokens)
            states = run(input_ids=row[None, a:b])[0]
            found.append(states[len(states) - (b - a) :])
        rows.append(torch.cat(found))
    return torch.stack(rows)


def _packed_is_right(run: Forward, tokens: Tensor, positions: Tensor, alone: Tensor) -> bool:
    packed = run(input_ids=tokens, position_ids=positions)
    bound = _PACKED.get(alone.dtype, _PACKED_HALF)
    if packed.shape != alone.shape or not _distance(packed, alone) <= bound:
        return False
    changed = tokens.clone()
    for row, starts in zip(changed, _PROBE_STARTS, strict=True):
        row[: starts[1]] = row[: starts[1]].flip(0).roll(1)
    again = run(input_ids=changed, position_ids=positions)
    # masked positions add exact zeros, so equal shapes give equal bits in any dtype
    return all(
        torch.equal(one[starts[1] :], other[starts[1] :])
        for one, other, starts in zip(packed, again, _PROBE_STARTS, strict=True)
    )


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the largest distance of two positions' states, as a share of their norm.

    In half precision it is the median over positions, because a different choice of one expert
    moves a single position far.
    """
    half = one.dtype in (torch.float16, torch.bfloat16)
    one, other = one.float(), other.float().to(one.device)
    share = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-30)
    return float(share.median() if half else share.max())


def _rotary_limit(config: Any) -> int | None:
    """Return the longest sequence whose rotary frequencies do not depend on its length."""
    for name in ("rope_parameters", "rope_scaling"):
        for found in _dicts(getattr(config, name, None)):
            kind = found.get("rope_type", found.get("type"))
            if kind in ("dynamic", "longrope", "su"):
                original = found.get("original_max_position_embeddings") or getattr(
                    config, "original_max_position_embeddings", None
                )
                return int(original or getattr(config, "max_position_embeddings", 0) or 0)
    return None


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for own in value.values():
            yield from _dicts(own)
