"""Writing files and folders that are whole or absent, and cleaning up after writers that died.

Everything the library writes to a disk goes through this file: the bytes go to a temporary name in
the same folder, are flushed and synced, and are renamed to the final name; then the folder is
synced. So a reader sees the file as it was before or as it is after, also across a power cut, and
a full disk changes nothing. (Shards add a read-back and an exclusive link: store/storage/local.py.)

A temporary name tells which process made it. The next writer in the same folder removes those
whose process is dead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from sparselogits.errors import InvalidArgumentError, SparseLogitsError, StorageError

fcntl: Any = import_module("fcntl") if os.name == "posix" else None
"""Locks of the kernel; None on Windows, which has others."""

TEMPORARY_PREFIX = ".tmp-"
_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{12})-(\d+)(?:-(\d+))?-[0-9a-f]{12}")
_DAY = 86_400.0
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL_ELSEWHERE = re.compile(
    r"No space left|Disk quota exceeded|file write failed|inline_container|PytorchStreamWriter"
    r"|iostream error"
)
"""How safetensors and torch, which raise no `OSError`, say that a write failed."""


def write_whole(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Write a small file whole or not at all; its folder is made where it is missing.

    Processes may write the same file at the same time: the last one to finish wins.

    Args:
        path: the file; what is there must be a regular file.
        content: text is written as UTF-8.
        replace: whether a file that is there is replaced; else it stays, and this one is dropped.

    Raises:
        StorageError: it cannot be written; what stood there before is unchanged.
        InvalidArgumentError: something other than a regular file is there.
    """
    with writing_whole(path, replace=replace) as handle:
        handle.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_whole(
    path: Path, *, replace: bool = True, name: Callable[[], str] | None = None
) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name when the block ends without an exception.

    An `OSError` inside the block counts as a failure to write; after an exception of any kind an
    existing file is unchanged.

    Args:
        path: see `write_whole`.
        replace: see `write_whole`.
        name: returns the name of the file when the block has ended, for a file that is named by its
            content; None for the name in `path`.

    Raises:
        StorageError: see `write_whole`.
        InvalidArgumentError: see `write_whole`.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_file_or_nothing(path)
        clean_leftovers(path.parent)
        temporary = temporary_name(path)
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            handle = open(descriptor, "wb")  # noqa: PTH123, SIM115 (of a descriptor; closed below)
            try:
                with contextlib.suppress(OSError):  # a private file stays private
                    os.fchmod(descriptor, stat.S_IMODE(path.lstat().st_mode))
                yield handle
                handle.flush()
                sync(descriptor)
                handle.close()  # network file systems may say only now that the disk is full
            finally:
                with contextlib.suppress(OSError):  # closing flushes again what did not fit
                    handle.close()
            target = path if name is None else path.with_name(name())
            if replace:
                temporary.replace(target)
            else:
                take_name(temporary, target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        sync_folder(path.parent)


def take_name(source: Path, target: Path) -> bool:
    """Give a file a name, unless that is taken; returns whether it was free.

    Afterwards the file may be there under its old name as well. Exclusive where the file system
    has hard links, and where it has not, among processes that use this function on one machine.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # exFAT, SMB and others have no hard links
        with _folder_lock(target.parent):
            if os.path.lexists(target):
                return False
            source.rename(target)
    return True


def move(source: Path, target: Path) -> bool:
    """Rename a file, or whatever stands there, to a name that is free; returns whether it was.

    Raises:
        FileNotFoundError: there is nothing to move.
    """
    with _folder_lock(target.parent):
        if os.path.lexists(target):
            return False
        source.rename(target)
    sync_folder(target.parent)
    sync_folder(source.parent)
    return True


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of the same block for this folder, where it can be locked itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # network file systems lock no folders
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder whose content stands at a path when the block ends in order.

    For what is made in many files, by other libraries above all: models, datasets. Everything in it
    is synced first. A new folder appears by one rename; an empty one that is there already (it may
    be a mount point) is filled by one rename per entry.

    Args:
        path: a folder that is missing or empty.

    Raises:
        StorageError: it cannot be written; nothing is left behind.
        InvalidArgumentError: something is there already.
    """
    with disk_errors(path):
        require_new_folder(path)
        inside = path.is_dir()
        parent = path if inside else path.parent
        parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(parent)
        temporary = temporary_name(path / "folder" if inside else path)
        try:
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            if inside:
                for entry in sorted(temporary.iterdir()):
                    entry.rename(path / entry.name)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(parent)


def require_new_folder(path: Path) -> None:
    """Validate that a folder is missing or empty, so that it can be filled.

    Leftovers of dead writers are removed from it first.

    Raises:
        InvalidArgumentError: something is there.
    """
    clean_leftovers(path)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise InvalidArgumentError(f"{path} is no folder; name a new or empty folder")
    found = sorted(entry.name for entry in path.iterdir() if not is_clutter(entry.name))
    if found:
        raise InvalidArgumentError(
            f"{path} is not empty (it holds {found[0]}); name a new or empty folder"
        )


def is_clutter(name: str) -> bool:
    """Return whether an operating system, not a user, put a name into a folder.

    A file system's own folder at the root of a volume, macOS's view settings, and what NFS keeps of
    a file that was removed while it was open.
    """
    return name in ("lost+found", ".DS_Store") or name.startswith(".nfs")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write into a `StorageError` that names the path and what to do.

    Besides `OSError`, what safetensors and torch raise on a full disk.
    """
    try:
        yield
    except SparseLogitsError:
        raise
    except OSError as error:
        raise StorageError(_cannot_write(path, error)) from error
    except Exception as error:
        if not _FULL_ELSEWHERE.search(str(error)):
            raise
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise StorageError(_cannot_write(path, full)) from error


def _cannot_write(path: Path, error: OSError) -> str:
    if error.errno in _FULL:
        advice = "Make room on its disk, or name a path on another one"
    elif error.errno in _FORBIDDEN:
        advice = "Make its folder writable, or name another path"
    elif error.errno == errno.ENAMETOOLONG:
        advice = "Name a shorter path"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY):
        advice = "Name a path whose folder exists or can be made, and that is free"
    else:
        advice = "Check the path and its disk"
    return (
        f"cannot write {path}: {error.strerror or error}; nothing half-written was left under that "
        f"name. {advice}; then start the same command again"
    )


def require_file_or_nothing(path: Path) -> None:
    """Validate that a path may be written: a regular file is there, or nothing.

    Called again by `write_whole`; commands call it before expensive work starts.

    Raises:
        InvalidArgumentError: for a folder, a link, a device, a pipe or a socket.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # most of all, that nothing is there
        return
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
    }
    kind = next((word for test, word in kinds.items() if test(mode)), "no regular file")
    raise InvalidArgumentError(
        f"{path} is {kind}; a file is written only where a regular file or nothing is. Name "
        "another path (for a link, the file that it points to)"
    )


