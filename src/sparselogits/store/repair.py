"""Repair: set damaged shards aside, so that the next build fills their ranges again.

Nothing is ever deleted: a damaged file may still be worth a look, or its disk the blame.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparselogits.store.cache import Cache
from sparselogits.store.ranges import Range
from sparselogits.store.verify import Progress, VerifyReport, verify

DAMAGED = "damaged"


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Args:
        set_aside: (name before, name now), relative to the cache.
        rebuild: ranges of windows to build again, in order; gaps found on the way included.
    """

    set_aside: tuple[tuple[str, str], ...]
    rebuild: tuple[Range, ...]


def repair(
    cache: Cache, report: VerifyReport | None = None, *, progress: Progress | None = None
) -> RepairReport:
    """Move every damaged shard into the folder `damaged` of the cache.

    Args:
        cache: to be repaired.
        report: what `verify` found; it is run, in full, when None.
        progress: as for `verify`.
    """
    report = report or verify(cache, progress=progress)
    moved = []
    for shard in report.damaged:
        free = _free_name(cache, shard.name.rpartition("/")[2])
        cache.storage.move(shard.name, free)
        moved.append((shard.name, free))
    cache.finished()
    rebuild = sorted([*(shard.windows for shard in report.damaged), *report.missing])
    return RepairReport(tuple(moved), tuple(rebuild))


def _free_name(cache: Cache, name: str) -> str:
    taken = set(cache.storage.names(DAMAGED))
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    return f"{DAMAGED}/{free}"
