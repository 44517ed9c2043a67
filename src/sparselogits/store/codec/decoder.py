"""The decoder of blocks: any number of windows of a shard in one pass.

Each numpy operation costs a call and a pass over memory, so the windows of a row group are decoded
together: their pages one by one, as they are coded, everything else on all of them at once. Every
size is bounded before it is allocated. Whatever the bytes are, the result is sound targets or a
`DamageError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparselogits.samplers.sampler import COUNTS, THRESHOLD
from sparselogits.store.bounds import DamageError, entries_bound
from sparselogits.store.codec import lists
from sparselogits.store.codec.columns import ColumnDecoder
from sparselogits.store.codec.levels import levels_at
from sparselogits.store.codec.lists import Array, Bool, Sets
from sparselogits.store.codec.target_codec import TargetCodec
from sparselogits.store.codec.weights import derived_entries, weights_of_counts
from sparselogits.targets import SparseTargets

Tables = Mapping[str, Sequence[tuple[int, bytes]]]


_KEPT_FREE = 31 << 20  # bytes; glibc's threshold does not rise beyond 32 MiB


class BlockDecoder:
    """Decodes the blocks of one shard.

    Args:
        codec: codec of the cache.
        tables: coding tables of the shard.

    Raises:
        DamageError: the tables are not those of this codec.
    """

    def __init__(self, codec: TargetCodec, tables: Tables) -> None:
        self.codec = codec
        names = codec.columns
        if set(tables) != set(names):
            raise DamageError(
                f"the shard has coding tables for {sorted(tables)}, expected {sorted(names)}"
            )
        self._columns = {n: ColumnDecoder(dtype, tables[n]) for n, dtype in names.items()}
        _keep_freed_memory()

    def decode(self, window: int, block: bytes, tokens: Array, present: Bool) -> SparseTargets:
        """Decode the targets of one window; see `decode_run`."""
        return self.decode_run(window, [block], tokens[None], present[None])

    def decode_run(
        self, first: int, blocks: Sequence[bytes], tokens: Array, present: Bool
    ) -> SparseTargets:
        """Decode the targets of W consecutive windows, W L positions.

        Args:
            first: index of the first window in the shard, from 0.
            blocks: W blocks, as `TargetCodec.encode` made them.
            tokens: int32 [W, L].
            present: bool [W, L], True where the position carries a target.

        Raises:
            DamageError: a block is damaged; or the windows together have more entries than a single
                one may have, and must be decoded one by one.
        """
        codec = self.codec
        pages = _BlockPages(self._columns, codec.columns, first, blocks)
        listed = pages.listed()
        if int(listed.max()) > codec.vocab_size:
            raise DamageError(f"{listed.max()} lists over a vocabulary of {codec.vocab_size}")
        most = min(codec.vocab_size, codec.rounds or codec.vocab_size)
        limit = min(entries_bound(sum(map(len, blocks))), int(present.sum()) * most)
        if int(listed.sum()) > limit:
            raise DamageError(f"{listed.sum()} lists, where {limit} entries are possible")
        labels = codec.labels(tokens)
        sets = lists.join(pages, listed, tokens, labels, present, codec.vocab_size, limit)
        targets = self._weigh(sets, present, pages)
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
                raise DamageError("a column of flags holds other numbers than 0 and 1")
            heavy = told_heavy.astype(np.bool_)
            told = np.add.reduceat(np.append(heavy, False), entries[:-1], dtype=np.int64)
            told[entries[1:] == entries[:-1]] = 0
            weights = np.full(len(heavy), codec.light_weight)
            weights[heavy] = self._read_weights(pages, told)
        else:
            weights = self._read_weights(pages, np.diff(entries))
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

    def _read_weights(self, pages: _BlockPages, lengths: Array) -> NDArray[np.float32]:
        if self.codec.rounding is not None:
            return levels_at(pages.read("levels", lengths))
        return pages.read("weights", lengths)


@cache
def _keep_freed_memory() -> None:
    """Make the allocator take temporary arrays of a megabyte from the heap.

    glibc's malloc maps large blocks one by one and unmaps them when they are freed, so every pass
    over a temporary array faults on each of its pages: half of the time of decoding. The size from
    which malloc does so rises to that of the largest such block ever freed, which this frees.
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
        """Return int64 [W], the number of lists of each block, which is its first word."""
        shortest = min(map(len, self._blocks))
        if shortest < 4:
            raise DamageError(f"a block of {shortest} bytes is shorter than its header")
        return np.array([int.from_bytes(block[:4], "little") for block in self._blocks])

    def read(self, column: str, lengths: Array) -> Array:
        """Return the next numbers of a column, `lengths[w]` of each window w."""
        stops = np.cumsum(lengths).tolist()
        out = np.empty(stops[-1], self._dtypes[column])
        self.fill(column, out, [0, *stops[:-1]], stops)
        return out

    def fill(self, column: str, out: Array, starts: Sequence[int], stops: Sequence[int]) -> None:
        """Read the next numbers of a column into `out[starts[w]:stops[w]]` for each window w."""
        decoder, at, blocks = self._columns[column], self._at, self._blocks
        for w, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            if stop > start:
                rest = blocks[w][at[w] :]
                at[w] += decoder.decode_into(out[start:stop], self._first + w, rest)

    def require_end(self) -> None:
        """Validate that no bytes are left. Raises DamageError."""
        for block, at in zip(self._blocks, self._at, strict=True):
            if at != len(block):
                raise DamageError(f"a block has {len(block)} bytes, of which {at} are used")


def _require_weights(weights: Array, offsets: Array, codec: TargetCodec) -> None:
    """Validate all weights, and their sums per position. Raises DamageError."""
    if not len(weights):
        return
    least = codec.least_weight
    found = float(weights.min()), float(weights.max())  # NaN where there is one
    if not (least <= found[0] and found[1] <= codec.most_mass):
        raise DamageError(
            f"weights from {found[0]:g} to {found[1]:g}, expected {least:g} to {codec.most_mass:g}"
        )
    starts = offsets[:-1][offsets[1:] > offsets[:-1]]
    mass = float(np.add.reduceat(weights, starts, dtype=np.float64).max())
    if mass > codec.most_mass:
        raise DamageError(f"a position's weights sum to {mass:g}, expected {codec.most_mass:g}")


def _read_counts(sets: Sets, present: Bool, rounds: int, pages: _BlockPages) -> NDArray[np.int32]:
    """Return the counts, int32 [E], positive and summing to N per position; or DamageError."""
    flat = present.reshape(-1)
    starts, others, has_hit = sets.offsets[:-1], np.diff(sets.offsets) - 1, sets.has_hit
    if not bool(flat.all()):
        starts, others, has_hit = starts[flat], others[flat], has_hit[flat]
    if len(others) and int(others.min()) < 0:
        raise DamageError("a position that carries a target has no entries")
    entries = np.diff(sets.offsets[:: present.shape[1]])
    told = pages.read("counts", entries - present.sum(1))
    running = np.zeros(len(told) + 1, np.int64)
    np.cumsum(told, out=running[1:])
    before = starts - np.arange(len(starts))
    rest = rounds - others - (running[before + others] - running[before])
    if len(rest) and int(rest.min()) < 1:
        raise DamageError(f"counts of a position exceed its {rounds} rounds")
    derived = derived_entries(starts, sets.is_hit, has_hit)
    told += np.uint32(1)
    counts = np.empty(len(sets.ids), np.int32)
    counts[~derived] = told.view(np.int32)
    counts[np.flatnonzero(derived)] = rest
    return counts
