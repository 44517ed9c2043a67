"""`SparseTargets`: the one value that flows from samplers through the cache to the loss.

Ragged targets in compressed-row form. Position j owns entries `offsets[j]:offsets[j + 1]`; an
entry is a vocabulary id with a weight that estimates the teacher's probability of that id.
Weights are never renormalised behind the caller's back: an unbiased target's mass is one only in
expectation, and dividing by it would bias it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from operator import index
from typing import NamedTuple, SupportsIndex, overload

import torch
from torch import Tensor

from sparselogits.errors import InvalidTargetsError
from sparselogits.wording import counted, significant


class Entries(NamedTuple):
    """The entries of one position.

    Args:
        ids: int64 [K], strictly ascending.
        weights: float32 [K].
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Sparse teacher targets for P positions, E entries in all.

    `targets[j]` is the ids and weights of position j, `targets[a:b]` the targets of a run of
    positions.

    Args:
        ids: int64 [E], strictly ascending within a position, each in [0, vocab_size).
        weights: float32 [E], non-negative estimates of the teacher's probabilities.
        offsets: int64 [P + 1], from 0 to E, never descending.
        vocab_size: number of columns of the teacher's head.
        counts: int32 [E], how many of a position's rounds fell on the entry; None where the
            sampler draws no rounds.
        rounds: rounds per position, the sum of its counts; positions without entries (masked ones)
            are exempt. None where the sampler draws no rounds.
        check: skip validation where the caller has just established it (hot paths only).

    Raises:
        InvalidTargetsError: naming the first position that breaks an invariant.

    Examples:
        Two positions; the first has two entries, the second one:

        >>> import torch
        >>> targets = SparseTargets(
        ...     ids=torch.tensor([3, 7, 5]),
        ...     weights=torch.tensor([0.75, 0.25, 1.0]),
        ...     offsets=torch.tensor([0, 2, 3]),
        ...     vocab_size=10,
        ... )
        >>> targets
        SparseTargets(2 positions, 3 entries, 1.5 per position, mean mass 1.000, 10 ids)
        >>> ids, weights = targets[0]
        >>> ids.tolist(), weights.tolist()
        ([3, 7], [0.75, 0.25])
        >>> targets.dense().shape
        torch.Size([2, 10])
    """

    ids: Tensor
    weights: Tensor
    offsets: Tensor
    vocab_size: int
    _: KW_ONLY
    counts: Tensor | None = None
    rounds: int | None = None
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if check:
            _validate(self)

    def __len__(self) -> int:
        """Number of positions P."""
        return self.offsets.numel() - 1

    def __repr__(self) -> str:
        parts = [counted(len(self), "position"), counted(self.entries, "entry")]
        if len(self):
            parts.append(f"{significant(self.entries / len(self))} per position")
            owned = self.entries_per_position > 0
            if bool(owned.any()):
                parts.append(f"mean mass {float(self.mass()[owned].mean()):.3f}")
        parts.append(counted(self.vocab_size, "id"))
        if self.rounds is not None:
            parts.append(counted(self.rounds, "round"))
        device = self.ids.device.type
        return f"SparseTargets({', '.join(parts)}{'' if device == 'cpu' else f', on {device}'})"

    @overload
    def __getitem__(self, positions: SupportsIndex) -> Entries: ...
    @overload
    def __getitem__(self, positions: slice) -> SparseTargets: ...
    def __getitem__(self, positions: SupportsIndex | slice) -> Entries | SparseTargets:
        """Ids and weights of one position, or targets of a contiguous run, as views."""
        if not isinstance(positions, slice):
            position = index(positions)
            if not -len(self) <= position < len(self):
                raise IndexError(f"position {position} of {len(self)}")
            position %= len(self)
            own = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
            return Entries(self.ids[own], self.weights[own])
        start, stop, step = positions.indices(len(self))
        if step != 1:
            raise InvalidTargetsError(
                f"positions are sliced with step 1, not {step}; gather windows instead"
            )
        stop = max(start, stop)
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return SparseTargets(
            self.ids[first:last],
            self.weights[first:last],
            self.offsets[start : stop + 1] - first,
            self.vocab_size,
            counts=None if self.counts is None else self.counts[first:last],
            rounds=self.rounds,
            check=False,
        )

    @property
    def entries(self) -> int:
        """Number of entries E."""
        return self.ids.numel()

    @property
    def entries_per_position(self) -> Tensor:
        """int64 [P]."""
        return self.offsets.diff()

    @property
    def positions(self) -> Tensor:
        """int64 [E]: the position that owns each entry."""
        index = torch.arange(len(self), device=self.offsets.device)
        return index.repeat_interleave(self.entries_per_position, output_size=self.entries)

    def mass(self) -> Tensor:
        """float32 [P]: sum of a position's weights (one in expectation for unbiased targets)."""
        total = torch.zeros(len(self), dtype=self.weights.dtype, device=self.weights.device)
        return total.index_add_(0, self.positions, self.weights)

    def dense(self) -> Tensor:
        """Return the targets as float32 [P, V]; for tests and small vocabularies only."""
        full = self.weights.new_zeros(len(self), self.vocab_size)
        full[self.positions, self.ids] = self.weights
        return full

    def padded(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Rectangular form.

        Args:
            width: K; the largest number of entries of a position when None.

        Returns:
            ids int64 [P, K] and weights float32 [P, K]; padding has id 0 and weight 0.

        Raises:
            InvalidTargetsError: when a position has more than `width` entries; cutting would bias.
        """
        lengths = self.entries_per_position
        longest = int(lengths.max()) if len(self) else 0
        if width is None:
            width = longest
        elif width < longest:
            raise InvalidTargetsError(
                f"a position has {longest} entries, more than width={width}; cutting it would bias "
                f"the target: pass width >= {longest}, or thin the targets first"
            )
        column = torch.arange(self.entries, device=self.ids.device) - self.offsets[
            :-1
        ].repeat_interleave(lengths, output_size=self.entries)
        ids = self.ids.new_zeros(len(self), width)
        weights = self.weights.new_zeros(len(self), width)
        ids[self.positions, column] = self.ids
        weights[self.positions, column] = self.weights
        return ids, weights

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """The same targets on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return SparseTargets(
            move(self.ids),
            move(self.weights),
            move(self.offsets),
            self.vocab_size,
            counts=None if self.counts is None else move(self.counts),
            rounds=self.rounds,
            check=False,
        )

    @staticmethod
    def cat(parts: Sequence[SparseTargets]) -> SparseTargets:
        """Positions of several targets, one after another.

        Raises:
            InvalidTargetsError: for an empty sequence, or parts of different vocabulary or rounds.
        """
        if not parts:
            raise InvalidTargetsError("nothing to concatenate: pass at least one SparseTargets")
        first = parts[0]
        for part in parts:
            if (part.vocab_size, part.rounds) != (first.vocab_size, first.rounds):
                raise InvalidTargetsError(
                    "targets to concatenate differ: vocab_size and rounds are "
                    f"({first.vocab_size}, {first.rounds}) and ({part.vocab_size}, {part.rounds})"
                )
            if (part.counts is None) != (first.counts is None):
                raise InvalidTargetsError("targets to concatenate differ: only some carry counts")
        lengths = torch.cat([part.entries_per_position for part in parts])
        counts = [part.counts for part in parts if part.counts is not None]
        return SparseTargets(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.weights for part in parts]),
            offsets_from_lengths(lengths),
            first.vocab_size,
            counts=torch.cat(counts) if counts else None,
            rounds=first.rounds,
            check=False,
        )

    def thin(self, rounds: int, starts: Tensor | int) -> SparseTargets:
        """Keep `rounds` of each position's ordered rounds, evenly spaced, from a given start.

        Where `rounds` divides `self.rounds` this keeps every k-th round, k = self.rounds / rounds:
        of a systematic draw again a systematic draw, and the k starts partition the cached rounds.
        For other ratios round r is kept when (r * rounds - g * start) mod self.rounds < rounds,
        with g their greatest common divisor: gaps of two neighbouring lengths, no longer exactly
        systematic. Either way each round is kept by the same share of the starts, so that with a
        uniform start the result is unbiased, and averaging over all starts gives back these
        targets.

        Args:
            rounds: rounds to keep a position, at most `self.rounds`.
            starts: int or int64 [P], in [0, thinning_choices(self.rounds, rounds)).

        Raises:
            InvalidTargetsError: when the targets carry no counts, there are fewer than `rounds`
                rounds, or a start lies outside its range.
        """
        if self.counts is None or self.rounds is None:
            raise InvalidTargetsError(
                "only targets drawn in rounds can be thinned; these carry no counts "
                "(top-k, top-p and threshold targets do not)"
            )
        choices = thinning_choices(self.rounds, rounds)
        start = torch.as_tensor(starts, dtype=torch.int64, device=self.ids.device).expand(len(self))
        if len(self) and not bool(((start >= 0) & (start < choices)).all()):
            raise InvalidTargetsError(
                f"starts must lie in [0, {choices}) to thin {self.rounds} rounds to {rounds}, "
                f"found {int(start.min())} to {int(start.max())}"
            )
        cached, positions, counts = self.rounds, self.positions, self.counts.long()
        after = _running_sum_within(counts, self.offsets, positions)
        shift = (start * (cached // choices))[positions]

        def kept_up_to(end: Tensor) -> Tensor:
            # How many rounds r < end are kept, up to a constant: the indicator above is
            # floor((r rounds - shift) / N) - floor(((r - 1) rounds - shift) / N), and telescopes.
            return ((end - 1) * rounds - shift).div(cached, rounding_mode="floor")

        kept = kept_up_to(after) - kept_up_to(after - counts)
        alive = kept > 0
        lengths = torch.zeros_like(self.offsets[1:]).index_add_(0, positions, alive.long())
        scale = (kept * cached).double() / (counts * rounds).double()
        return SparseTargets(
            self.ids[alive],
            (self.weights * scale)[alive].to(self.weights.dtype),
            offsets_from_lengths(lengths),
            self.vocab_size,
            counts=kept[alive].to(torch.int32),
            rounds=rounds,
            check=False,
        )


def thinning_choices(cached: int, kept: int) -> int:
    """How many starts there are to thin `cached` rounds to `kept`: cached / gcd(cached, kept).

    Raises:
        InvalidTargetsError: unless 1 <= kept <= cached.
    """
    if not 1 <= kept <= cached:
        raise InvalidTargetsError(
            f"cannot thin {cached} rounds to {kept}: keep at least 1 and at most {cached}"
        )
    return cached // math.gcd(cached, kept)


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Return the offsets, int64 [P + 1], of rows with the given lengths, int64 [P]."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def _running_sum_within(values: Tensor, offsets: Tensor, positions: Tensor) -> Tensor:
    """Inclusive prefix sums int64 [E] that start anew at each position."""
    total = values.cumsum(0)
    before = torch.cat([total.new_zeros(1), total])[offsets[:-1]]
    return total - before[positions]


def _validate(targets: SparseTargets) -> None:
    expected = {"ids": torch.int64, "weights": torch.float32, "offsets": torch.int64}
    if targets.counts is not None:
        expected["counts"] = torch.int32
    for name, dtype in expected.items():
        tensor = getattr(targets, name)
        if tensor.dtype != dtype or tensor.dim() != 1:
            raise InvalidTargetsError(
                f"{name} must be a {dtype} vector, found {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    if (targets.counts is None) != (targets.rounds is None):
        raise InvalidTargetsError("counts and rounds come together: pass both or neither")
    if targets.vocab_size < 1:
        raise InvalidTargetsError(f"vocab_size must be positive, found {targets.vocab_size}")
    _validate_offsets(targets)
    _validate_entries(targets)


def _validate_offsets(targets: SparseTargets) -> None:
    offsets, entries = targets.offsets, targets.ids.numel()
    if offsets.numel() < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != entries:
        raise InvalidTargetsError(
            f"offsets must start at 0 and end at the number of entries, {entries}; found "
            f"{offsets[:1].tolist()} ... {offsets[-1:].tolist()}"
        )
    if bool((offsets.diff() < 0).any()):
        position = int((offsets.diff() < 0).nonzero()[0])
        raise InvalidTargetsError(f"offsets descend at position {position}")
    for name in ("weights", "counts"):
        tensor = getattr(targets, name)
        if tensor is not None and tensor.numel() != entries:
            raise InvalidTargetsError(f"{entries} ids, but {tensor.numel()} {name}")


def _validate_entries(targets: SparseTargets) -> None:
    ids, weights, positions = targets.ids, targets.weights, targets.positions

    def require(good: Tensor, values: Tensor, what: str) -> None:
        if not bool(good.all()):
            entry = int((~good).nonzero()[0])
            raise InvalidTargetsError(
                f"position {int(positions[entry])}: {what.format(values[entry].item())}"
            )

    inside = (ids >= 0) & (ids < targets.vocab_size)
    require(inside, ids, f"id {{}} lies outside the vocabulary of {targets.vocab_size}")
    sound = weights.isfinite() & (weights >= 0)
    require(sound, weights, "weight {} is not a finite non-negative number")
    same = positions[1:] == positions[:-1]
    ascending = torch.ones_like(ids, dtype=torch.bool)
    ascending[1:] = ~same | (ids[1:] > ids[:-1])
    require(ascending, ids, "id {} repeats or breaks the ascending order")
    if targets.counts is None:
        return
    require(targets.counts > 0, targets.counts, "count {} is not positive")
    drawn = torch.zeros(len(targets), dtype=torch.int64, device=ids.device)
    drawn.index_add_(0, positions, targets.counts.long())
    wrong = (drawn != targets.rounds) & (targets.entries_per_position > 0)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        raise InvalidTargetsError(
            f"position {position}: counts sum to {int(drawn[position])}, not to the "
            f"{targets.rounds} rounds"
        )
