"""A small build that can be disturbed: three shards of four windows, in a process of its own.

Children are forked, so that hundreds of them cost no imports; they do nothing but the build.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

from sparselogits.store import Cache
from sparselogits.store.storage.local import LocalStorage
from tests.store.draws import identity, records

RANGES = ((0, 4), (4, 8), (8, 12))
WINDOWS = {r: records("counts", *r) for r in RANGES}
STEPS = ("begin", "opened", "writing", "synced", "verified", "linked", "done")


def build(
    root: Path, *, die_at: tuple[str, int] | None = None, reverse: bool = False, seed: int = 0
) -> None:
    """Build what is missing; `die_at` (step, n): SIGKILL itself when a step comes the n-th time.

    cache.json, the card and the three shards are the five files it writes, in this order.
    """
    seen = dict.fromkeys(STEPS, 0)

    def step(name: str) -> None:
        seen[name] += 1
        if die_at == (name, seen[name]):
            os.kill(os.getpid(), signal.SIGKILL)

    cache = Cache.create(LocalStorage(root, step=step), identity(seed=seed))
    for r in sorted(set(RANGES) - set(cache.finished()), reverse=reverse):
        cache.commit(WINDOWS[r], {"batch": 4})


def start(
    root: Path, *, die_at: tuple[str, int] | None = None, reverse: bool = False
) -> BaseProcess:
    """The build in a child."""
    arguments = {"die_at": die_at, "reverse": reverse}
    child = multiprocessing.get_context("fork").Process(
        target=build, args=(root,), kwargs=arguments
    )
    child.start()
    return child


def files(root: Path) -> dict[str, bytes]:
    """Every file of a cache, by name, temporaries included."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def undisturbed(root: Path) -> dict[str, bytes]:
    """What a build leaves when nothing happens to it."""
    build(root)
    return files(root)
