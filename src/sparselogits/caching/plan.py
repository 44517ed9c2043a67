"""Divide a build into ranges of windows, one range per shard.

The ranges depend only on numbers of windows that all workers know, so any number of workers can
divide them without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError, require_whole
from sparselogits.store.ranges import Range


@dataclass(frozen=True)
class Share:
    """Share of one worker in a build that several workers divide without communication.

    Args:
        index: index of the worker, from 0.
        count: number of workers.

    Raises:
        InvalidArgumentError: `index` is not in [0, `count`).

    Examples:
        >>> Share(1, 2).of([(0, 8), (8, 16), (16, 24)])
        [(8, 16)]
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        count = require_whole("the number of workers", self.count, 1)
        index = require_whole("the index of a worker", self.index, 0, count - 1)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "index", index)

    def of(self, ranges: Sequence[Range]) -> list[Range]:
        """Return every `count`-th range, starting with range `index`.

        Args:
            ranges: all ranges, including finished ones, so that all workers divide equal lists.
        """
        return list(ranges[self.index :: self.count])


WHOLE = Share(0, 1)
"""Share of a build's only worker: all ranges."""


def shard_ranges(
    windows: int, windows_per_shard: int, only: Range | None = None, *, first_window: int = 0
) -> list[Range]:
    """Divide the windows of a corpus into one range per shard.

    Args:
        windows: number of windows of the corpus.
        windows_per_shard: number of windows per shard; the last shard may have fewer.
        only: range of windows to build, which must start and end at shard boundaries; None for all.
        first_window: index of the corpus's first window in the cache; above 0 for appended text.

    Raises:
        InvalidArgumentError: `windows_per_shard` is below 1, `first_window` is negative, `only` is
            not in the corpus or does not start and end at shard boundaries, or the corpus has no
            windows.

    Examples:
        >>> shard_ranges(20, 8)
        [(0, 8), (8, 16), (16, 20)]
    """
    windows_per_shard = require_whole("windows_per_shard", windows_per_shard, 1)
    first_window = require_whole("first_window", first_window, 0)
    end = first_window + windows
    first, stop = only if only is not None else (first_window, end)
    first = require_whole("the first window", first, 0)
    stop = require_whole("the window after the last", stop, 0)
    if not first_window <= first < stop <= end:
        raise InvalidArgumentError(
            f"windows {first}:{stop} are not in the corpus; give a range within "
            f"{first_window}:{end}"
        )
    cut = (first - first_window) % windows_per_shard, (stop - first_window) % windows_per_shard
    if cut[0] or (cut[1] and stop != end):
        after = f"{first_window} plus " if first_window else ""
        raise InvalidArgumentError(
            f"windows {first}:{stop} do not start and end at shard boundaries; use {after}"
            f"multiples of {windows_per_shard} (or {end}, the end of the corpus)"
        )
    return [
        (start, min(start + windows_per_shard, stop))
        for start in range(first, stop, windows_per_shard)
    ]


def windows_in(ranges: Sequence[Range]) -> int:
    """Return the total number of windows in ranges."""
    return sum(stop - start for start, stop in ranges)
