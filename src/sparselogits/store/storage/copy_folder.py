"""A folder of this machine that holds copies of bytes that live elsewhere, up to a limit.

Shared by any number of threads and processes, and by any number of caches. The sum of its files
never exceeds the limit: files are added under a lock, which also guards the running total, and the
least recently used ones make room. A reader needs no lock: a file that vanishes was a copy, and a
file that is open stays readable. Nothing here is trusted; whoever reads checks.
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
    """Copies of byte strings under (place, key), bounded in size.

    Args:
        path: the folder; made when something is first kept.
        limit: bytes its files may take together.
    """

    def __init__(self, path: str | Path, limit: int = LIMIT) -> None:
        if limit < 1:
            raise InvalidArgumentError(f"a copy of at most {limit} bytes holds nothing")
        self.path = Path(path)
        self.limit = limit

    @classmethod
    def default(cls) -> CopyFolder:
        """$SPARSELOGITS_COPY, or the user's cache folder; $SPARSELOGITS_COPY_GB, or 10 GiB.

        Raises:
            InvalidArgumentError: a size that is no number above zero.
        """
        folder = os.environ.get("SPARSELOGITS_COPY")
        size = os.environ.get("SPARSELOGITS_COPY_GB", str(LIMIT >> 30))
        try:
            limit = int(float(size) * (1 << 30))
        except (ValueError, OverflowError) as error:
            raise InvalidArgumentError(f"SPARSELOGITS_COPY_GB={size!r} is not a number") from error
        return cls(Path(folder) if folder else user_cache() / "copy", limit)

    def get(self, place: str, key: str) -> bytes | None:
        """What is held under a key; None when nothing is."""
        path = self._path(place, key)
        try:
            with path.open("rb") as file:
                with contextlib.suppress(OSError):  # a copy that may only be read
                    now = time.time_ns()
                    os.utime(file.fileno(), ns=(now, now))
                return file.read()
        except OSError:  # most of all, that it is not there
            return None

    def put(self, place: str, key: str, data: bytes) -> None:
        """Hold bytes under a key, if they fit; others make room.

        A folder that cannot be written costs a warning and further requests, nothing else.
        """
        if len(data) > self.limit:
            return
        path = self._path(place, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as lock:
                if path.exists():
                    return
                total = _total(lock) + len(data)
                if total > self.limit:
                    total = len(data) + self._make_room(len(data))
                os.pwrite(lock, b"%20d" % total, 0)  # before the file: a kill errs on the safe side
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

    def drop(self, place: str, prefix: str) -> bool:
        """Let go of everything under keys that begin so; whether there was anything."""
        found = list(self._path(place, "").glob(f"{_escaped(prefix)}*"))
        for path in found:
            path.unlink(missing_ok=True)
        return bool(found)

    def _path(self, place: str, key: str) -> Path:
        return self.path / hashlib.sha256(place.encode()).hexdigest()[:16] / _escaped(key)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _make_room(self, wanted: int) -> int:
        """Remove the least recently used until an eighth and `wanted` is free; the sum left."""
        files = []
        for path in self.path.glob("*/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                age = 0 if path.name == _TEMPORARY else facts.st_mtime_ns  # a dead writer's
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
