"""Select the blocks, MLP channels, groups of heads and hidden channels that a student retains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparselogits.errors import ShrinkError
from sparselogits.shrink.layout import Layout, Sizes


@dataclass(frozen=True)
class ShrinkTarget:
    """Requested sizes of a student; None for the teacher's size.

    Args:
        layers: number of transformer blocks.
        drop_layers: indices of the blocks to remove, counted from 0, instead of `layers`.
        channels: number of MLP channels per layer (`intermediate_size`).
        heads: number of query heads per layer (`num_attention_heads`). Heads that share keys and
            values are removed together; give a multiple of the query heads per key-value head.
        hidden: width of the residual stream (`hidden_size`).
    """

    layers: int | None = None
    drop_layers: tuple[int, ...] | None = None
    channels: int | None = None
    heads: int | None = None
    hidden: int | None = None

    def require_possible(self, layout: Layout, architecture: str) -> ShrinkTarget:
        """Validate the sizes against a model, and compute sizes that depend on others.

        Args:
            layout: layout of the teacher.
            architecture: name of the teacher's class, for errors.

        Returns:
            The target; if the model couples hidden size and heads, with both or neither set.

        Raises:
            ShrinkError: If sizes are out of range or contradict each other, or the architecture
                does not support them.
        """
        sizes = layout.sizes
        if self.layers is not None and self.drop_layers is not None:
            raise ShrinkError("layers and drop_layers are both given; give only one of them")
        _require_within("layers", self.layers, sizes.layers)
        _require_within("channels", self.channels, sizes.channels)
        _require_within("heads", self.heads, sizes.heads)
        _require_within("hidden", self.hidden, sizes.hidden)
        dropped = self.drop_layers or ()
        wrong = [n for n in dropped if not 0 <= n < sizes.layers]
        if wrong or len(set(dropped)) != len(dropped) or len(dropped) >= sizes.layers:
            raise ShrinkError(
                f"drop_layers={list(dropped)}; give fewer than {sizes.layers} distinct indices "
                f"from 0 to {sizes.layers - 1}"
            )
        target = self._coupled(sizes) if layout.coupled else self
        if target.heads is not None and target.heads % sizes.heads_per_group:
            raise ShrinkError(
                f"heads={target.heads}: in {architecture} {sizes.heads_per_group} heads share "
                f"keys and values and are removed together; give a multiple of "
                f"{sizes.heads_per_group}"
            )
        for value, size, name in (
            (target.channels, "channels", "MLP channels"),
            (target.heads, "groups", "attention heads"),
            (target.hidden, "hidden", "the hidden size"),
        ):
            if value is not None and not layout.follows(size):  # type: ignore[arg-type]
                raise ShrinkError(
                    f"{architecture}: {name} cannot be pruned, because the tensors that depend on "
                    "this size could not be determined. Prune only its layers, or use a tool for "
                    "its architecture"
                )
        return target

    def _coupled(self, sizes: Sizes) -> ShrinkTarget:
        """Return the target with hidden size or heads computed if only the other one is given."""
        hidden, heads = self.hidden, self.heads
        if hidden is None and heads is None:
            return self
        if hidden is None:
            assert heads is not None
            hidden = heads * sizes.head_dim
        if heads is None:
            heads = hidden // sizes.head_dim
        if heads * sizes.head_dim != hidden:
            raise ShrinkError(
                f"hidden={hidden} and heads={heads}: in this architecture the hidden size is "
                f"heads * {sizes.head_dim}; give only one of them, or matching values"
            )
        return replace(self, hidden=hidden, heads=heads)


@dataclass(frozen=True)
class Kept:
    """Ascending indices of the teacher's blocks, channels and heads that the student retains.

    Args:
        layers: indices of the blocks.
        channels: indices of the MLP channels, int64 [channels] per retained block; None for all.
        groups: indices of the head groups, int64 [groups] per retained block; None for all.
        hidden: indices of the residual stream's channels, int64 [hidden]; None for all.
    """

    layers: tuple[int, ...]
    channels: tuple[Tensor, ...] | None = None
    groups: tuple[Tensor, ...] | None = None
    hidden: Tensor | None = None

    def first(self, layers: int) -> Kept:
        """Return a copy with only the first `layers` of the retained blocks."""
        return Kept(
            self.layers[:layers],
            None if self.channels is None else self.channels[:layers],
            None if self.groups is None else self.groups[:layers],
            self.hidden,
        )

    def sizes(self, layout: Layout) -> dict[str, int]:
        """Return the student's sizes that pruning sets, except the number of blocks, by name."""
        found = {}
        if self.channels is not None:
            found["channels"] = len(self.channels[0])
        if self.groups is not None:
            found["groups"] = len(self.groups[0])
            found["heads"] = found["groups"] * layout.sizes.heads_per_group
        if self.hidden is not None:
            found["hidden"] = len(self.hidden)
        return found


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest of N scores, int64 [count], ascending.

    Among equal scores, those with the smallest indices are selected.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def kept_layers(
    target: ShrinkTarget, total: int, influence: Sequence[float] | None
) -> tuple[int, ...]:
    """Return the indices of the blocks to retain, ascending.

    Args:
        target: requested sizes.
        total: number of blocks in the teacher.
        influence: score of each block, larger for blocks to retain; None if not required.
    """
    if target.drop_layers is not None:
        return tuple(n for n in range(total) if n not in target.drop_layers)
    if target.layers is None or target.layers == total:
        return tuple(range(total))
    assert influence is not None
    return tuple(largest(torch.tensor(influence), target.layers).tolist())


def _require_within(name: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise ShrinkError(f"{name}={value}; give a number from 1 to the teacher's {most}")
