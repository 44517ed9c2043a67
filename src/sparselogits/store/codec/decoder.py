"""Decoding blocks: any number of a shard's windows in one pass.

What numpy does costs a call and a pass each, so the windows of a row group are decoded together:
their pages one by one, as they are coded, everything else on all of them at once. Nothing is
allocated that has not been bounded before, and whatever the bytes are, what comes out is sound
targets or a `BlockError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparselogits.samplers.sampler import COUNTS, THRESHOLD
from sparselogits.store.bounds import entries_bound
from sparselogits.store.codec import lists
from sparselogits.store.codec.columns import ColumnDecoder, ColumnError
from sparselogits.store.codec.lists import Array, Bool, ListsError, Sets
from sparselogits.store.codec.weights import derived_entries, weights_of_counts
from sparselogits.targets import SparseTargets

if TYPE_CHECKING:
    from sparselogits.store.codec.target_codec import TargetCodec

Tables = Mapping[str, Sequence[tuple[int, bytes]]]


_KEPT_FREE = 31 << 20  # bytes; glibc's threshold does not rise beyond 32 MiB


class BlockError(ValueError):
    """Blocks that do not decode to sound targets; says what is wrong, not where."""


class BlockDecoder:
    """Decodes the blocks of one shard.

    Args:
        codec: of the cache.
        tables: the shard's coding tables.

    Raises:
        BlockError: tables that are not this codec's.
    """

    def __init__(self, codec: TargetCodec, tables: Tables) -> None:
        self.codec = codec
        names = codec.columns
        if set(tables) != set(names):
            raise BlockError(f"coding tables for {sorted(tables)}, expected {sorted(names)}")
        try:
            self._columns = {n: ColumnDecoder(dtype, tables[n]) for n, dtype in names.items()}
        except ColumnError as error:
            raise BlockError(str(error)) from error
        _let_the_allocator_keep_what_is_freed()

    def decode(self, window: int, block: bytes, tokens: Array, present: Bool) -> SparseTargets:
        """The targets of one window, as `decode_run` gives those of several."""
        return self.decode_run(window, [block], tokens[None], present[None])

    def decode_run(
        self, first: int, blocks: Sequence[bytes], tokens: Array, present: Bool
    ) -> SparseTargets:
        """The targets of W windows that follow one another, W L positions.

        Args:
            first: the place of the first one in the shard, from 0.
            blocks: W of them, as `TargetCodec.encode` made them.
            tokens: int32 [W, L].
            present: bool [W, L]: positions that carry a target.

        Raises:
            BlockError: a block that is damaged, whatever its bytes are; or windows that together
                have more entries than a single one may, which have to be decoded apart.
        """
        codec = self.codec
        pages = _BlockPages(self._columns, codec.columns, first, blocks)
        try:
            listed = pages.listed()
            if int(listed.max()) > codec.vocab_size:
                raise BlockError(f"{listed.max()} lists over a vocabulary of {codec.vocab_size}")
            most = min(codec.vocab_size, codec.rounds or codec.vocab_size)
            limit = min(entries_bound(sum(map(len, blocks))), int(present.sum()) * most)
            if int(listed.sum()) > limit:
                raise BlockError(f"{listed.sum()} lists, where {limit} entries are possible")
            sets = lists.join(pages, listed, tokens, present, codec.vocab_size, limit)
            targets = self._weigh(sets, present, pages)
        except (ColumnError, ListsError) as error:
            raise BlockError(str(error)) from error
        pages.require_end()
        return targets

    def _weigh(self, sets: Sets, present: Bool, pages: _BlockPages) -> SparseTargets:
        codec, entries = self.codec, sets.offsets[:: present.shape[1]]
        counts = None
        if codec.rounds is not None:
            counts = _read_counts(sets, present, codec.rounds, pages)
        if codec.weights == COUNTS:
            assert counts is not None
            weights = weights_of_counts(counts, codec.rounds or 1)
        elif codec.weights == THRESHOLD:
            told_heavy = pages.read("heavy", np.diff(entries))
            if int(told_heavy.max(initial=0)) > 1:
                raise BlockError("a column of flags holds other numbers than 0 and 1")
            heavy = told_heavy.astype(np.bool_)
            told = np.add.reduceat(np.append(heavy, False), entries[:-1], dtype=np.int64)
            told[entries[1:] == entries[:-1]] = 0
            weights = np.full(len(heavy), codec.tau, np.float32)
            weights[heavy] = pages.read("weights", told)
        else:
            weights = pages.read("weights", np.diff(entries))
        if codec.weights != COUNTS:
            _require_weights(weights, sets.offsets, codec)
        return SparseTargets(
            torch.from_numpy(sets.ids),
            torch.from_numpy(weights),
            torch.from_numpy(sets.offsets),
            codec.vocab_size,
            counts=None if counts is None else torch.from_numpy(counts),
            rounds=codec.rounds,
            check=False,
        )


@cache
def _let_the_allocator_keep_what_is_freed() -> None:
    """Have temporaries of a megabyte taken from the heap rather than mapped anew each time.

    glibc's malloc maps large blocks one by one and unmaps them when they are freed, so that every
    pass over a temporary faults on each of its pages: half of a decoder's time. The size from which
    it does so rises to that of the largest such block ever freed; this is one, never touched.
    """
    np.empty(_KEPT_FREE, np.uint8)


class _BlockPages:
    """The columns of several blocks, one column after another."""

    def __init__(
        self,
        columns: Mapping[str, ColumnDecoder],
        dtypes: Mapping[str, Any],
        first: int,
        blocks: Sequence[bytes],
    ) -> None:
        self._columns, self._dtypes, self._first = columns, dtypes, first
        self._blocks, self._at = blocks, [4] * len(blocks)

    def listed(self) -> NDArray[np.int64]:
        """int64 [W], the blocks' first words: how many lists each has."""
        shortest = min(map(len, self._blocks))
        if shortest < 4:
            raise BlockError(f"a block of {shortest} bytes is shorter than its header")
        return np.array([int.from_bytes(block[:4], "little") for block in self._blocks])

    def read(self, column: str, lengths: Array) -> Array:
        """The next numbers of a column, `lengths[w]` of each window w."""
        stops = np.cumsum(lengths).tolist()
        out = np.empty(stops[-1], self._dtypes[column])
        self.fill(column, out, [0, *stops[:-1]], stops)
        return out

    def fill(self, column: str, out: Array, starts: Sequence[int], stops: Sequence[int]) -> None:
        """The same into `out[starts[w]:stops[w]]`."""
        decoder, at, blocks = self._columns[column], self._at, self._blocks
        for w, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            if stop > start:
                rest = blocks[w][at[w] :]
                at[w] += decoder.decode_into(out[start:stop], self._first + w, rest)

    def require_end(self) -> None:
        """Raises BlockError where bytes are left."""
        for block, at in zip(self._blocks, self._at, strict=True):
            if at != len(block):
                raise BlockError(f"{len(block)} bytes, of which {at} are used")


