"""Repair a cache: move damaged shards aside, so that the next build computes their ranges again.

Files are not deleted, because they may help to find the cause, such as a failing disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count

from sparselogits.errors import CacheError
from sparselogits.locks import Held, lock_file
from sparselogits.progress import Progress
from sparselogits.store.cache import Cache
from sparselogits.store.ranges import Range
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.tools.verify import TextOf, VerifyReport, is_sound, verify

DAMAGED = "damaged"
"""Name of the folder to which damaged files of a cache are moved."""


@dataclass(frozen=True)
class RepairReport:
    """Result of a repair.

    Args:
        set_aside: (old name, new name) of each moved file, relative to the cache.
        rebuild: sorted ranges of windows to build again, including missing ranges.
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
    """Move all damaged shards to the folder `damaged` of the cache.

    In a local folder, a build may run at the same time, because shards rebuilt after the report are
    not moved. At a URL, neither a build nor another repair may run at the same time, because a
    repair holds no lock there.

    Args:
        cache: the cache.
        report: report of `verify`; None to verify the whole cache first.
        text_of: see `verify`.
        progress: see `verify`.

    Raises:
        CacheError: another process is repairing the cache, or two shards overlap.
        CacheCorruptionError: a file in `texts/`, or the footer of a shard that the report calls
            sound, is damaged.
        StorageError: the cache cannot be reached or written; moved files are not moved back.

    Examples:
        >>> from sparselogits.store import Cache
        >>> repair(Cache.open("my-cache")).set_aside
        ()
    """
    with _exclusive(cache):
        report = report or verify(cache, text_of=text_of, progress=progress)
        moved, rebuild = [], list(report.missing)
        sound = [shard.windows for shard in report.shards if shard.error is None]
        for shard in report.damaged:
            if is_sound(cache, shard.windows, others=sound, text_of=text_of):
                continue  # rebuilt since the report
            with suppress(FileNotFoundError):  # removed since the report
                moved.append((shard.name, set_aside(cache, shard.name)))
            rebuild.append(shard.windows)
        cache.finished()
    return RepairReport(tuple(moved), tuple(sorted(rebuild)))


@contextmanager
def _exclusive(cache: Cache) -> Iterator[None]:
    """Lock a cache in a local folder against other repairs, which could move a rebuilt shard."""
    storage = cache.storage
    if not isinstance(storage, LocalStorage):
        yield
        return
    with lock_file(storage.root / ".repair.lock") as lock:
        if lock.held is Held.TAKEN:
            raise CacheError(
                f"another process is repairing {storage.location}. Wait until that process has "
                "finished, then run `sparselogits verify` to check the cache again"
            )
        yield


def set_aside(cache: Cache, name: str) -> str:
    """Move a file of a cache to the folder `damaged`; return the file's new name.

    Raises:
        FileNotFoundError: the file does not exist.
        StorageError: the file cannot be moved.
    """
    taken, base = set(cache.storage.names(DAMAGED)), name.rpartition("/")[2]
    names = chain([base], (f"{base}.{number}" for number in count(2)))
    free = f"{DAMAGED}/{next(name for name in names if name not in taken)}"
    cache.storage.move(name, free)
    return free
