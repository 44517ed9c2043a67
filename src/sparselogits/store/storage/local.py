"""Store a cache in a local folder. A created file is complete and survives a power failure.

The bytes are written under a unique temporary name, synced, dropped from the page cache, read back
and compared. Then the file is linked under its final name, or renamed if the file system has no
hard links, and the folder is synced. Some network file systems cannot sync.
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

_UNREACHABLE = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE}
"""Error numbers that do not mean that the file is missing or damaged."""


class LocalStorage:
    """Storage in a local folder or on a mounted network file system; see `Storage`.

    The first write creates the folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def location(self) -> str:
        """Path of the folder."""
        return str(self.root)

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files and folders in a folder, without temporary ones."""
        try:
            path = self.root / folder
            with _access_errors(path, of_data=False), os.scandir(path) as entries:
                return sorted(e.name for e in entries if not e.name.startswith(TEMPORARY_PREFIX))
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        path = self.root / name
        with _access_errors(path, of_data=False):
            return path.stat().st_size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file; see `ReadableFiles.read`.

        Raises:
            CacheCorruptionError: the path is not a regular file.
        """
        with self._opened(name) as descriptor:
            if stop is None:
                stop = os.fstat(descriptor).st_size
            return _read_exactly(descriptor, start, stop)

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return the size of a file in bytes, and its last `length` bytes.

        Raises:
            CacheCorruptionError: the path is not a regular file.
        """
        with self._opened(name) as descriptor:
            size = os.fstat(descriptor).st_size
            return size, _read_exactly(descriptor, max(0, size - length), size)

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file durably and atomically; return False if the file already exists.

        Raises:
            StorageError: the file cannot be written; no partial file remains.
            CacheCorruptionError: the bytes read back differ from the bytes written.
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
        """Write a file atomically, replacing an existing one; errors are those of `write_whole`."""
        write_whole(self.root / name, data)

    def move(self, name: str, to: str) -> None:
        """Rename a file, and create the new folder if it is missing; see `Storage.move`."""
        source, target = self.root / name, self.root / to
        with _access_errors(source):
            source.lstat()  # raises FileNotFoundError, which `disk_errors` would convert
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if not move(source, target):
                raise CacheError(
                    f"cannot rename {source}: {target} already exists; move it away, then try again"
                )

    def clean(self, folder: str) -> list[str]:
        """Remove temporary files of dead processes; return their names."""
        return clean_leftovers(self.root / folder)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Open a regular file; yield its descriptor."""
        path = self.root / name
        with _access_errors(path):
            try:
                descriptor = open_regular(path)
            except NotRegularError as error:
                raise CacheCorruptionError(
                    f"{path}: {error.strerror}. Move it away, then build its windows again or "
                    "restore it from a copy"
                ) from error
            try:
                yield descriptor
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _access_errors(path: Path, *, of_data: bool = True) -> Iterator[None]:
    """Convert errors within a block that do not mean missing or damaged data to `StorageError`.

    An error with another number than those in `_UNREACHABLE`, such as EIO, may mean damage if the
    block reads the data of a file (`of_data`).
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if of_data and error.errno not in _UNREACHABLE:
            raise
        raise StorageError(
            f"cannot access {path}: {error.strerror}. This does not mean that the data is damaged: "
            "check permissions, the disk and the limit of open files, then try again"
        ) from error


def _write_synced(path: Path, data: bytes) -> None:
    """Write a new file, sync it, and drop it from the page cache."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:  # a signal or a nearly full disk may cut a write short
            view = view[os.write(descriptor, view) :]
        sync(descriptor)
        if hasattr(os, "posix_fadvise"):  # so that reading back accesses the disk
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _require_same(path: Path, data: bytes) -> None:
    """Validate that a file contains exactly the given bytes."""
    with path.open("rb", buffering=0) as file:
        if _read_exactly(file.fileno(), 0, len(data) + 1) != data:
            raise CacheCorruptionError(
                f"{path}: the bytes read back differ from the bytes written. Check the disk "
                "(dmesg, smartctl), then start the same command again"
            )


def _read_exactly(descriptor: int, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of an open file, or fewer if the file ends before `stop`."""
    parts: list[bytes] = []
    while start < stop:
        part = os.pread(descriptor, min(stop - start, 1 << 30), start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
