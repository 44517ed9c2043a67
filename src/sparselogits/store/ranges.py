"""Ranges of windows, and the file names that carry them.

A shard's name says which windows it holds, so the list of shards is a directory listing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from sparselogits.errors import CacheError

SHARDS = "shards"
_NAME = re.compile(r"windows-(\d{12,18})-(\d{12,18})\.parquet")

Range = tuple[int, int]


def shard_name(start: int, stop: int) -> str:
    """Name, folder included, of the shard of windows start to stop - 1."""
    return f"{SHARDS}/windows-{start:012d}-{stop:012d}.parquet"


def parse_shard_name(name: str) -> Range:
    """The windows a shard's name promises.

    Raises:
        ValueError: a name that is no shard's.
    """
    match = _NAME.fullmatch(name.rpartition("/")[2])
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"{name} is not a shard's name")
    return int(match[1]), int(match[2])


def shard_ranges(names: Iterable[str]) -> list[Range]:
    """Ranges of the shards among a listing's names, in window order; other files are passed over.

    Raises:
        CacheError: two shards that overlap.
    """
    matches = filter(None, map(_NAME.fullmatch, names))
    ranges = sorted((int(m[1]), int(m[2])) for m in matches)
    for before, after in pairwise(ranges):
        if after[0] < before[1]:
            raise CacheError(
                f"shards {shard_name(*before)} and {shard_name(*after)} overlap; they come from "
                "builds with different shard boundaries: move one of them away"
            )
    return ranges


def missing_ranges(present: Sequence[Range], stop: int, start: int = 0) -> list[Range]:
    """Runs of windows in [start, stop) that no shard holds."""
    missing, at = [], start
    for first, last in present:
        if first > at:
            missing.append((at, min(first, stop)))
        at = max(at, last)
    if at < stop:
        missing.append((at, stop))
    return [(a, b) for a, b in missing if a < b]