def _require_weights(weights: Array, offsets: Array, codec: TargetCodec) -> None:
    """Raises BlockError unless all weights, and their sums by position, are within bounds."""
    if not len(weights):
        return
    least = float(np.float32(codec.tau or 0.0)) if codec.weights == THRESHOLD else 0.0
    found = float(weights.min()), float(weights.max())  # NaN where there is one
    if not (least <= found[0] and found[1] <= codec.most_mass):
        raise BlockError(
            f"weights from {found[0]:g} to {found[1]:g}, expected {least:g} to {codec.most_mass:g}"
        )
    starts = offsets[:-1][offsets[1:] > offsets[:-1]]
    mass = float(np.add.reduceat(weights, starts, dtype=np.float64).max())
    if mass > codec.most_mass:
        raise BlockError(f"a position's weights sum to {mass:g}, expected {codec.most_mass:g}")


def _read_counts(sets: Sets, present: Bool, rounds: int, pages: _BlockPages) -> NDArray[np.int32]:
    """int32 [E]. Raises BlockError unless every position's counts are positive and sum to N."""
    flat = present.reshape(-1)
    starts, others, has_hit = sets.offsets[:-1], np.diff(sets.offsets) - 1, sets.has_hit
    if not bool(flat.all()):
        starts, others, has_hit = starts[flat], others[flat], has_hit[flat]
    if len(others) and int(others.min()) < 0:
        raise BlockError("a position that carries a target has no entries")
    entries = np.diff(sets.offsets[:: present.shape[1]])
    told = pages.read("counts", entries - present.sum(1))
    running = np.zeros(len(told) + 1, np.int64)
    np.cumsum(told, out=running[1:])
    before = starts - np.arange(len(starts))
    rest = rounds - others - (running[before + others] - running[before])
    if len(rest) and int(rest.min()) < 1:
        raise BlockError(f"counts of a position exceed its {rounds} rounds")
    derived = derived_entries(starts, sets.is_hit, has_hit)
    told += np.uint32(1)
    counts = np.empty(len(sets.ids), np.int32)
    counts[~derived] = told.view(np.int32)
    counts[np.flatnonzero(derived)] = rest
    return counts
