"""Find which dimensions of a model's tensors follow which size of its configuration.

Nothing here knows the names of an architecture's modules. The model's class is asked instead: two
empty models (on torch's "meta" device, which holds shapes and no data) that differ in one size of
the configuration show which dimensions of which tensors follow that size. The order of rows in
fused projections, which shapes do not show, is found by trying (`slicing.order_of`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparselogits.errors import ShrinkError
from sparselogits.language_model import text_config

Size = Literal["hidden", "channels", "groups"]
"""Hidden size, MLP channels per layer, or groups of attention heads that share keys and values."""

Order = Literal["concatenated", "interleaved"]
"""Rows of a fused projection: all queries, then all keys, then all values; or group by group."""

_CHANNEL_NAMES = ("intermediate_size", "n_inner", "ffn_dim")


@dataclass(frozen=True)
class Dimension:
    """One dimension of one tensor that follows a size.

    Args:
        size: the size that the dimension follows.
        dim: number of the dimension in the tensor.
        repeats: how many indices belong to one unit of the size (rows per group of heads, fused
            gate and up projections).
    """

    size: Size
    dim: int
    repeats: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that can be pruned.

    Args:
        layers: transformer blocks.
        hidden: width of the residual stream.
        channels: MLP channels per layer.
        heads: attention heads per layer.
        groups: key-value heads per layer; each is shared by heads / groups query heads.
        head_dim: width of a head.
    """

    layers: int
    hidden: int
    channels: int
    heads: int
    groups: int
    head_dim: int

    @property
    def heads_per_group(self) -> int:
        """Return the number of query heads that share one key-value head."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Layout:
    """A description of how a model's tensors follow its configuration.

    Args:
        sizes: the model's sizes.
        layers: name of the list of blocks, as in "model.layers".
        dimensions: by tensor name, as in the state dict; tensors that follow no size are absent.
        coupled: hidden size and heads can only be pruned together (GPT-2: the width of a head is
            the hidden size over the number of heads).
        fused: names of the tensors that hold queries, keys and values in one.
    """

    sizes: Sizes
    layers: str
    dimensions: Mapping[str, tuple[Dimension, ...]]
    coupled: bool
    fused: frozenset[str]

    def follows(self, size: Size) -> bool:
        """Return whether any tensor follows a size."""
        return any(d.size == size for found in self.dimensions.values() for d in found)

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the blocks of the model that this describes, or of a smaller one made from it."""
        return model.get_submodule(self.layers)  # type: ignore[return-value]

    def layer_of(self, name: str) -> int | None:
        """Return the number of the block that a tensor or module is in; None outside the blocks."""
        found = re.match(re.escape(self.layers) + r"\.(\d+)\.", name + ".")
        return int(found[1]) if found else None


def sizes_of(model: nn.Module) -> Sizes:
    """Read a model's sizes from its configuration.

    Raises:
        ShrinkError: the configuration does not state them.
    """
    config = text_config(model.config)
    try:
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        layers = int(config.num_hidden_layers)
    except (AttributeError, TypeError) as error:
        raise ShrinkError(
            f"{type(model).__name__}: its configuration does not state num_hidden_layers, "
            "hidden_size and num_attention_heads, which pruning needs. Prune this model with a "
            "tool made for its architecture"
        ) from error
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Sizes(
        layers=layers,
        hidden=hidden,
        channels=int(getattr(config, _channels_name(config), None) or 4 * hidden),
        heads=heads,
        groups=int(groups),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
    )


