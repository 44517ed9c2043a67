"""Determine which dimensions of a model's tensors depend on which size of its configuration.

Models without data (on torch's "meta" device) are created by the model's class with another value
of one size; the dimensions that change in proportion depend on that size. In GPT-2, heads and
hidden size are found by the names of the tensors instead. The order of rows in fused projections
cannot be determined from shapes; `slicing.order_of` tries the possible orders.
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
"""Name of a size: hidden size, number of MLP channels per layer, or number of groups of attention
heads; the heads in a group share keys and values."""

Order = Literal["concatenated", "interleaved"]
"""Order of the rows in a fused projection: all queries, all keys, all values; or group by group."""

_CHANNEL_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")


@dataclass(frozen=True)
class Dimension:
    """Tensor dimension whose length depends on one of a model's sizes.

    Args:
        size: name of the size.
        dim: index of the dimension in the tensor's shape.
        repeats: length of the dimension per unit of the size, such as the rows per group of heads,
            or 2 for fused gate and up projections.
    """

    size: Size
    dim: int
    repeats: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Args:
        layers: number of transformer blocks.
        hidden: width of the residual stream.
        channels: number of MLP channels per layer.
        heads: number of query heads per layer.
        groups: number of key-value heads per layer, each shared by heads / groups query heads.
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
        """Number of query heads that share one key-value head."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Layout:
    """Description of how a model's tensors depend on the sizes in its configuration.

    Args:
        sizes: sizes of the model.
        layers: name of the list of blocks, as in "model.layers".
        dimensions: dimensions that depend on a size, by the tensor's name in the state dict.
        coupled: whether hidden size and heads can only be pruned together, as in GPT-2, where the
            width of a head is the hidden size divided by the number of heads.
        fused: names of the tensors that contain queries, keys and values.
    """

    sizes: Sizes
    layers: str
    dimensions: Mapping[str, tuple[Dimension, ...]]
    coupled: bool
    fused: frozenset[str]

    def follows(self, size: Size) -> bool:
        """Return whether any tensor depends on a size."""
        return any(d.size == size for found in self.dimensions.values() for d in found)

    def blocks_of(self, model: nn.Module) -> nn.ModuleList:
        """Return the list of blocks in a model with this layout, or in its pruned student."""
        return model.get_submodule(self.layers)  # type: ignore[return-value]

    def layer_of(self, name: str) -> int | None:
        """Return the index of the block that contains a tensor or module; None if no block does."""
        found = re.match(re.escape(self.layers) + r"\.(\d+)\.", name + ".")
        return int(found[1]) if found else None


def sizes_of(model: nn.Module) -> Sizes:
    """Return the sizes in a model's configuration.

    Sizes that the configuration lacks have the defaults channels = 4 * hidden, groups = heads and
    head_dim = hidden // heads.

    Args:
        model: a transformers language model.

    Raises:
        ShrinkError: If the configuration lacks the number of blocks, the hidden size or the
            number of heads, or a size differs between blocks.
    """
    config = text_config(model.config)
    try:
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        layers = int(config.num_hidden_layers)
    except (AttributeError, TypeError) as error:
        raise ShrinkError(
            f"{type(model).__name__}: its configuration lacks num_hidden_layers, hidden_size or "
            "num_attention_heads, which pruning needs. Use a tool for its architecture"
        ) from error
    try:
        channels = int(getattr(config, _channels_name(config), None) or 4 * hidden)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    except TypeError as error:
        raise ShrinkError(
            f"{type(model).__name__}: {_channels_name(config)}, num_key_value_heads or head_dim in "
            "its configuration is not a number. Pruning needs one size for all layers; use a tool "
            "for its architecture"
        ) from error
    return Sizes(layers, hidden, channels, heads, groups, head_dim)


def layout_of(model: nn.Module) -> Layout:
    """Determine how a model's tensors depend on the sizes of its configuration.

    Args:
        model: a transformers language model.

    Raises:
        ShrinkError: If the configuration lacks sizes, or the list of blocks cannot be identified.
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
    # some configurations accept only a hidden size that is a multiple of the heads
    step = sizes.heads if sizes.hidden % sizes.heads == 0 else 1
    for name, dim, full, less in _changes(model, shapes, {"hidden": sizes.hidden - step}):
        if full == (full - less) // step * sizes.hidden:
            found.setdefault(name, []).append(Dimension("hidden", dim, (full - less) // step))
    return Layout(sizes, layers, _frozen(found), coupled, frozenset(fused))


def resized(model: nn.Module, sizes: Mapping[str, int], *, layers: list[int] | None = None) -> Any:
    """Return a copy of a model's configuration with other sizes.

    Args:
        model: model whose configuration is copied.
        sizes: new values of `hidden`, `channels`, `heads` and `groups`, by name.
        layers: indices of the retained blocks; None for all. Lists with one value per block, such
            as attention types, are shortened in the same way.
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
        # None means four times the hidden size in GPT-2
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
    """Return (tensor, dimension, old length, new length) per dimension that `sizes` changes.

    The list is empty if the model cannot be created with these sizes.
    """
    try:
        with torch.device("meta"):
            other: nn.Module = type(model)(resized(model, sizes))
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError, AttributeError):
        return []  # the architecture does not support a change of these sizes alone
    changed = []
    for name, tensor in other.state_dict().items():
        for dim, (full, less) in enumerate(zip(shapes.get(name, ()), tensor.shape, strict=False)):
            if full != less:
                changed.append((name, dim, full, less))
    return changed


def _channels_name(config: Any) -> str:
    """Return the name of the field for MLP channels; "intermediate_size" if none is known."""
    return next((name for name in _CHANNEL_NAMES if hasattr(config, name)), _CHANNEL_NAMES[0])


def _blocks(model: nn.Module, layers: int) -> str:
    """Return the name of the list of blocks: the first module list of length `layers`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return str(name)
    raise ShrinkError(
        f"{type(model).__name__} contains no list of {layers} blocks, so its layers cannot be "
        "identified. Use a tool for its architecture"
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
    """Add GPT-2's dimensions of heads and hidden size, which its shapes do not distinguish."""
    for name, shape in shapes.items():
        dimensions = found.setdefault(name, [])
        taken = {d.dim for d in dimensions}
        within_block = name.removeprefix(layers + ".").partition(".")[2]
        if within_block in ("attn.c_attn.weight", "attn.c_attn.bias"):  # [inputs, outputs]
            dim = len(shape) - 1
            dimensions.append(Dimension("groups", dim, 3 * sizes.head_dim))
            taken.add(dim)
            fused.add(name)
        elif within_block == "attn.c_proj.weight":
            dimensions.append(Dimension("groups", 0, sizes.head_dim))
            taken.add(0)
        for dim, length in enumerate(shape):
            # n_positions or the vocabulary size may equal the hidden size, so outside of the
            # blocks only the last dimension is assumed to depend on the hidden size
            is_hidden = name.startswith(layers) or dim == len(shape) - 1
            if dim not in taken and length == sizes.hidden and is_hidden:
                dimensions.append(Dimension("hidden", dim, 1))


def _frozen(found: dict[str, list[Dimension]]) -> dict[str, tuple[Dimension, ...]]:
    return {name: tuple(dimensions) for name, dimensions in found.items() if dimensions}
