"""Advisory locks on files, released by the kernel when their process dies.

A lock is a lock file and `flock`. Where the file system has none (some network mounts) or the
platform has none (Windows), a lock is `UNSUPPORTED`: the caller then does only what is safe
without.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from sparselogits.files import disk_errors, fcntl

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class Held(Enum):
    """What became of an attempt to take a lock."""

    ALONE = "alone"
    """No other process holds it."""
    SHARED = "shared"
    """Other processes may hold it too, all of them shared."""
    TAKEN = "taken"
    """Another process holds it."""
    UNSUPPORTED = "unsupported"
    """The file system has no locks."""


class FileLock:
    """A lock file, open; `lock_file` makes one.

    Args:
        path: the lock file; made where it is missing, and its folder too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = Held.TAKEN
        self._descriptor: int | None = None

    def take(self, *, alone: bool, wait: bool) -> Held:
        """Take the lock, or change how it is held.

        To go from `ALONE` to `SHARED` is not atomic: another process may have held it alone in
        between, so what it guards has to be looked at again.

        Args:
            alone: no other process may hold it; else others may hold it in the same way.
            wait: until that is so; else `TAKEN` is returned at once, and nothing is held.

        Raises:
            StorageError: the lock file cannot be made.
        """
        if fcntl is None:
            self.held = Held.UNSUPPORTED
            return self.held
        kind = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB)
        while True:
            if self._descriptor is None:
                with disk_errors(self.path):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                    self._descriptor = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(self._descriptor, kind)
            except OSError as error:
                self.release()
                if error.errno in _UNSUPPORTED:
                    self.held = Held.UNSUPPORTED
                elif error.errno in _TAKEN:
                    self.held = Held.TAKEN
                else:
                    with disk_errors(self.path):
                        raise
                return self.held
            if self._is_current():
                self.held = Held.ALONE if alone else Held.SHARED
                return self.held
            self.release()  # of a file that its last holder has removed: take the new one

    def remove(self) -> None:
        """Remove the lock file, so that no trace is left; the lock stays held by this process."""
        if self.held in (Held.ALONE, Held.SHARED):
            with contextlib.suppress(OSError):
                self.path.unlink()

    def release(self) -> None:
        """Let go of the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.held = Held.TAKEN

    def _is_current(self) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False


@contextlib.contextmanager
def lock_file(path: Path, *, alone: bool = True, wait: bool = False) -> Iterator[FileLock]:
    """Take a lock for a block, or say that it is taken. Who held it alone removes the lock file.

    Args:
        path: the lock file.
        alone: see `FileLock.take`.
        wait: see `FileLock.take`.

    Raises:
        StorageError: the lock file cannot be made.
    """
    lock = FileLock(path)
    try:
        lock.take(alone=alone, wait=wait)
        yield lock
    finally:
        if lock.held is Held.ALONE:
            lock.remove()
        lock.release()
