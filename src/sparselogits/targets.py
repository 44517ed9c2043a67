"""Define `SparseTargets`, the targets that samplers create, caches store and the loss uses.

Targets are ragged, in compressed-row form. The entries of position j are
`offsets[j]:offsets[j + 1]`; an entry is a vocabulary id with a weight that estimates the teacher's
probability of that id. No function renormalises the weights implicitly: the mass of an unbiased
target is one only in expectation, and dividing by the mass would bias the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from operator import index
from typing import NamedTuple, SupportsIndex, overload

import torch
from torch import Tensor

from sparselogits.errors import InvalidTargetsError
from sparselogits.wording import counted, significant


class Entries(NamedTuple):
    """Entries of one position.

    Args:
        ids: int64 [K], strictly ascending vocabulary ids.
        weights: float32 [K], estimates of the teacher's probabilities of the ids.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Sparse teacher targets for P positions with E entries in total.

    `targets[j]` returns the ids and weights of position j, and `targets[a:b]` the targets of
    positions a to b - 1.

    Args:
        ids: int64 [E], strictly ascending within a position, each in [0, vocab_size).
        weights: float32 [E], non-negative estimates of the teacher's probabilities.
        offsets: int64 [P + 1], non-decreasing from 0 to E.
        vocab_size: number V of the teacher's logits per position.
        counts: int32 [E], number of sampling rounds that drew each entry; None if the sampler does
            not draw in rounds.
        rounds: number of sampling rounds per position, equal to the sum of the position's counts
            unless the position has no entries (is masked); None if the sampler does not draw in
            rounds.
        check: whether to validate the arguments; False only for arguments that are known to be
            valid, where speed matters.

    Raises:
        InvalidTargetsError: an argument is invalid.

    Examples:
        The first of two positions has two entries, and the second has one:

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
        """Return the number of positions P."""
        return self.offsets.numel() - 1

    def __repr__(self) -> str:
        parts = [counted(len(self), "position"), counted(self.entries, "entry")]
        if len(self):
            parts.append(f"{significant(self.entries / len(self))} per position")
            filled = self.entries_per_position > 0
            if bool(filled.any()):
                parts.append(f"mean mass {float(self.mass()[filled].mean()):.3f}")
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
        """Return the entries of one position, or the targets of a slice of positions.

        The tensors of entries are views.

        Raises:
            IndexError: a position does not exist.
            InvalidTargetsError: a slice has a step other than 1.
        """
        if not isinstance(positions, slice):
            position = index(positions)
            if not -len(self) <= position < len(self):
                raise IndexError(f"position {position} is out of range for {len(self)} positions")
            position %= len(self)
            entries = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
            return Entries(self.ids[entries], self.weights[entries])
        start, stop, step = positions.indices(len(self))
        if step != 1:
            raise InvalidTargetsError(
                f"the slice of positions has step {step}; expected step 1. Index single positions, "
                "or concatenate slices by SparseTargets.cat"
            )
        stop = max(start, stop)
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return replace(
            self,
            ids=self.ids[first:last],
            weights=self.weights[first:last],
            offsets=self.offsets[start : stop + 1] - first,
            counts=None if self.counts is None else self.counts[first:last],
            check=False,
        )

    @property
    def entries(self) -> int:
        """Number of entries E."""
        return self.ids.numel()

    @property
    def entries_per_position(self) -> Tensor:
        """Number of entries at each position, int64 [P]."""
        return self.offsets.diff()

    @property
    def positions(self) -> Tensor:
        """Index of each entry's position, int64 [E]."""
        index = torch.arange(len(self), device=self.offsets.device)
        return index.repeat_interleave(self.entries_per_position, output_size=self.entries)

    def mass(self) -> Tensor:
        """Return the sum of each position's weights, float32 [P].

        The expected sum of an unbiased target is one; the sum is zero at masked positions.
        """
        total = torch.zeros(len(self), dtype=self.weights.dtype, device=self.weights.device)
        return total.index_add_(0, self.positions, self.weights)

    def dense(self) -> Tensor:
        """Return the weights of all ids as float32 [P, V], for tests and small vocabularies."""
        full = self.weights.new_zeros(len(self), self.vocab_size)
        full[self.positions, self.ids] = self.weights
        return full

    def padded(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Return ids and weights as rectangular tensors, padded to the same number of entries.

        Args:
            width: number K of columns; None for the largest number of entries at any position.

        Returns:
            ids int64 [P, K] and weights float32 [P, K]; padding has id 0 and weight 0.

        Raises:
            InvalidTargetsError: a position has more than `width` entries.
        """
        longest = int(self.entries_per_position.max()) if len(self) else 0
        if width is None:
            width = longest
        elif width < longest:
            raise InvalidTargetsError(
                f"a position has {longest} entries, more than width={width}; removing entries "
                f"would bias the target. Pass width >= {longest}, or thin the targets first"
            )
        positions = self.positions
        column = torch.arange(self.entries, device=self.ids.device) - self.offsets[positions]
        ids = self.ids.new_zeros(len(self), width)
        weights = self.weights.new_zeros(len(self), width)
        ids[positions, column] = self.ids
        weights[positions, column] = self.weights
        return ids, weights

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SparseTargets:
        """Return the targets on a device; `non_blocking` is passed to `torch.Tensor.to`."""
        names = ("ids", "weights", "offsets", *(() if self.counts is None else ("counts",)))
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        return replace(self, **moved, check=False)

    @staticmethod
    def cat(parts: Sequence[SparseTargets]) -> SparseTargets:
        """Concatenate targets along their positions.

        Args:
            parts: at least one SparseTargets, all with the same `vocab_size` and `rounds`.

        Raises:
            InvalidTargetsError: `parts` is empty, or its elements differ in `vocab_size`, `rounds`
                or the presence of counts.
        """
        if not parts:
            raise InvalidTargetsError("nothing to concatenate; pass at least one SparseTargets")
        first = parts[0]
        for part in parts:
            differing = None
            if (part.vocab_size, part.rounds) != (first.vocab_size, first.rounds):
                differing = (
                    f"vocab_size and rounds are ({first.vocab_size}, {first.rounds}) and "
                    f"({part.vocab_size}, {part.rounds})"
                )
            elif (part.counts is None) != (first.counts is None):
                differing = "only some have counts"
            if differing:
                raise InvalidTargetsError(
                    f"targets to concatenate differ: {differing}; concatenate targets of one "
                    "sampler only"
                )
        lengths = torch.cat([part.entries_per_position for part in parts])
        counts = [part.counts for part in parts if part.counts is not None]
        return replace(
            first,
            ids=torch.cat([part.ids for part in parts]),
            weights=torch.cat([part.weights for part in parts]),
            offsets=offsets_from_lengths(lengths),
            counts=torch.cat(counts) if counts else None,
            check=False,
        )

    @staticmethod
    def mixed(parts: Sequence[SparseTargets], weights: Sequence[float]) -> SparseTargets:
        """Return the weighted sum of targets for the same positions.

        Entries with the same id at one position are added. If each part m is an unbiased target for
        a distribution p_m, the result is an unbiased target for sum_m w_m p_m. If all parts that
        are not ignored have counts, the result has the sums of the counts and of the rounds, and
        can be thinned.

        Args:
            parts: targets for P positions each, masked at the same positions. Their vocabulary
                sizes may differ, because heads may be padded; the result has the largest.
            weights: non-negative weight of each part; parts with weight 0 are ignored.

        Raises:
            InvalidTargetsError: no part has a positive weight, or the parts that are not ignored
                differ in the number of positions.
            ValueError: the numbers of parts and weights differ.

        Examples:
            >>> import torch
            >>> def one(*ids: int) -> SparseTargets:
            ...     weight = torch.full((len(ids),), 1 / len(ids))
            ...     return SparseTargets(
            ...         torch.tensor(ids), weight, torch.tensor([0, len(ids)]), vocab_size=10
            ...     )
            >>> ids, weights = SparseTargets.mixed([one(3, 7), one(7)], [0.5, 0.5])[0]
            >>> ids.tolist(), weights.tolist()
            ([3, 7], [0.25, 0.75])
        """
        used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
        if len({len(part) for part, _ in used}) != 1:
            raise InvalidTargetsError(
                f"the parts with a positive weight have {[len(part) for part, _ in used]} "
                "positions; expected at least one part, all with the same number of positions. "
                "Give targets for the same windows"
            )
        first, weight = used[0]
        if len(used) == 1 and weight == 1:
            return first
        drawn = [part.counts for part, _ in used if part.counts is not None]
        counted_all = len(drawn) == len(used)
        return _summed(
            torch.cat([part.positions for part, _ in used]),
            torch.cat([part.ids for part, _ in used]),
            torch.cat([part.weights.double() * w for part, w in used]),
            torch.cat(drawn) if counted_all else None,
            rounds=sum(part.rounds or 0 for part, _ in used) if counted_all else None,
            length=len(first),
            vocab_size=max(part.vocab_size for part, _ in used),
        )

    def mapped(self, image: Tensor, vocab_size: int) -> SparseTargets:
        """Return targets in which each id is replaced by its image under a map.

        Entries with equal images are added. The probability of an image is the sum of the
        probabilities of its ids, so if these targets are unbiased for the teacher's distribution,
        the result is unbiased for the distribution of the images. Counts are added as well, so
        targets with counts can still be thinned.

        Args:
            image: int64 [V'], the new id, in [0, vocab_size), of each id of these targets; V' is at
                least `self.vocab_size`. New ids are not validated.
            vocab_size: number of new ids.

        Examples:
            >>> import torch
            >>> ids, weights = torch.tensor([1, 2, 3]), torch.tensor([0.5, 0.25, 0.25])
            >>> targets = SparseTargets(ids, weights, torch.tensor([0, 3]), vocab_size=4)
            >>> ids, weights = targets.mapped(torch.tensor([2, 0, 2, 2]), 3)[0]
            >>> ids.tolist(), weights.tolist()
            ([0, 2], [0.5, 0.5])
        """
        return _summed(
            self.positions,
            image[self.ids],
            self.weights.double(),
            self.counts,
            rounds=self.rounds,
            length=len(self),
            vocab_size=vocab_size,
        )

    def thin(self, rounds: int, starts: Tensor | int) -> SparseTargets:
        """Return the targets that `rounds` evenly spaced rounds of each position drew.

        The rounds of a position are ordered by the drawn ids. If `rounds` divides `self.rounds`,
        every k-th round is selected, k = self.rounds / rounds. A systematic draw then remains
        systematic, and the k possible starts partition the rounds. For other ratios, round r is
        selected if (r * rounds - g * start) mod self.rounds < rounds, with g the greatest common
        divisor of the two numbers; the gaps between selected rounds then have two neighbouring
        lengths, and the draw is no longer exactly systematic. In both cases the same share of the
        starts selects each round, so the result is unbiased for a uniformly drawn start, and its
        mean over all starts equals these targets.

        Args:
            rounds: number of rounds to select per position, at most `self.rounds`.
            starts: offsets of the selection, int or int64 [P], in
                [0, thinning_choices(self.rounds, rounds)).

        Raises:
            InvalidTargetsError: the targets have no counts, `rounds` is not in [1, self.rounds], or
                a start is out of range.
        """
        if self.counts is None or self.rounds is None:
            raise InvalidTargetsError(
                "these targets have no counts; only targets drawn in rounds can be thinned "
                "(not those of top-k, top-p and threshold). Use the targets as they are"
            )
        choices = thinning_choices(self.rounds, rounds)
        start = torch.as_tensor(starts, dtype=torch.int64, device=self.ids.device).expand(len(self))
        if len(self) and not bool(((start >= 0) & (start < choices)).all()):
            raise InvalidTargetsError(
                f"starts must lie in [0, {choices}) to thin {self.rounds} rounds to {rounds}, "
                f"found {int(start.min())} to {int(start.max())}; draw them from that range"
            )
        cached, positions, counts = self.rounds, self.positions, self.counts.long()
        total = counts.cumsum(0)
        before = torch.cat([total.new_zeros(1), total])[self.offsets[:-1]]
        after = total - before[positions]  # inclusive sum of the counts within the position
        shift = (start * (cached // choices))[positions]

        def selected_before(end: Tensor) -> Tensor:
            # The number of selected rounds r < end, up to a constant: whether round r is selected
            # is floor((r rounds - shift) / N) - floor(((r - 1) rounds - shift) / N), whose sum
            # telescopes.
            return ((end - 1) * rounds - shift).div(cached, rounding_mode="floor")

        selected = selected_before(after) - selected_before(after - counts)
        remains = selected > 0
        lengths = torch.zeros_like(self.offsets[1:]).index_add_(0, positions, remains.long())
        scale = (selected * cached).double() / (counts * rounds).double()
        return replace(
            self,
            ids=self.ids[remains],
            weights=(self.weights * scale)[remains].to(self.weights.dtype),
            offsets=offsets_from_lengths(lengths),
            counts=selected[remains].to(torch.int32),
            rounds=rounds,
            check=False,
        )


def thinning_choices(cached: int, kept: int) -> int:
    """Return the number of possible starts for thinning `cached` rounds per position to `kept`.

    Raises:
        InvalidTargetsError: `kept` is not in [1, cached].
    """
    if not 1 <= kept <= cached:
        raise InvalidTargetsError(
            f"cannot thin {cached} rounds to {kept}; give a number from 1 to {cached}"
        )
    return cached // math.gcd(cached, kept)


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Return the offsets, int64 [P + 1], of consecutive rows with `lengths` int64 [P]."""
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def _summed(
    positions: Tensor,
    ids: Tensor,
    weights: Tensor,
    counts: Tensor | None,
    *,
    rounds: int | None,
    length: int,
    vocab_size: int,
) -> SparseTargets:
    """Return targets of `length` positions, adding entries with equal position and id."""
    keys = positions * vocab_size + ids
    distinct, entry = keys.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    summed = torch.zeros(len(distinct), dtype=torch.float64, device=distinct.device)
    summed.index_add_(0, entry, weights)
    if counts is not None:
        added = torch.zeros(len(distinct), dtype=torch.int32, device=distinct.device)
        counts = added.index_add_(0, entry, counts)
    owners = distinct.div(vocab_size, rounding_mode="floor")
    return SparseTargets(
        distinct % vocab_size,
        summed.float(),
        offsets_from_lengths(owners.bincount(minlength=length)),
        vocab_size,
        counts=counts,
        rounds=rounds,
        check=False,
    )


def _validate(targets: SparseTargets) -> None:
    """Validate all fields. Raises InvalidTargetsError."""
    expected = {"ids": torch.int64, "weights": torch.float32, "offsets": torch.int64}
    if targets.counts is not None:
        expected["counts"] = torch.int32
    for name, dtype in expected.items():
        tensor = getattr(targets, name)
        if tensor.dtype != dtype or tensor.dim() != 1:
            raise InvalidTargetsError(
                f"{name} must be a {dtype} vector, found {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}; convert it"
            )
    if (targets.counts is None) != (targets.rounds is None):
        raise InvalidTargetsError("only one of counts and rounds is given; pass both or neither")
    if targets.vocab_size < 1:
        raise InvalidTargetsError(
            f"vocab_size must be positive, found {targets.vocab_size}; give the number of the "
            "teacher's logits per position"
        )
    offsets, entries = targets.offsets, targets.ids.numel()
    if offsets.numel() < 1 or int(offsets[0]) != 0 or int(offsets[-1]) != entries:
        raise InvalidTargetsError(
            f"offsets must start at 0 and end at the number of entries, {entries}; found "
            f"{offsets[:1].tolist()} ... {offsets[-1:].tolist()}"
        )
    if bool((offsets.diff() < 0).any()):
        position = int((offsets.diff() < 0).nonzero()[0])
        raise InvalidTargetsError(
            f"offsets descend at position {position}; expected non-decreasing offsets"
        )
    for name in ("weights", "counts"):
        tensor = getattr(targets, name)
        if tensor is not None and tensor.numel() != entries:
            raise InvalidTargetsError(
                f"found {entries} ids, but {tensor.numel()} {name}; expected equal numbers"
            )
    _validate_entries(targets)


def _validate_entries(targets: SparseTargets) -> None:
    """Validate ids, weights and counts, given valid offsets. Raises InvalidTargetsError."""
    ids, weights, positions = targets.ids, targets.weights, targets.positions

    def require(good: Tensor, values: Tensor, what: str) -> None:
        if not bool(good.all()):
            entry = int((~good).nonzero()[0])
            raise InvalidTargetsError(
                f"position {int(positions[entry])}: {what.format(values[entry].item())}"
            )

    inside = (ids >= 0) & (ids < targets.vocab_size)
    require(inside, ids, f"id {{}} lies outside the vocabulary of {targets.vocab_size} ids")
    valid = weights.isfinite() & (weights >= 0)
    require(valid, weights, "weight {} is not a finite non-negative number")
    same = positions[1:] == positions[:-1]
    ascending = torch.ones_like(ids, dtype=torch.bool)
    ascending[1:] = ~same | (ids[1:] > ids[:-1])
    require(ascending, ids, "id {} is not larger than the id before it; expected ascending ids")
    if targets.counts is None:
        return
    require(targets.counts > 0, targets.counts, "count {} is not positive")
    drawn = torch.zeros(len(targets), dtype=torch.int64, device=ids.device)
    drawn.index_add_(0, positions, targets.counts.long())
    wrong = (drawn != targets.rounds) & (targets.entries_per_position > 0)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        raise InvalidTargetsError(
            f"position {position}: counts sum to {int(drawn[position])}, expected the "
            f"{targets.rounds} rounds; give the counts of all rounds, and their number"
        )
