"""Build the pruned model, and verify pruning against the larger model without the removed parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.errors import ShrinkError
from sparselogits.language_model import probe_tokens
from sparselogits.shrink.layout import Layout, Order, resized
from sparselogits.shrink.plan import Kept

_ORDERS: tuple[Order, ...] = ("concatenated", "interleaved")
_TOLERANCE = 1e-3
"""Largest difference of logits that is attributed to float32 rounding.

The value is relative to the largest magnitude of a logit; absolute if all magnitudes are below 1.
"""


@dataclass(frozen=True)
class Slicer:
    """Selection of the indices that the smaller model retains in each tensor.

    Args:
        layout: layout of the larger model.
        kept: indices of the retained blocks, channels and heads.
        order: order of rows in fused projections of queries, keys and values.
    """

    layout: Layout
    kept: Kept
    order: Order

    def index(self, name: str) -> list[tuple[int, Tensor]]:
        """Return (dimension, retained indices) for each pruned dimension of a tensor."""
        found = []
        layer = self.layout.layer_of(name)
        position = self.kept.layers.index(layer) if layer in self.kept.layers else None
        for dimension in self.layout.dimensions.get(name, ()):
            indices: Tensor | None = None
            if dimension.size == "hidden" and self.kept.hidden is not None:
                indices = _in_blocks(self.kept.hidden, self.layout.sizes.hidden, dimension.repeats)
            elif position is not None and dimension.size == "channels" and self.kept.channels:
                channels, total = self.kept.channels[position], self.layout.sizes.channels
                indices = _in_blocks(channels, total, dimension.repeats)
            elif position is not None and dimension.size == "groups" and self.kept.groups:
                indices = self._group_rows(name, self.kept.groups[position], dimension.repeats)
            if indices is not None:
                found.append((dimension.dim, indices))
        return found

    def _group_rows(self, name: str, groups: Tensor, repeats: int) -> Tensor:
        """Return the indices along a dimension of a projection that belong to groups of heads."""
        if name in self.layout.fused and self.order == "concatenated":
            sizes = self.layout.sizes
            queries = sizes.heads_per_group * sizes.head_dim
            keys_at = sizes.groups * queries
            values_at = keys_at + sizes.groups * sizes.head_dim
            key_rows = _runs(groups, sizes.head_dim)
            return torch.cat([_runs(groups, queries), keys_at + key_rows, values_at + key_rows])
        return _runs(groups, repeats)

    def new_name(self, name: str) -> str | None:
        """Return the name of a tensor in the smaller model; None for tensors of removed blocks."""
        layer = self.layout.layer_of(name)
        if layer is None:
            return name
        if layer not in self.kept.layers:
            return None
        prefix = self.layout.layers + "."
        rest = name.removeprefix(prefix).partition(".")[2]
        return f"{prefix}{self.kept.layers.index(layer)}.{rest}"


def build(model: nn.Module, slicer: Slicer) -> nn.Module:
    """Build the smaller model on the CPU, in the dtype of the larger one.

    Args:
        model: the larger model; it is not changed.
        slicer: retained indices of its tensors.

    Raises:
        ShrinkError: If the tensors do not have the shapes that the layout predicts, or the output
            of the embedding for a smaller hidden size is not a constant multiple of that of the
            larger model.
    """
    from transformers.initialization import no_init_weights

    sizes = slicer.kept.sizes(slicer.layout)
    config = resized(model, sizes, layers=list(slicer.kept.layers))
    dtype = next(model.parameters()).dtype
    with no_init_weights():
        student: nn.Module = type(model)(config).to(dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        new = slicer.new_name(name)
        if new is None:
            continue
        sliced = tensor.detach().cpu()
        for dim, index in slicer.index(name):
            sliced = sliced.index_select(dim, index)
        state[new] = sliced.clone()
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        raise ShrinkError(
            f"{type(model).__name__}: its tensors do not depend on its configuration as expected "
            f"({str(error).splitlines()[-1].strip()}), so it cannot be pruned to these sizes. "
            "Prune only its layers, or use a tool for its architecture"
        ) from error
    student.tie_weights()  # type: ignore[operator]
    student.eval()
    if slicer.kept.hidden is not None:
        _restore_scales(model, student, slicer)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        student.generation_config = generation
    return student


def order_of(model: nn.Module, layout: Layout, kept: Kept) -> Order:
    """Return the order of fused rows; verify on two blocks that pruning in this order is correct.

    The logits of the first two retained blocks, pruned, must equal those of the same blocks with
    the removed parts set to zero (up to `_TOLERANCE`).

    Args:
        model: the larger model.
        layout: layout of the larger model.
        kept: indices of the retained blocks, channels and heads.

    Raises:
        ShrinkError: If the logits differ in every order, or the pruned model cannot be built.
    """
    few = kept.first(2)
    reason: Exception | None = None
    for order in _ORDERS if layout.fused and kept.groups else _ORDERS[:1]:
        try:
            if _is_equivalent(model, Slicer(layout, few, order)):
                return order
        except (RuntimeError, ValueError, TypeError) as error:
            reason = error
    raise ShrinkError(
        f"{type(model).__name__}: the pruned model's logits differ from those of the larger model "
        "without the removed parts, so its structure is not supported. Prune only its layers, or "
        "use a tool for its architecture"
    ) from reason


@torch.no_grad()
def _is_equivalent(model: nn.Module, slicer: Slicer) -> bool:
    """Return whether pruning and setting the removed parts to zero give the same logits."""
    student = build(model, slicer).float()
    whole = build(model, Slicer(slicer.layout, Kept(slicer.kept.layers), slicer.order)).float()
    index_of = {slicer.new_name(name): slicer.index(name) for name in model.state_dict()}
    small = student.state_dict()
    padded = {}
    for name, tensor in whole.state_dict().items():
        inside = small[name]
        for dim, index in index_of[name]:
            shape = list(inside.shape)
            shape[dim] = tensor.shape[dim]
            inside = torch.zeros(shape, dtype=inside.dtype).index_copy_(dim, index, inside)
        padded[name] = inside
    whole.load_state_dict(padded)
    probe = probe_tokens(student)
    expected = student(input_ids=probe, use_cache=False).logits
    hidden = slicer.kept.hidden
    if hidden is None:
        found = whole(input_ids=probe, use_cache=False).logits
    else:
        layout = slicer.layout
        given = (hidden, whole, student, layout)
        with _norms_over(*given), _inputs_of(*given):
            found = whole(input_ids=probe, use_cache=False).logits
    limit = _TOLERANCE * float(expected.abs().max().clamp(min=1.0))
    return bool((found - expected).abs().max() <= limit)


@contextmanager
def _norms_over(
    hidden: Tensor, whole: nn.Module, student: nn.Module, layout: Layout
) -> Iterator[None]:
    """Within a `with` block, replace the larger model's normalisations by the student's."""
    small, large = dict(student.named_modules()), dict(whole.named_modules())

    def over_kept(norm: nn.Module, _: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        kept = norm(given[0][..., hidden])
        return torch.zeros_like(out).index_copy_(-1, hidden, kept)

    with ExitStack() as hooks:
        for name in norms_of(whole, layout):
            hook = partial(over_kept, small[name])
            hooks.enter_context(large[name].register_forward_hook(hook))
        yield


@contextmanager
def _inputs_of(
    hidden: Tensor, whole: nn.Module, student: nn.Module, layout: Layout
) -> Iterator[None]:
    """Within a `with` block, pass the student's states to the larger model's first block.

    The student's embedding is already rescaled (`_restore_scales`), so the factor that depends on
    the hidden size must not be applied twice.
    """
    states = _first_inputs(student, layout, probe_tokens(student))

    def replaced(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wide = torch.zeros(*states.shape[:-1], layout.sizes.hidden)
        wide.index_copy_(-1, hidden, states)
        if args:
            return (wide, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": wide}

    with layout.blocks_of(whole)[0].register_forward_pre_hook(replaced, with_kwargs=True):
        yield


def norms_of(model: nn.Module, layout: Layout) -> list[str]:
    """Return the names of the normalisations over the hidden size, those in blocks first.

    Args:
        model: the model with this layout, or its pruned student.
        layout: layout of the larger model.
    """
    names = []
    for name, module in model.named_modules():
        dimensions = layout.dimensions.get(f"{name}.weight", ())
        weight = getattr(module, "weight", None)
        is_vector = isinstance(weight, Tensor) and weight.ndim == 1
        is_norm = is_vector and "norm" in type(module).__name__.lower()
        if is_norm and any(d.size == "hidden" for d in dimensions):
            names.append(name)
    return sorted(names, key=lambda name: layout.layer_of(name) is None)


@torch.no_grad()
def _restore_scales(model: nn.Module, student: nn.Module, slicer: Slicer) -> None:
    """Compensate for factors that depend on the hidden size D, of which D' channels remain.

    The root mean square over D' channels is larger by sqrt(D / D') if the others are zero, so the
    weights of normalisations are multiplied by this factor. Some models (Gemma) multiply embeddings
    by a function of D: the factor is measured, the embedding multiplied by it, and, if the head is
    tied, the last normalisation divided by it.
    """
    hidden = slicer.kept.hidden
    assert hidden is not None
    growth = (slicer.layout.sizes.hidden / len(hidden)) ** 0.5
    modules = dict(student.named_modules())
    names = norms_of(student, slicer.layout)
    for name in names:
        _multiply_norm(modules[name], growth)
    probe = probe_tokens(student)
    wide = _first_inputs(model, slicer.layout, probe)[..., hidden.to(_device(model))].cpu().float()
    narrow = _first_inputs(student, slicer.layout, probe).float()
    factor = float((wide * narrow).sum() / (narrow * narrow).sum())
    if not torch.allclose(wide, factor * narrow, rtol=2e-2, atol=1e-3 * float(wide.abs().max())):
        raise ShrinkError(
            f"{type(model).__name__}: a smaller hidden size changes the output of its embedding by "
            "more than a constant factor, so the hidden size cannot be pruned. Prune layers, heads "
            "or channels"
        )
    if abs(factor - 1.0) < 1e-3:
        return
    embedding: Any = student.get_input_embeddings()  # type: ignore[operator]
    head: Any = student.get_output_embeddings()  # type: ignore[operator]
    embedding.weight.mul_(factor)
    if head.weight is embedding.weight:
        _multiply_norm(modules[names[-1]], 1.0 / factor)


def _multiply_norm(norm: nn.Module, factor: float) -> None:
    weight: Any = norm.weight
    if _adds_one(norm):
        weight.add_(1.0).mul_(factor).sub_(1.0)
    else:
        weight.mul_(factor)


def _adds_one(norm: nn.Module) -> bool:
    """Return whether a normalisation multiplies by 1 + weight (Gemma) instead of its weight."""
    weight: Any = norm.weight
    before = weight.clone()
    x = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype)[None]
    weight.zero_()
    without = norm(x)
    if getattr(norm, "bias", None) is not None:
        without = without - norm.bias
    weight.copy_(before)
    return bool(without.abs().max() > 0)


class _StopForwardError(Exception):
    """Exception that ends a forward pass at the first block."""


def _first_inputs(model: nn.Module, layout: Layout, probe: Tensor) -> Tensor:
    """Return the input [1, L, D] to a model's first block for the tokens `probe` [1, L]."""
    inputs: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        raise _StopForwardError

    first = layout.blocks_of(model)[0]
    with suppress(_StopForwardError), first.register_forward_pre_hook(record, with_kwargs=True):
        model(input_ids=probe.to(_device(model)), use_cache=False)
    return inputs[0]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _runs(numbers: Tensor, length: int) -> Tensor:
    """Return the indices of units; unit i has the indices i * length to (i + 1) * length - 1."""
    return (numbers[:, None] * length + torch.arange(length)).flatten()


def _in_blocks(numbers: Tensor, total: int, repeats: int) -> Tensor:
    """Return the units' indices in all of `repeats` consecutive blocks of `total` indices each."""
    return torch.cat([numbers + block * total for block in range(repeats)])
