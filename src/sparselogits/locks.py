"""Acquire advisory file locks, which the kernel releases when the process dies.

A lock is held by `flock` on a lock file. If the file system (some network mounts) or the platform
(Windows) does not support it, the result is `UNSUPPORTED`, and the caller must restrict itself to
operations that are safe without a lock.
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
    """State of a `FileLock`."""

    ALONE = "alone"
    """This process holds an exclusive lock."""
    SHARED = "shared"
    """This process holds a shared lock, and other processes may hold it as well."""
    TAKEN = "taken"
    """This process does not hold the lock: another does, or it was not acquired or is released."""
    UNSUPPORTED = "unsupported"
    """The file system or platform does not support locks."""


class FileLock:
    """Advisory lock on a lock file; `lock_file` acquires one for a block.

    Args:
        path: path of the lock file, which `take` creates with its folder if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = Held.TAKEN
        self._descriptor: int | None = None

    def take(self, *, alone: bool, wait: bool) -> Held:
        """Acquire the lock, or convert it between exclusive and shared; return its new state.

        A conversion is not atomic: another process may hold an exclusive lock in between, so the
        caller must check the guarded files again. If the attempt fails, this process holds no lock.

        Args:
            alone: whether to acquire an exclusive lock instead of a shared one.
            wait: whether to wait for another process to release the lock, instead of returning
                `TAKEN` at once.

        Raises:
            StorageError: the lock file cannot be created or locked.
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
            self.release()  # the last holder removed this file: lock the new one

    def remove(self) -> None:
        """Try to remove the lock file if this process holds the lock; the lock is not released."""
        if self.held in (Held.ALONE, Held.SHARED):
            with contextlib.suppress(OSError):
                self.path.unlink()

    def release(self) -> None:
        """Release the lock, if it is held, and set the state to `TAKEN`."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.held = Held.TAKEN

    def _is_current(self) -> bool:
        """Return whether the open lock file is still the file at the path."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            return False


@contextlib.contextmanager
def lock_file(path: Path, *, alone: bool = True, wait: bool = False) -> Iterator[FileLock]:
    """Try to hold a lock during a block; at the end, remove the lock file if the lock is exclusive.

    The block also runs if another process holds the lock or locks are not supported; `held` of the
    yielded lock states the result. The arguments and errors are those of `FileLock.take`.
    """
    lock = FileLock(path)
    try:
        lock.take(alone=alone, wait=wait)
        yield lock
    finally:
        if lock.held is Held.ALONE:
            lock.remove()
        lock.release()
