"""Decode the blocks of consecutive windows of a shard in one pass.

Each numpy operation costs a call and a pass over memory, so the windows of a row group are decoded
together. Pages are decoded one by one; all further operations cover all windows at once. Every size
is bounded before memory is allocated. Any bytes decode to valid targets or raise `DamageError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from sparselogits.samplers.sampler import COUNTS, THRESHOLD
from sparselogits.store.bounds import DamageError, entries_bound
from sparselogits.store.codec import lists
from sparselogits.store.codec.columns import Array, BlockPages, Bool, ColumnDecoder
from sparselogits.store.codec.levels import levels_at
from sparselogits.store.codec.lists import Sets
from sparselogits.store.codec.target_codec import TargetCodec, derived_entries, weights_of_counts
from sparselogits.targets import SparseTargets

Tables = Mapping[str, Sequence[tuple[int, bytes]]]
"""Coding tables of a shard, by column, as pairs (first window, table)."""

_FREED_BYTES = 31 << 20  # the threshold of glibc's malloc does not exceed 32 MiB


class BlockDecoder:
    """Decoder of the blocks of one shard.

    Raises:
        DamageError: the tables do not belong to the codec, or are damaged.
    """

    def __init__(self, codec: TargetCodec, tables: Tables) -> None:
        self.codec = codec
        names = codec.columns
        if set(tables) != set(names):
            raise DamageError(f"found coding tables for {sorted(tables)}, expected {sorted(names)}")
        self._columns = {n: ColumnDecoder(dtype, tables[n]) for n, dtype in names.items()}
        _keep_freed_memory()

    def decode(self, window: int, block: bytes, tokens: Array, present: Bool) -> SparseTargets:
        """Decode the targets of one window of L tokens; see `decode_run`."""
        return self.decode_run(window, [block], tokens[None], present[None])

    def decode_run(
        self, first: int, blocks: Sequence[bytes], tokens: Array, present: Bool
    ) -> SparseTargets:
        """Decode the targets of W consecutive windows into one value with W * L positions.

        Args:
            first: index of the first window in the shard, from 0.
            blocks: block of each window; see `TargetCodec.encode`.
            tokens: int32 [W, L].
            present: bool [W, L], True for positions with a target.

        Raises:
            DamageError: a block is damaged, or the windows together exceed the bound on entries and
                must be decoded one by one.
        """
        codec = self.codec
        pages = BlockPages(self._columns, first, blocks)
        listed = pages.listed()
        if int(listed.max()) > codec.vocab_size:
            raise DamageError(
                f"found {listed.max()} lists, expected at most {codec.vocab_size}, one per id"
            )
        most = min(codec.vocab_size, codec.rounds or codec.vocab_size)
        limit = min(entries_bound(sum(map(len, blocks))), int(present.sum()) * most)
        if int(listed.sum()) > limit:
            raise DamageError(
                f"found {listed.sum()} lists, expected at most {limit}, the bound on entries"
            )
        labels = codec.labels(tokens)
        sets = lists.join(pages, listed, tokens, labels, present, codec.vocab_size, limit)
        targets = self._weigh(sets, present, pages)
        pages.require_end()
        return targets

    def _weigh(self, sets: Sets, present: Bool, pages: BlockPages) -> SparseTargets:
        """Read the weights of the entries and return the targets."""
        codec, entries = self.codec, sets.offsets[:: present.shape[1]]
        counts = None
        if codec.rounds is not None:
            counts = _read_counts(sets, present, codec.rounds, pages)
        if codec.weights == COUNTS:
            assert counts is not None
            weights = weights_of_counts(counts, codec.rounds or 1)
        elif codec.weights == THRESHOLD:
            flags = pages.read("heavy", np.diff(entries))
            if int(flags.max(initial=0)) > 1:
                raise DamageError("the column of flags contains numbers other than 0 and 1")
            heavy = flags.astype(np.bool_)
            lengths = np.add.reduceat(np.append(heavy, False), entries[:-1], dtype=np.int64)
            lengths[entries[1:] == entries[:-1]] = 0
            weights = np.full(len(heavy), codec.light_weight)
            weights[heavy] = self._read_weights(pages, lengths)
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

    def _read_weights(self, pages: BlockPages, lengths: Array) -> NDArray[np.float32]:
        """Read the real-valued weights of each window, float32."""
        if self.codec.rounding is not None:
            return levels_at(pages.read("levels", lengths))
        return pages.read("weights", lengths)


@cache
def _keep_freed_memory() -> None:
    """Make glibc's malloc allocate temporary arrays of some megabytes on the heap.

    malloc maps large blocks separately and unmaps them when they are freed. Each new temporary
    array then causes page faults, which take half of the decoding time. The size above which blocks
    are mapped rises to that of the largest block ever freed, so this function frees a large one.
    """
    np.empty(_FREED_BYTES, np.uint8)


def _require_weights(weights: Array, offsets: Array, codec: TargetCodec) -> None:
    """Validate weights, float32 [E], and their sums per position."""
    if not len(weights):
        return
    least = codec.least_weight
    found = float(weights.min()), float(weights.max())  # NaN if a weight is NaN
    if not (least <= found[0] and found[1] <= codec.most_mass):
        raise DamageError(
            f"weights from {found[0]:g} to {found[1]:g}, expected {least:g} to {codec.most_mass:g}"
        )
    starts = offsets[:-1][offsets[1:] > offsets[:-1]]
    mass = float(np.add.reduceat(weights, starts, dtype=np.float64).max())
    if mass > codec.most_mass:
        raise DamageError(
            f"the weights of a position sum to {mass:g}, expected at most {codec.most_mass:g}"
        )


def _read_counts(sets: Sets, present: Bool, rounds: int, pages: BlockPages) -> NDArray[np.int32]:
    """Read the counts, int32 [E]; at each position with a target they sum to `rounds`."""
    flat = present.reshape(-1)
    starts, others, has_hit = sets.offsets[:-1], np.diff(sets.offsets) - 1, sets.has_hit
    if not bool(flat.all()):
        starts, others, has_hit = starts[flat], others[flat], has_hit[flat]
    if len(others) and int(others.min()) < 0:
        raise DamageError("a position with a target has no entries")
    entries = np.diff(sets.offsets[:: present.shape[1]])
    stored = pages.read("counts", entries - present.sum(1))
    running = lists.running_sums(stored)
    before = starts - np.arange(len(starts))
    rest = rounds - others - (running[before + others] - running[before])
    if len(rest) and int(rest.min()) < 1:
        raise DamageError(f"the counts of a position exceed its {rounds} rounds")
    derived = derived_entries(starts, sets.is_hit, has_hit)
    stored += np.uint32(1)
    counts = np.empty(len(sets.ids), np.int32)
    counts[~derived] = stored.view(np.int32)
    counts[np.flatnonzero(derived)] = rest
    return counts
