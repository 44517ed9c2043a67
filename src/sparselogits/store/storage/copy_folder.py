"""Store copies of remote bytes in a local folder of bounded size.

Any number of threads, processes and caches may share the folder. The total size of its files is
limited: files are added under a lock, which also protects the running total, and the least recently
used files are evicted. Reading needs no lock, because an open file remains readable when it is
evicted. Callers verify the bytes that they read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import warnings
from pathlib import Path

from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.files import user_cache

LIMIT = 10 << 30
"""Default limit on the total size of a folder, in bytes."""

_LOCK = ".lock"  # contains the total size of the files
_TEMPORARY = ".tmp"


class CopyFolder:
    """Folder of bounded size that stores copies of byte strings by location and key.

    Args:
        path: path of the folder, which is created when the first copy is stored.
        limit: largest total size of the files in bytes.

    Raises:
        InvalidArgumentError: the limit is below one byte.

    Examples:
        >>> copies = CopyFolder("copies", limit=1 << 30)
        >>> copies.put("s3://bucket/cache", "a-key", b"data")
        >>> copies.get("s3://bucket/cache", "a-key")
        b'data'
    """

    def __init__(self, path: str | Path, limit: int = LIMIT) -> None:
        if limit < 1:
            raise InvalidArgumentError(
                f"the limit of a folder of copies is {limit} bytes; give at least 1"
            )
        self.path = Path(path)
        self.limit = limit

    @classmethod
    def default(cls) -> CopyFolder:
        """Return the folder with the path and limit that environment variables give.

        SPARSELOGITS_COPY is the path, by default `copy` in the user's cache folder.
        SPARSELOGITS_COPY_GB is the limit in GiB, by default 10.

        Raises:
            InvalidArgumentError: the limit is not a positive number.
        """
        folder = os.environ.get("SPARSELOGITS_COPY")
        size = os.environ.get("SPARSELOGITS_COPY_GB", str(LIMIT >> 30))
        try:
            limit = int(float(size) * (1 << 30))
        except (ValueError, OverflowError) as error:
            raise InvalidArgumentError(
                f"SPARSELOGITS_COPY_GB={size!r} is not a finite number; give a size in GiB, "
                "such as 10"
            ) from error
        return cls(Path(folder) if folder else user_cache() / "copy", limit)

    def get(self, location: str, key: str) -> bytes | None:
        """Return the bytes stored under a key, and mark them as used.

        The result is None if there are no bytes or they cannot be read.
        """
        path = self._path(location, key)
        try:
            with path.open("rb") as file:
                with contextlib.suppress(OSError):  # the folder may be read-only
                    now = time.time_ns()
                    os.utime(file.fileno(), ns=(now, now))
                return file.read()
        except OSError:
            return None

    def put(self, location: str, key: str, data: bytes) -> None:
        """Store bytes under a key, and evict other files if the folder would exceed its limit.

        A copy that exists under the key is not replaced. Bytes larger than the limit are not
        stored. If the folder cannot be written, the bytes are not stored and a warning is issued.
        """
        if len(data) > self.limit:
            return
        path = self._path(location, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            with os.fdopen(descriptor, "rb+"):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if path.exists():
                    return
                text = os.pread(descriptor, 20, 0)
                total = len(data) + (int(text) if text.strip().isdigit() else 0)
                if total > self.limit:
                    total = len(data) + self._make_room(len(data))
                # written before the file, so that after a kill the total is not too small
                os.pwrite(descriptor, b"%20d" % total, 0)
                temporary = path.parent / _TEMPORARY
                temporary.write_bytes(data)
                temporary.replace(path)
        except OSError as error:
            warnings.warn(
                f"cannot store a copy in {self.path} ({error.strerror or error}), so bytes "
                "are downloaded again at each use. Free disk space, or set SPARSELOGITS_COPY to "
                "another folder",
                SparseLogitsWarning,
                stacklevel=2,
            )

    def drop(self, location: str, prefix: str) -> bool:
        """Remove the copies of all keys with a prefix; return whether there were such copies.

        Raises:
            OSError: a copy cannot be removed, as from a read-only folder.
        """
        found = list(self._path(location, "").glob(f"{_escaped(prefix)}*"))
        for path in found:
            path.unlink(missing_ok=True)
        return bool(found)

    def _path(self, location: str, key: str) -> Path:
        return self.path / hashlib.sha256(location.encode()).hexdigest()[:16] / _escaped(key)

    def _make_room(self, wanted: int) -> int:
        """Evict the least recently used files to free `wanted` bytes and an eighth of the limit.

        Returns:
            Total size of the remaining files in bytes.
        """
        files = []
        for path in self.path.glob("*/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                # a temporary file belongs to a dead writer, because the lock is held
                used = 0 if path.name == _TEMPORARY else facts.st_mtime_ns
                files.append((used, facts.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= max(0, self.limit * 7 // 8 - wanted):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _escaped(key: str) -> str:
    """Return the file name for a key."""
    return key.replace("/", "+")
