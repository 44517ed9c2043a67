"""A folder of this machine with copies of remote bytes, bounded in size.

Any number of threads, processes and caches may share it. The sum of its files never exceeds the
limit: files are added under a lock, which also guards the running total, and the least recently
used ones are removed. A reader needs no lock: a removed file was a copy, and an open file stays
readable. Readers verify what they get.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.files import user_cache

LIMIT = 10 << 30
_LOCK, _TEMPORARY = ".lock", ".tmp"


class CopyFolder:
    """Copies of byte strings by (location, key), bounded in size.

    Args:
        path: the folder; created when something is first kept.
        limit: largest size of all files together, in bytes.
    """

    def __init__(self, path: str | Path, limit: int = LIMIT) -> None:
        if limit < 1:
            raise InvalidArgumentError(
                f"a folder of copies has room for {limit} bytes; give at least 1"
            )
        self.path = Path(path)
        self.limit = limit

    @classmethod
    def default(cls) -> CopyFolder:
        """Return the folder and limit of SPARSELOGITS_COPY and SPARSELOGITS_COPY_GB.

        Defaults are a folder in the user's cache folder, and 10 GiB.

        Raises:
            InvalidArgumentError: the size is not a number above zero.
        """
        folder = os.environ.get("SPARSELOGITS_COPY")
        size = os.environ.get("SPARSELOGITS_COPY_GB", str(LIMIT >> 30))
        try:
            limit = int(float(size) * (1 << 30))
        except (ValueError, OverflowError) as error:
            raise InvalidArgumentError(
                f"SPARSELOGITS_COPY_GB={size!r} is not a number; give a size in GiB, such as 10"
            ) from error
        return cls(Path(folder) if folder else user_cache() / "copy", limit)

    def get(self, location: str, key: str) -> bytes | None:
        """Return the bytes of a key; None if there are none."""
        path = self._path(location, key)
        try:
            with path.open("rb") as file:
                with contextlib.suppress(OSError):  # the folder is read-only
                    now = time.time_ns()
                    os.utime(file.fileno(), ns=(now, now))
                return file.read()
        except OSError:  # usually because there is none
            return None

    def put(self, location: str, key: str, data: bytes) -> None:
        """Store bytes under a key, and evict other entries if the folder would exceed its limit.

        Bytes larger than the limit are not stored. If the folder cannot be written, a warning is
        issued and the bytes are not stored.
        """
        if len(data) > self.limit:
            return
        path = self._path(location, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as lock:
                if path.exists():
                    return
                total = _total(lock) + len(data)
                if total > self.limit:
                    total = len(data) + self._make_room(len(data))
                os.pwrite(
                    lock, b"%20d" % total, 0
                )  # before the file: after a kill the total is too large, not too small
                temporary = path.parent / _TEMPORARY
                temporary.write_bytes(data)
                temporary.replace(path)
        except OSError as error:
            warnings.warn(
                f"cannot keep a copy in {self.path} ({error.strerror or error}): bytes are fetched "
                "again each time. Make room there, or set SPARSELOGITS_COPY to another folder",
                SparseLogitsWarning,
                stacklevel=2,
            )

    def drop(self, location: str, prefix: str) -> bool:
        """Remove everything under keys with a prefix; return whether there was anything."""
        found = list(self._path(location, "").glob(f"{_escaped(prefix)}*"))
        for path in found:
            path.unlink(missing_ok=True)
        return bool(found)

    def _path(self, location: str, key: str) -> Path:
        return self.path / hashlib.sha256(location.encode()).hexdigest()[:16] / _escaped(key)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _make_room(self, wanted: int) -> int:
        """Remove the least recently used until an eighth and `wanted` are free; return the sum."""
        files = []
        for path in self.path.glob("*/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                age = 0 if path.name == _TEMPORARY else facts.st_mtime_ns  # of a dead writer
                files.append((age, facts.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= max(0, self.limit * 7 // 8 - wanted):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _total(lock: int) -> int:
    text = os.pread(lock, 20, 0)
    return int(text) if text.strip().isdigit() else 0


def _escaped(key: str) -> str:
    return key.replace("/", "+")