def temporary_name(path: Path) -> Path:
    """A new name beside a path, which tells the machine and the process that use it."""
    pid = os.getpid()
    return path.with_name(
        f"{TEMPORARY_PREFIX}{_host()}-{pid}-{_started(pid)}-{secrets.token_hex(6)}"
    )


def clean_leftovers(folder: Path) -> list[str]:
    """Remove the temporary files and folders of dead writers from a folder; returns their names.

    Whether a process of this machine is alive can be asked. What another machine left is removed
    when nothing in it has changed for a day.
    """
    removed = []
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.startswith(TEMPORARY_PREFIX))
    except OSError:
        return []
    for name in names:
        found = _TEMPORARY.fullmatch(name)
        path = folder / name
        if found is None or not _is_dead(path, *_words(found)):
            continue
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(name)
    return removed


def is_leftover(name: str) -> bool:
    """Return whether a temporary name is of a process of this machine that is dead."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and found[1] == _host() and _is_dead(Path(name), *_words(found))


def _words(found: re.Match[str]) -> tuple[str, int, str | None]:
    return found[1], int(found[2]), found[3]


def _is_dead(path: Path, host: str, pid: int, started: str | None) -> bool:
    if host == _host():
        return not _alive(pid) or (started not in (None, "0") and started != _started(pid))
    try:
        newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
    except OSError:
        return False
    return time.time() - newest > _DAY


@lru_cache(maxsize=1)
def _host() -> str:
    """A name for the set of processes whose pids mean something here: host, boot, pid namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; "0" where that cannot be asked.

    It distinguishes a process from a later one with the same number.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
        return line.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def sync(descriptor: int) -> None:
    """Have an open file's bytes on the disk, where its file system can do so.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames within a folder survive a power cut, where its file system can do so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot, and need not
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have all files of a folder, which another library wrote, on the disk."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_folder(path)
        else:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                sync(descriptor)
            finally:
                os.close(descriptor)
    sync_folder(folder)


def user_cache() -> Path:
    """The folder of this user for what can be made or fetched again."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sparselogits"
