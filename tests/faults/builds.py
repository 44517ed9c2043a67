"""Run a small build of three shards of four windows in child processes that can be killed.

Children are forked, so that hundreds of them need no imports; they only run the build.
"""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sparselogits.store import Cache
from sparselogits.store.storage.local import LocalStorage
from tests.conftest import files_of
from tests.store.draws import identity, records

RANGES = ((0, 4), (4, 8), (8, 12))
WINDOWS = {r: records("counts", *r) for r in RANGES}
CALLS = (
    ("open", 1),
    ("write", 1),
    ("write", 2),
    ("fsync", 1),
    ("posix_fadvise", 1),
    ("link", 1),
    ("unlink", 1),
    ("fsync", 2),
)
"""System calls of writing one file, with their number; the second fsync is that of the folder."""


def build(root: Path, *, reverse: bool = False, seed: int = 0) -> None:
    """Build the missing files: cache.json, the card and three shards, in this order."""
    cache = Cache.create(LocalStorage(root), identity(seed=seed))
    for r in sorted(set(RANGES) - set(cache.finished()), reverse=reverse):
        cache.commit(WINDOWS[r], {"batch": 4})


def build_and_die(root: Path, call: str, number: int, file: int) -> None:
    """Build, and raise SIGKILL before the n-th call of a system call on a file, counted from 1.

    The first write of each file is short, as after a signal or on a nearly full disk.
    """
    files, seen = 0, Counter[str]()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal files
            if name == "open" and args[1] & os.O_EXCL:
                files += 1
                seen.clear()
            seen[name] += 1
            if (name, seen[name], files) == (call, number, file):
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "write" and seen[name] == 1:
                args = (args[0], args[1][: len(args[1]) // 2])
            return real(*args, **options)

        return called

    for name in {name for name, _ in CALLS}:
        setattr(os, name, counted(name, getattr(os, name)))
    build(root)


def start(root: Path, *, reverse: bool = False) -> BaseProcess:
    """Start the build in a child process."""
    return in_child(build, root, reverse=reverse)


def in_child(work: Callable[..., None], *args: Any, **options: Any) -> BaseProcess:
    """Start a function in a forked process."""
    child = multiprocessing.get_context("fork").Process(target=work, args=args, kwargs=options)
    child.start()
    return child


def undisturbed(root: Path) -> dict[str, bytes]:
    """Return the files of an undisturbed build."""
    build(root)
    return files_of(root)
