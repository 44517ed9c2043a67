"""A folder as a `Storage`. A file that it created is complete and survives a power cut.

The bytes go to a unique temporary name, are flushed and synced, dropped from the page cache, read
back and compared, and only then linked under their final name, whose folder is synced too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from sparselogits.errors import CacheCorruptionError, CacheError, StorageError
from sparselogits.files import (
    TEMPORARY_PREFIX,
    clean_leftovers,
    disk_errors,
    move,
    sync,
    sync_folder,
    take_name,
    temporary_name,
    write_whole,
)
from sparselogits.untrusted import NotRegularError, open_regular

_REFUSED = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}


class LocalStorage:
    """Files under a folder of this machine, or of a network file system mounted on it.

    Args:
        root: the folder; created on the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def location(self) -> str:
        """Path of the folder."""
        return str(self.root)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files in a folder, without temporary ones."""
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(TEMPORARY_PREFIX))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        """Return the length of a file in bytes."""
        return (self.root / name).stat().st_size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes start to stop of a file."""
        with self._opened(name) as descriptor:
            if stop is None:
                stop = os.fstat(descriptor).st_size
            return _read_exactly(descriptor, start, stop)

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return the length of a file in bytes, and its last `length` bytes."""
        with self._opened(name) as descriptor:
            size = os.fstat(descriptor).st_size
            return size, _read_exactly(descriptor, max(0, size - length), size)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file durably under a name that is free.

        Returns:
            False if another writer has put a complete file there before.

        Raises:
            StorageError: the disk is full, the folder is read-only, or the like; nothing is left.
            CacheCorruptionError: the disk returned other bytes than were written.
        """
        path = self.root / name
        temporary = temporary_name(path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_synced(temporary, data)
                _require_same(temporary, data)
                created = take_name(temporary, path)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
        sync_folder(path.parent)
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, replacing what is there."""
        write_whole(self.root / name, data)

    def move(self, name: str, to: str) -> None:
        """Rename a file to a free name."""
        source, target = self.root / name, self.root / to
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not move(source, target):
                raise CacheError(f"{target} exists already; move it away, then try again")

    def clean(self, folder: str) -> list[str]:
        """Remove temporary files of dead writers of this machine; return their names.

        Those of other machines, and of processes that are alive, stay.
        """
        return clean_leftovers(self.root / folder)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        path = self.root / name
        try:
            descriptor = open_regular(path)
        except NotRegularError as error:
            raise CacheCorruptionError(
                f"{path}: {error.strerror}. Move it away, then build its windows again or restore "
                "it from a copy"
            ) from error
        except OSError as error:
            if error.errno in _REFUSED:
                raise StorageError(
                    f"cannot open {path}: {error.strerror}. This does not mean that the data is "
                    "damaged: check permissions and the limit of open files, then try again"
                ) from error
            raise
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _write_synced(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:  # a write may be cut short, by a signal or a nearly full disk
            view = view[os.write(descriptor, view) :]
        sync(descriptor)
        if hasattr(os, "posix_fadvise"):  # so that the reading back reaches the disk
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _require_same(path: Path, data: bytes) -> None:
    with path.open("rb", buffering=0) as file:
        if _read_exactly(file.fileno(), 0, len(data) + 1) != data:
            raise CacheCorruptionError(
                f"{path}: the disk returned other bytes than were written. Check the disk (dmesg, "
                "smartctl), then start the same command again"
            )


def _read_exactly(descriptor: int, start: int, stop: int) -> bytes:
    parts: list[bytes] = []
    while start < stop:
        part = os.pread(descriptor, min(stop - start, 1 << 30), start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