def layout_of(model: nn.Module) -> Layout:
    """Find how a model's tensors follow its configuration.

    Args:
        model: a transformers causal language model.

    Raises:
        ShrinkError: the blocks of the model cannot be found.
    """
    sizes = sizes_of(model)
    layers = _blocks(model, sizes.layers)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, list[Dimension]] = {}
    fused: set[str] = set()
    step = sizes.channels // 2
    for name, dim, full, less in _changes(model, shapes, {"channels": sizes.channels - step}):
        if less and (full - less) % step == 0 and full == (full - less) // step * sizes.channels:
            found.setdefault(name, []).append(Dimension("channels", dim, (full - less) // step))
    coupled = _is_gpt2(model)
    if coupled:
        _add_gpt2(found, fused, shapes, sizes, layers)
        return Layout(sizes, layers, _frozen(found), coupled, frozenset(fused))
    if sizes.groups > 1:
        one = (sizes.heads_per_group + 2) * sizes.head_dim
        fewer = {"heads": sizes.heads - sizes.heads_per_group, "groups": sizes.groups - 1}
        for name, dim, full, less in _changes(model, shapes, fewer):
            if full == (full - less) * sizes.groups:
                found.setdefault(name, []).append(Dimension("groups", dim, full - less))
                if full - less == one:
                    fused.add(name)
    # a multiple of the heads, because some configurations refuse other widths
    narrow = sizes.heads if sizes.hidden % sizes.heads == 0 else 1
    for name, dim, full, less in _changes(model, shapes, {"hidden": sizes.hidden - narrow}):
        if full == (full - less) // narrow * sizes.hidden:
            found.setdefault(name, []).append(Dimension("hidden", dim, (full - less) // narrow))
    return Layout(sizes, layers, _frozen(found), coupled, frozenset(fused))


def resized(model: nn.Module, sizes: Mapping[str, int], *, layers: list[int] | None = None) -> Any:
    """Return a copy of a model's configuration with other sizes.

    Args:
        model: model whose configuration is copied.
        sizes: new values of `hidden`, `channels`, `heads` and `groups`.
        layers: numbers of the blocks kept; all of them when None. Lists with one value per block
            (kinds of attention, for example) are shortened in the same way.
    """
    config = copy.deepcopy(model.config)
    text = text_config(config)
    before = sizes_of(model)
    if layers is not None:
        for name, value in list(vars(text).items()):
            if isinstance(value, list | tuple) and len(value) == before.layers:
                setattr(text, name, type(value)(value[i] for i in layers))
        text.num_hidden_layers = len(layers)
    if "channels" in sizes:
        setattr(text, _channels_name(text), sizes["channels"])
    if ("hidden" in sizes or "heads" in sizes) and not _is_gpt2(model):
        text.head_dim = before.head_dim
    if "hidden" in sizes:
        text.hidden_size = sizes["hidden"]
        # GPT-2 writes "four times the hidden size" as None
        if "channels" not in sizes and getattr(text, _channels_name(text), 0) is None:
            setattr(text, _channels_name(text), before.channels)
    if "heads" in sizes:
        text.num_attention_heads = sizes["heads"]
    if "groups" in sizes and getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = sizes["groups"]
    return config


def _changes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], sizes: dict[str, int]
) -> list[tuple[str, int, int, int]]:
    """Return (tensor, dimension, length, other length) of every dimension that the sizes change."""
    try:
        with torch.device("meta"):
            other: nn.Module = type(model)(resized(model, sizes))
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError, AttributeError):
        return []  # not a size this architecture can vary on its own
    changed = []
    for name, tensor in other.state_dict().items():
        for dim, (full, less) in enumerate(zip(shapes.get(name, ()), tensor.shape, strict=False)):
            if full != less:
                changed.append((name, dim, full, less))
    return changed


def _channels_name(config: Any) -> str:
    """Return the name of the number of MLP channels in a configuration."""
    return next((name for name in _CHANNEL_NAMES if hasattr(config, name)), _CHANNEL_NAMES[0])


def _blocks(model: nn.Module, layers: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return str(name)
    raise ShrinkError(
        f"{type(model).__name__}: no list of {layers} blocks was found in it, so its layers "
        "cannot be identified. Prune this model with a tool made for its architecture"
    )


def _is_gpt2(model: nn.Module) -> bool:
    return getattr(model.config, "model_type", "") == "gpt2"


def _add_gpt2(
    found: dict[str, list[Dimension]],
    fused: set[str],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
    layers: str,
) -> None:
    """Add GPT-2's dimensions, where shapes alone do not distinguish heads from the hidden size.

    transformers' GPT-2 stores weights as [inputs, outputs].
    """
    for name, shape in shapes.items():
        own = found.setdefault(name, [])
        taken = {d.dim for d in own}
        kind = name.removeprefix(layers + ".").partition(".")[2]
        if kind in ("attn.c_attn.weight", "attn.c_attn.bias"):
            dim = len(shape) - 1
            own.append(Dimension("groups", dim, 3 * sizes.head_dim))
            taken.add(dim)
            fused.add(name)
        elif kind == "attn.c_proj.weight":
            own.append(Dimension("groups", 0, sizes.head_dim))
            taken.add(0)
        for dim, length in enumerate(shape):
            # n_positions or the vocabulary may be as large as the hidden size: only last
            # dimensions and inputs of the blocks' projections follow it
            inner = name.startswith(layers) or dim == len(shape) - 1
            if dim not in taken and length == sizes.hidden and inner:
                own.append(Dimension("hidden", dim, 1))


def _frozen(found: dict[str, list[Dimension]]) -> dict[str, tuple[Dimension, ...]]:
    return {name: tuple(dimensions) for name, dimensions in found.items() if dimensions}
