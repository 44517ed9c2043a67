"""Write files and folders completely or not at all, and remove the leftovers of dead processes.

A file's bytes are written under a temporary name in the same folder, flushed and synced, and the
file is renamed to its final name; then the folder is synced. So a reader gets either the old or the
new file, even after a power failure if the file system supports syncing, and a full disk changes
nothing. A temporary name contains the id of its process, so that the next process that writes into
the folder can remove the temporary files of dead processes.
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
from sparselogits.untrusted import kind_of_file, shown

fcntl: Any = import_module("fcntl") if os.name == "posix" else None
"""Module `fcntl` with the kernel's file locks; None on Windows, where it does not exist."""

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the names of temporary files and folders."""

_TEMPORARY = re.compile(r"\.tmp-([0-9a-f]{12})-(\d+)(?:-(\d+))?-[0-9a-f]{12}")
_HOME = re.compile(r"~([\w.-]*/|$)")
_URL = re.compile(r"[a-z][a-z0-9+]+:/")  # a Path has one slash of the two
_DAY = 86_400.0
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_SYNC_FOLDER = {
    *_NO_SYNC,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
}  # as some network file systems
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL_ELSEWHERE = re.compile(
    r"No space left|Disk quota exceeded|file write failed|inline_container|PytorchStreamWriter"
    r"|iostream error"
)
"""Pattern of the messages with which safetensors and torch report a full disk without `OSError`."""


def write_whole(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Write a small file completely or not at all, and create its folder if it is missing.

    If several processes replace the same file, the content of the last one to finish remains.

    Args:
        path: path of the file; an existing file must be a regular one.
        content: bytes, or text that is written as UTF-8.
        replace: whether to replace an existing file; if not, the new content is discarded.

    Raises:
        StorageError: the file cannot be written; an existing file is unchanged.
        InvalidArgumentError: the path exists and is not a regular file.
    """
    with writing_whole(path, replace=replace) as handle:
        handle.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def writing_whole(
    path: Path, *, replace: bool = True, name: Callable[[], str] | None = None
) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name when the block ends without an exception.

    Errors are those of `write_whole`; an `OSError` within the block becomes a `StorageError`.

    Args:
        path: see `write_whole`.
        replace: see `write_whole`.
        name: function that is called after the block and returns the name of the file, for a name
            that depends on the content; None for the name in `path`.
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
                with contextlib.suppress(OSError):  # the new file gets the mode of a replaced one
                    os.fchmod(descriptor, stat.S_IMODE(path.lstat().st_mode))
                yield handle
                handle.flush()
                sync(descriptor)
                handle.close()  # network file systems may report a full disk only now
            finally:
                with contextlib.suppress(OSError):  # closing flushes again
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
    """Link or rename a file to a new name; return False if the new name exists already.

    With hard links the operation is exclusive among all processes, and the file also retains its
    old name. Without hard links it is exclusive at best among callers of this module on this
    machine.
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
    """Rename a file or folder; return False if the new name exists already.

    Raises:
        FileNotFoundError: `source`, or the folder of `target`, does not exist.
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
    """Hold an exclusive lock on a folder during a block, if the folder can be locked."""
    with _opened_folder(folder) as descriptor:
        if fcntl is not None and descriptor is not None:
            with contextlib.suppress(OSError):  # some network file systems cannot lock folders
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _opened_folder(folder: Path) -> Iterator[int | None]:
    """Open a folder during a block; yield None for a folder that can be written but not read."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder whose content appears at a path when the block succeeds.

    Use this function for content that other libraries write as several files, such as models. All
    files are synced first. A new folder appears by one rename; an existing empty folder (perhaps a
    mount point) is filled by one rename per entry.

    Raises:
        StorageError: the folder cannot be written.
        InvalidArgumentError: the path exists and is not an empty folder.
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
    """Validate that a folder is missing or empty, after removing leftovers of dead processes.

    Entries that operating systems create are ignored, see `is_clutter`.

    Raises:
        InvalidArgumentError: the path exists and is not an empty folder, or is a URL.
    """
    require_local(path)
    clean_leftovers(path)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise InvalidArgumentError(f"{path} is not a folder; give a new or empty folder")
    found = sorted(entry.name for entry in path.iterdir() if not is_clutter(entry.name))
    if found:
        raise InvalidArgumentError(
            f"{path} is not empty (it contains {found[0]}); give a new or empty folder"
        )


def require_local(path: Path) -> Path:
    """Return a path that is no URL, for which a local folder named `s3:` would be created.

    Raises InvalidArgumentError.
    """
    if _URL.match(str(path)):
        raise InvalidArgumentError(
            f"{path} is a URL; expected a path on this machine. Write to a local path, then copy "
            "the result to the URL"
        )
    return path


def is_clutter(name: str) -> bool:
    """Return whether operating systems create files or folders of this name."""
    # .nfs files are placeholders for files that were removed while they were open
    return name in ("lost+found", ".DS_Store") or name.startswith(".nfs")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert write errors within a block to a `StorageError` that names the path.

    Write errors are `OSError`, and the errors that safetensors and torch raise on a full disk.
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
    """Return a message for a write error, with advice for its cause."""
    if error.errno in _FULL:
        advice = "Free space on its disk, or give a path on another disk"
    elif error.errno in _FORBIDDEN:
        advice = "Make its folder writable, or give another path"
    elif error.errno == errno.ENAMETOOLONG:
        advice = "Give a shorter path"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY):
        advice = "Give a path that does not exist yet, in a folder that exists or can be created"
    else:
        advice = "Check the path and its disk"
    return (
        f"cannot write {path}: {error.strerror or error}; no partial file was left under that "
        f"name. {advice}; then start the same command again"
    )


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~user` replaced by the home folder.

    Raises:
        InvalidArgumentError: the user does not exist or has no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"{shown(str(path))} begins with a home folder that does not exist on this machine; "
            "give another path, or begin it with ./ if the name itself has a tilde"
        ) from error


def with_home(value: Any) -> Any:
    """Return a value with the home folder in place of a leading `~/` or `~user/`.

    Strings in lists and mappings are converted too. Command lines and recipes are converted by this
    function, because shells do not expand `--out=~/run`, and YAML has no such notation.

    Raises:
        InvalidArgumentError: the user does not exist or has no home folder.

    Examples:
        >>> with_home({"out": "run", "steps": 3}), with_home(["~half"])
        ({'out': 'run', 'steps': 3}, ['~half'])
    """
    if isinstance(value, dict):
        return {key: with_home(own) for key, own in value.items()}
    if isinstance(value, list):
        return [with_home(own) for own in value]
    if isinstance(value, str) and _HOME.match(value):
        return str(expanded(value))
    return value


def require_file_or_nothing(path: Path) -> None:
    """Validate that a path is a regular file or does not exist, so that a file can be written.

    Raises:
        InvalidArgumentError: the path is a folder, a link, a device, a pipe or a socket.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # the path does not exist
        return
    if stat.S_ISREG(mode):
        return
    raise InvalidArgumentError(
        f"{path} is {kind_of_file(mode)}; expected a regular file or a path that does not exist. "
        "Give another path (instead of a link, the file that it points to)"
    )


