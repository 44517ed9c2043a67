"""Where a cache's files live: the one seam between the store and a disk or an object store.

The store asks for very little: list the names in a folder, read a file or a range of it, create a
file that must not exist yet, and set one aside. Every file is written once, whole, and never
changed afterwards, so there is nothing to lock and nothing to merge.

`LocalStorage` promises that a file it created is complete and survives a power cut: the bytes go
to a unique temporary name, are flushed and synced, dropped from the page cache, read back and
compared, and only then linked under their final name, whose folder is synced too.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

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


class Storage(Protocol):
    """A folder of write-once files; names are relative and use `/`."""

    @property
    def location(self) -> str:
        """The folder, for messages."""
        ...

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder; empty where there is no such folder."""
        ...

    def size(self, name: str) -> int:
        """Length of a file in bytes. Raises FileNotFoundError."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start to stop of a file, fewer where it ends before. Raises FileNotFoundError."""
        ...

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """A file's length in bytes, and its last `length` bytes. Raises FileNotFoundError."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, whole or not at all; False where the name is taken already."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole whether or not the name is taken: for the card alone."""
        ...

    def move(self, name: str, to: str) -> None:
        """Give a file another name, which must be free."""
        ...

    def clean(self, folder: str) -> list[str]:
        """Remove what dead writers left in a folder; returns the names."""
        ...

    def forget(self, name: str) -> bool:
        """Let go of a copy between here and where a file lives; whether there was one."""
        ...


class LocalStorage:
    """Files under a folder of this machine (or of a network file system mounted on it).

    Args:
        root: the folder; created on the first write.
        step: called with a word before each step of a write. Tests kill the process there.
    """

    def __init__(self, root: str | Path, *, step: Callable[[str], None] | None = None) -> None:
        self.root = Path(root)
        self._step = step or _pass_by

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self.root)

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder, temporaries left out."""
        try:
            with os.scandir(self.root / folder) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(TEMPORARY_PREFIX))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        """Length of a file in bytes."""
        return (self.root / name).stat().st_size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start to stop of a file."""
        with self._opened(name) as descriptor:
            if stop is None:
                stop = os.fstat(descriptor).st_size
            return _read_exactly(descriptor, start, stop)

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """A file's length in bytes, and its last `length` bytes."""
        with self._opened(name) as descriptor:
            size = os.fstat(descriptor).st_size
            return size, _read_exactly(descriptor, max(0, size - length), size)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file durably under a name that is free.

        Returns:
            False where another writer had put a complete file there before.

        Raises:
            StorageError: the disk is full, the folder is read-only, or the like; nothing is left.
            CacheCorruptionError: the disk gave back other bytes than were written.
        """
        path = self.root / name
        temporary = temporary_name(path)
        self._step("begin")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _removed_at_last(temporary):
                self._write_synced(temporary, data)
                _require_same(temporary, data)
                self._step("verified")
                created = take_name(temporary, path)
                self._step("linked")
        sync_folder(path.parent)
        self._step("done")
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole, in the place of what is there."""
        write_whole(self.root / name, data)

    def move(self, name: str, to: str) -> None:
        """Rename a file to a free name."""
        source, target = self.root / name, self.root / to
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not move(source, target):
                raise CacheError(f"{target} exists already; move it away, then try again")

    def clean(self, folder: str) -> list[str]:
        """Remove temporaries of writers on this machine that are dead; returns their names.

        Those of other machines, and of processes still alive, are left alone.
        """
        return clean_leftovers(self.root / folder)

    def forget(self, name: str) -> bool:
        """Nothing is held."""
        return False

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
                    f"cannot open {path}: {error.strerror}. This says nothing about the data there"
                ) from error
            raise
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _write_synced(self, path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._step("opened")
            view, half = memoryview(data), len(data) // 2
            while view:  # a write may be cut short, by a signal or a nearly full disk
                view = view[os.write(descriptor, view[: max(half, 1)]) :]
                self._step("writing")
            sync(descriptor)
            self._step("synced")
            if hasattr(os, "posix_fadvise"):  # so that the reading back reaches the disk
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _pass_by(_: str) -> None:
    pass


@contextlib.contextmanager
def _removed_at_last(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _require_same(path: Path, data: bytes) -> None:
    with path.open("rb", buffering=0) as file:
        if _read_exactly(file.fileno(), 0, len(data) + 1) != data:
            raise CacheCorruptionError(
                f"{path}: the disk gave back other bytes than were written; check the disk (dmesg, "
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
