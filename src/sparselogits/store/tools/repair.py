"""Repair: move damaged shards aside, so that the next build fills their ranges again.

Nothing is deleted: the file may help to find the cause, such as a failing disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sparselogits.errors import CacheError
from sparselogits.locks import Held, lock_file
from sparselogits.progress import Progress
from sparselogits.store.cache import Cache
from sparselogits.store.ranges import Range
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.tools.verify import TextOf, VerifyReport, is_sound, verify

DAMAGED = "damaged"


@dataclass(frozen=True)
class RepairReport:
    """The result of a repair.

    Args:
        set_aside: (old name, new name) of each moved file, relative to the cache.
        rebuild: ranges of windows to build again, in order, with those that were missing.
    """

    set_aside: tuple[tuple[str, str], ...]
    rebuild: tuple[Range, ...]


def repair(
    cache: Cache,
    report: VerifyReport | None = None,
    *,
    text_of: TextOf | None = None,
    progress: Progress | None = None,
) -> RepairReport:
    """Move every damaged shard into the folder `damaged` of the cache.

    A build may run meanwhile: a shard that is sound by now stays.

    Args:
        cache: the cache.
        report: report of `verify`; None to verify the whole cache first.
        text_of: see `verify`.
        progress: see `verify`.

    Raises:
        CacheError: another process is repairing this cache.
        StorageError: the cache cannot be reached or written; files that were moved stay moved.
    """
    with _alone(cache):
        report = report or verify(cache, text_of=text_of, progress=progress)
        moved, rebuild = [], list(report.missing)
        sound = [shard.windows for shard in report.shards if shard.error is None]
        for shard in report.damaged:
            if is_sound(cache, shard.windows, beside=sound, text_of=text_of):
                continue  # rebuilt since the report was made
            with suppress(FileNotFoundError):  # removed by hand meanwhile
                moved.append((shard.name, set_aside(cache, shard.name)))
            rebuild.append(shard.windows)
        cache.finished()
    return RepairReport(tuple(moved), tuple(sorted(rebuild)))


@contextmanager
def _alone(cache: Cache) -> Iterator[None]:
    """Exclude other repairs, which could move a shard that was rebuilt after this one."""
    storage = cache.storage
    if not isinstance(storage, LocalStorage):
        yield
        return
    with lock_file(storage.root / ".repair.lock") as lock:
        if lock.held is Held.TAKEN:
            raise CacheError(
                f"another process is repairing {storage.location}. Wait until it has finished, "
                "then check with `sparselogits verify` whether anything is left to repair"
            )
        yield


def set_aside(cache: Cache, name: str) -> str:
    """Move a file of a cache into the folder `damaged`; return its new name.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the file cannot be moved.
    """
    taken, own = set(cache.storage.names(DAMAGED)), name.rpartition("/")[2]
    free, number = own, 1
    while free in taken:
        number += 1
        free = f"{own}.{number}"
    cache.storage.move(name, f"{DAMAGED}/{free}")
    return f"{DAMAGED}/{free}"
