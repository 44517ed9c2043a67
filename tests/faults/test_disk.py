"""A disk that fills up, one that turns read-only, two builds that differ on one folder.

The first two need root, for a small tmpfs, and are left out without it.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparselogits.errors import CacheError, IdentityMismatchError
from sparselogits.store import Cache, verify
from tests.faults.builds import WINDOWS, build, files, undisturbed
from tests.store.draws import identity


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


FIRST = "shards/windows-000000000000-000000000004.parquet"


def fill(disk: Path, ballast: Path, *, leaving: int) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    ballast.write_bytes(b"x" * (free - leaving))


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, small_disk: Path) -> None:
    root, ballast = small_disk / "c", small_disk / "ballast"
    cache = Cache.create(root, identity())
    fill(small_disk, ballast, leaving=len(undisturbed(tmp_path / "one")[FIRST]) + 4096)

    def commit_all() -> None:
        for windows in WINDOWS.values():
            cache.commit(windows, {"batch": 4})

    with pytest.raises(CacheError, match="No space left"):
        commit_all()
    finished = cache.finished()
    assert len(finished) < 3
    assert not [name for name in files(root) if ".tmp-" in name]
    assert verify(cache, stop=finished[-1][1] if finished else 0).ok
    ballast.unlink()
    build(root)
    assert files(root) == undisturbed(tmp_path / "whole")


def test_a_disk_that_turns_read_only(tmp_path: Path, small_disk: Path) -> None:
    root = small_disk / "c"
    cache = Cache.create(root, identity())
    first, *rest = WINDOWS.values()
    cache.commit(first, {"batch": 4})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CacheError, match="Read-only"):
        cache.commit(rest[0], {"batch": 4})
    assert verify(Cache.open(root)).ok
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    build(root)
    assert files(root) == undisturbed(tmp_path / "whole")


def _create(root: Path, seed: int, results: object) -> None:
    try:
        Cache.create(root, identity(seed=seed))
        results.put((seed, "created"))  # type: ignore[attr-defined]
    except IdentityMismatchError as error:
        results.put((seed, str(error)))  # type: ignore[attr-defined]


def test_of_builds_that_differ_one_gets_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=_create, args=(tmp_path, seed % 2, results)) for seed in range(6)
    ]
    for child in children:
        child.start()
    said = [results.get(timeout=60) for _ in children]
    winner = Cache.open(tmp_path).identity.seed
    assert {seed for seed, word in said if word == "created"} == {winner}
    assert all("seed" in word for seed, word in said if seed != winner)
