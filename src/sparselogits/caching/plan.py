"""Which ranges of windows make up the work.

A range is a shard. Ranges are fixed by the corpus and the identity alone, so any number of workers
can divide them without talking to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError

Range = tuple[int, int]
"""First window and one past the last."""


@dataclass(frozen=True)
class Share:
    """One worker's part of the work, where workers divide it without talking to each other.

    Args:
        index: which of the workers, from 0.
        count: how many there are.
    """

    index: int
    count: int

    def of(self, ranges: Sequence[Range]) -> list[Range]:
        """Every count-th range. It does not depend on which are finished, so none is left out."""
        return list(ranges[self.index :: self.count])


WHOLE = Share(0, 1)


def shard_ranges(
    windows: int, windows_per_shard: int, only: Range | None = None, *, first_window: int = 0
) -> list[Range]:
    """The shards of a corpus, or of a part of it.

    Args:
        windows: windows of the corpus.
        windows_per_shard: windows a shard covers; the corpus' last shard may cover fewer.
        only: a range of windows to build; its edges must be edges of shards.
        first_window: number of the corpus' first window in the cache: where text is appended, the
            windows before it.

    Raises:
        InvalidArgumentError: for a range outside the corpus or across a shard.
    """
    end = first_window + windows
    first, stop = only if only is not None else (first_window, end)
    if not first_window <= first < stop <= end:
        raise InvalidArgumentError(
            f"windows {first}:{stop} do not lie in the corpus, which has windows "
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
    """How many windows ranges cover together."""
    return sum(stop - start for start, stop in ranges)


def spread(windows: int, count: int) -> list[int]:
    """At most `count` window indices spread evenly over the corpus."""
    count = min(count, windows)
    return [(2 * i + 1) * windows // (2 * count) for i in range(count)]
