"""Test the bounded copy: never above its limit, recently used files remain."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.store import Cache
from sparselogits.store.cache import same_record
from sparselogits.store.storage.copy_folder import CopyFolder
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.storage.local_copy import LocalCopy
from tests.store.draws import identity, record


def held(path: Path) -> int:
    return sum(p.stat().st_size for p in path.glob("*/*"))


def test_what_was_used_last_stays(tmp_path):
    folder = CopyFolder(tmp_path, limit=1000)
    for key in "abcdefghi":
        folder.put("s3://x", key, key.encode() * 100)
        time.sleep(0.002)
    assert folder.get("s3://x", "a") == b"a" * 100
    time.sleep(0.002)
    folder.put("s3://x", "j", b"j" * 200)
    assert held(tmp_path) <= 1000
    assert folder.get("s3://x", "a") == b"a" * 100
    assert folder.get("s3://x", "j") == b"j" * 200
    assert folder.get("s3://x", "b") is None
    assert folder.get("s3://y", "a") is None


@given(sizes=st.lists(st.integers(0, 1500), max_size=40))
def test_the_limit_holds_after_every_put(tmp_path_factory, sizes):
    path = tmp_path_factory.mktemp("copy")
    folder = CopyFolder(path, limit=1000)
    for number, size in enumerate(sizes):
        folder.put(f"place {number % 3}", str(number), b"x" * size)
        assert held(path) <= 1000
        kept = folder.get(f"place {number % 3}", str(number))
        assert kept == (b"x" * size if size <= 1000 else None)


def _put_many(path: Path, worker: int, count: int) -> None:
    folder = CopyFolder(path, limit=50_000)
    for number in range(count):
        folder.put("s3://x", f"{worker}-{number}", b"x" * (1 + 997 * number % 5000))


@pytest.mark.parametrize("killed", [False, True])
def test_the_limit_holds_among_processes_and_after_kills(tmp_path, killed):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_put_many, args=(tmp_path, i, 10_000 if killed else 150))
        for i in range(4)
    ]
    for worker in workers:
        worker.start()
    highest = 0
    for _ in range(60):
        time.sleep(0.01)
        try:
            highest = max(highest, held(tmp_path))
        except FileNotFoundError:  # one made room while this one counted
            continue
    if killed:
        for worker in workers:
            os.kill(worker.pid or 0, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert 0 < highest <= 50_000
    _put_many(tmp_path, 9, 30)
    assert 0 < held(tmp_path) <= 50_000


def test_dropped_by_prefix(tmp_path):
    folder = CopyFolder(tmp_path)
    for key in ("shards/a@0-5", "shards/a@tail", "shards/b@0-5"):
        folder.put("s3://x", key, b"1")
    assert folder.drop("s3://x", "shards/a@")
    assert not folder.drop("s3://x", "shards/a@")
    assert folder.get("s3://x", "shards/a@tail") is None
    assert folder.get("s3://x", "shards/b@0-5") == b"1"


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    folder = CopyFolder(tmp_path / "file/copy")
    with pytest.warns(SparseLogitsWarning, match="cannot store a copy"):
        folder.put("s3://x", "a", b"1")
    assert folder.get("s3://x", "a") is None


def test_a_damaged_copy_in_a_folder_that_is_read_only_is_bypassed(tmp_path, monkeypatch):
    written = [record("counts", window) for window in range(20)]
    Cache.create(tmp_path / "c", identity()).commit(written, {})
    storage = LocalCopy(LocalStorage(tmp_path / "c"), CopyFolder(tmp_path / "copy"))
    for window in range(20):
        Cache.open(storage).read(window)
    for path in (tmp_path / "copy").glob("*/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    def read_only(path: Path, **_: object) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    cache = Cache.open(storage)
    for window in (0, 1, 19, 8):
        assert same_record(cache.read(window), written[window])


def test_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSELOGITS_COPY", str(tmp_path))
    monkeypatch.setenv("SPARSELOGITS_COPY_GB", "0.5")
    assert CopyFolder.default().limit == 1 << 29
    assert CopyFolder.default().path == tmp_path
    for wrong in ("many", "0", "nan", "inf"):
        monkeypatch.setenv("SPARSELOGITS_COPY_GB", wrong)
        with pytest.raises(InvalidArgumentError):
            CopyFolder.default()
