"""Divide the work of a build into ranges of windows, one range per shard.

Ranges are fixed by the corpus and the identity alone, so any number of workers can divide them
without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError
from sparselogits.store.ranges import Range


@dataclass(frozen=True)
class Share:
    """One worker's share of the work, where workers divide it without communication.

    Args:
        index: number of the worker, from 0.
        count: number of workers.
    """

    index: int
    count: int

    def of(self, ranges: Sequence[Range]) -> list[Range]:
        """Return every count-th range, whether finished or not, so that no range is missed."""
        return list(ranges[self.index :: self.count])


WHOLE = Share(0, 1)


def shard_ranges(
    windows: int, windows_per_shard: int, only: Range | None = None, *, first_window: int = 0
) -> list[Range]:
    """Return the ranges of windows of the shards of a corpus, or of a part of it.

    Args:
        windows: number of windows of the corpus.
        windows_per_shard: number of windows per shard; the last shard may hold fewer.
        only: range of windows to build; its ends must be ends of shards.
        first_window: number of the corpus' first window in the cache; above 0 for appended text.

    Raises:
        InvalidArgumentError: the range does not lie in the corpus, or cuts through a shard.
    """
    end = first_window + windows
    first, stop = only if only is not None else (first_window, end)
    if not first_window <= first < stop <= end:
        raise InvalidArgumentError(
            f"windows {first}:{stop} do not lie in the corpus; give a range within "
            f"{first_window}:{end}"
        )
    cut = (first - first_window) % windows_per_shard, (stop - first_window) % windows_per_shard
    if cut[0] or (cut[1] and stop != end):
        after = f"{first_window} plus " if first_window else ""
        raise InvalidArgumentError(
            f"windows {first}:{stop} cut through a shard; use {after}multiples of "
            f"{windows_per_shard} (or the corpus' end, {end})"
        )
    return [
        (start, min(start + windows_per_shard, stop))
        for start in range(first, stop, windows_per_shard)
    ]


def windows_in(ranges: Sequence[Range]) -> int:
    """Return the number of windows that ranges cover together."""
    return sum(stop - start for start, stop in ranges)