def temporary_name(path: Path) -> Path:
    """Return a new temporary path in the folder of `path`, named after this machine and process."""
    pid = os.getpid()
    return path.with_name(
        f"{TEMPORARY_PREFIX}{_host()}-{pid}-{_started(pid)}-{secrets.token_hex(6)}"
    )


def clean_leftovers(folder: Path) -> list[str]:
    """Remove the temporary files and folders of dead processes from a folder; return their names.

    Temporary files from other machines, or from before a restart of this one, are removed if they
    have not changed for a day.
    """
    removed = []
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.startswith(TEMPORARY_PREFIX))
    except OSError:
        return []
    for name in names:
        found, path = _TEMPORARY.fullmatch(name), folder / name
        if found is None or not _is_dead(path, found):
            continue
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            removed.append(name)
    return removed


def is_leftover(name: str) -> bool:
    """Return whether a temporary name belongs to a dead process of this machine."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and found[1] == _host() and _is_dead(Path(name), found)


def _is_dead(path: Path, found: re.Match[str]) -> bool:
    """Return whether the process that created a temporary file no longer runs.

    A process of another machine is assumed to be dead if the file has not changed for a day.
    """
    host, pid, started = found[1], int(found[2]), found[3]
    if host == _host():
        return not _alive(pid) or (started not in (None, "0") and started != _started(pid))
    try:
        newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
    except OSError:
        return False
    return time.time() - newest > _DAY


@lru_cache(maxsize=1)
def _host() -> str:
    """Return a hash of host name, boot id and pid namespace, within which process ids are valid."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot; "0" if it is unknown."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
        return line.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"


def _alive(pid: int) -> bool:
    """Return whether a process with this id exists; True if that is unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def sync(descriptor: int) -> None:
    """Flush an open file to its disk, if its file system supports that. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Flush a folder to its disk, so that renames within the folder are durable.

    If the folder cannot be read, or its file system cannot flush folders, renames may not survive a
    crash of the machine. Raises OSError if there is no such folder, or if its disk fails.
    """
    with _opened_folder(folder) as descriptor:
        if descriptor is None:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC_FOLDER:
                raise


def sync_tree(folder: Path) -> None:
    """Sync a folder and all files and folders below it, except links."""
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
    """Return the user's cache folder, for files that can be created or downloaded again.

    The folder is `sparselogits` in `$XDG_CACHE_HOME`, or in `~/.cache` if the variable is not set
    or empty.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sparselogits"
