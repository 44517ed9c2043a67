"""Which ranges of windows make up the work.

A range is a shard. Ranges are fixed by the corpus and the identity alone, so any number of workers
can divide them without talking to each other.
"""

from __future__ import annotations

from sparselogits.errors import InvalidArgumentError

Range = tuple[int, int]
"""First window and one past the last."""


def shard_ranges(windows: int, windows_per_shard: int, only: Range | None = None) -> list[Range]:
    """The shards of a corpus, or of a part of it.

    Args:
        windows: windows of the corpus.
        windows_per_shard: windows a shard covers; the corpus' last shard may cover fewer.
        only: a range of windows to build; its edges must be edges of shards.

    Raises:
        InvalidArgumentError: for a range outside the corpus or across a shard.
    """
    first, stop = only if only is not None else (0, windows)
    if not 0 <= first < stop <= windows:
        raise InvalidArgumentError(
            f"windows {first}:{stop} do not lie in the corpus, which has windows 0:{windows}"
        )
    if first % windows_per_shard or (stop % windows_per_shard and stop != windows):
        raise InvalidArgumentError(
            f"windows {first}:{stop} cut through a shard; use multiples of {windows_per_shard} "
            f"(or the corpus' end, {windows})"
        )
    return [
        (start, min(start + windows_per_shard, stop))
        for start in range(first, stop, windows_per_shard)
    ]


def spread(windows: int, count: int) -> list[int]:
    """At most `count` window indices spread evenly over the corpus."""
    count = min(count, windows)
    return [(2 * i + 1) * windows // (2 * count) for i in range(count)]
