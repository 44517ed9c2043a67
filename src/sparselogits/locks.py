"""Take advisory locks on files, which the kernel releases when their process dies.

A lock is a lock file with `flock`. Where the file system (some network mounts) or the platform
(Windows) has no such locks, the result is `UNSUPPORTED`, and the caller does only what is safe
without a lock.
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
    """The result of an attempt to take a lock."""

    ALONE = "alone"
    """This process holds the lock alone."""
    SHARED = "shared"
    """This process holds the lock, and others may share it."""
    TAKEN = "taken"
    """Another process holds the lock."""
    UNSUPPORTED = "unsupported"
    """The file system has no locks."""


class FileLock:
    """A lock on a file; `lock_file` holds one for a block.

    Args:
        path: the lock file, created with its folder where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = Held.TAKEN
        self._descriptor: int | None = None

    def take(self, *, alone: bool, wait: bool) -> Held:
        """Take the lock, or change between exclusive and shared.

        The change from `ALONE` to `SHARED` is not atomic: another process may hold the lock alone
        in between, so the caller has to check the guarded files again.

        Args:
            alone: whether to exclude all other processes; else they may share the lock.
            wait: whether to wait for the lock; else `TAKEN` is returned at once, without a lock.

        Raises:
            StorageError: the lock file cannot be created.
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
            self.release()  # its last holder has removed the file: take the new one

    def remove(self) -> None:
        """Remove the lock file; this process still holds the lock."""
        if self.held in (Held.ALONE, Held.SHARED):
            with contextlib.suppress(OSError):
                self.path.unlink()

    def release(self) -> None:
        """Release the lock."""
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
    """Take a lock for a block, if it is free (see `held`); an exclusive one removes the lock file.

    Args:
        path: the lock file.
        alone: see `FileLock.take`.
        wait: see `FileLock.take`.

    Raises:
        StorageError: the lock file cannot be created.
    """
    lock = FileLock(path)
    try:
        lock.take(alone=alone, wait=wait)
        yield lock
    finally:
        if lock.held is Held.ALONE:
            lock.remove()
        lock.release()
