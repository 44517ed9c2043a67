"""Convert between ranges of windows and the file names of shards.

The name of a shard contains its range, so the list of shards is a directory listing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from sparselogits.errors import CacheError

SHARDS = "shards"
"""Name of the folder that contains the shards of a cache."""

_NAME = re.compile(r"windows-(\d{12,18})-(\d{12,18})\.parquet")

Range = tuple[int, int]
"""Range of windows: the index of the first window, and the index after the last one."""


def shard_name(start: int, stop: int) -> str:
    """Return the path, relative to the cache, of the shard with windows [start, stop)."""
    return f"{SHARDS}/windows-{start:012d}-{stop:012d}.parquet"


def parse_shard_name(name: str) -> Range:
    """Return the range of windows in the file name or path of a shard.

    Raises:
        ValueError: the name is not the name of a shard.
    """
    match = _NAME.fullmatch(name.rpartition("/")[2])
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"{name} is not the name of a shard, expected windows-START-STOP.parquet with "
            "START < STOP; restore its original name"
        )
    return int(match[1]), int(match[2])


def listed_ranges(names: Iterable[str]) -> list[Range]:
    """Return the ranges of the shards in a directory listing, in window order; ignore other names.

    Raises:
        CacheError: two shards overlap.
    """
    matches = filter(None, map(_NAME.fullmatch, names))
    ranges = sorted((int(m[1]), int(m[2])) for m in matches if int(m[1]) < int(m[2]))
    for before, after in pairwise(ranges):
        if after[0] < before[1]:
            raise CacheError(
                f"shards {shard_name(*before)} and {shard_name(*after)} overlap, expected disjoint "
                "ranges; builds with different shard boundaries wrote to this cache. Move one of "
                "the two files away"
            )
    return ranges


def missing_ranges(present: Sequence[Range], stop: int) -> list[Range]:
    """Return the ranges of windows in [0, stop) that no range in `present`, ascending, contains."""
    edges = [(0, 0), *present, (stop, stop)]
    gaps = [(before, min(after, stop)) for (_, before), (after, _) in pairwise(edges)]
    return [(a, b) for a, b in gaps if a < b]


def joined(ranges: Sequence[Range], windows: int | None = None) -> list[list[int]]:
    """Return ascending ranges as JSON lists, with adjacent ranges joined.

    With `windows`, only the first `windows` windows are included.

    Examples:
        >>> joined([(0, 4), (4, 6), (8, 9)]), joined([(0, 4), (4, 6)], 5)
        ([[0, 6], [8, 9]], [[0, 5]])
    """
    result: list[list[int]] = []
    left = sum(stop - start for start, stop in ranges) if windows is None else windows
    for start, stop in ranges:
        stop = min(stop, start + left)
        if stop <= start:
            break
        left -= stop - start
        if result and result[-1][1] == start:
            result[-1][1] = stop
        else:
            result.append([start, stop])
    return result


def ranges_in_words(ranges: Sequence[Sequence[int]]) -> str:
    """Return a phrase with the first and last windows of at most four ranges, for messages."""
    some = ", ".join(f"{start} to {stop - 1}" for start, stop in ranges[:4])
    return (some or "none") + (", ..." if len(ranges) > 4 else "")


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` indices in [0, total), evenly spaced and ascending.

    Examples:
        >>> spread(10, 5), spread(2, 5)
        ([1, 3, 5, 7, 9], [0, 1])
    """
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
