"""Test flipped bits, truncated files and wrong clocks: typed errors that name the location.

.venv/bin/pytest tests/faults/test_damage.py            a part
.venv/bin/pytest tests/faults/test_damage.py -m slow    10 000 flips
"""

import errno
import itertools
import os
import random
import re
from pathlib import Path
from typing import NoReturn

import pyarrow.parquet as pq
import pytest

from sparselogits.errors import CacheCorruptionError, StorageError
from sparselogits.store import Cache, verify
from sparselogits.store.shard.reader import Shard
from sparselogits.store.storage.local import LocalStorage
from tests.faults.builds import build
from tests.store.draws import KINDS, identity, records

NAME = "windows-000000000000-000000000020.parquet"


def shard(root: Path, kind: str) -> Path:
    return Cache.create(root, identity(kind)).commit(records(kind, 0, 20), {"batch": 4})


def read_everything(root: Path) -> None:
    cache = Cache.open(root)
    for i in range(len(cache)):
        cache.read(i)


def flip_bits(root: Path, kind: str, flips: int, seed: int) -> None:
    """Flips one bit at a time; reading the cache must name the file and the rows each time."""
    path = shard(root, kind)
    whole, chance = path.read_bytes(), random.Random(seed)
    for _ in range(flips):
        bit = chance.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CacheCorruptionError) as caught:
            read_everything(root)
        assert NAME in str(caught.value)
        assert re.search(r"windows \d+ to \d+", str(caught.value)), str(caught.value)
    path.write_bytes(whole)
    read_everything(root)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("flips", "seed"), [(75, 1), pytest.param(2500, 2, marks=pytest.mark.slow)]
)
def test_every_flipped_bit_is_found(tmp_path, kind, flips, seed):
    flip_bits(tmp_path, kind, flips, seed)


def boundaries(path: Path) -> set[int]:
    """Offsets at which something in a shard begins or ends."""
    metadata = pq.read_metadata(path)
    size = path.stat().st_size
    footer = size - 8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    guard = footer - 20 - 20 * metadata.num_row_groups
    found = {0, 4, *range(guard, footer, 20), footer - 20, footer, size - 8, size - 4, size}
    for group, column in itertools.product(
        range(metadata.num_row_groups), range(metadata.num_columns)
    ):
        chunk = metadata.row_group(group).column(column)
        found |= {chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size}
    return found


def cut_everywhere(root: Path, kind: str, *, every: int) -> int:
    """Cuts a shard at and around every boundary, and at every `every`-th byte; returns how often.

    Reading the cache must name the file and its windows each time.
    """
    path = shard(root, kind)
    whole = path.read_bytes()
    near = {edge + step for edge in boundaries(path) for step in (-1, 0, 1)}
    lengths = sorted(n for n in {*near, *range(0, len(whole), every)} if 0 <= n < len(whole))
    for length in reversed(lengths):
        os.truncate(path, length)
        with pytest.raises(CacheCorruptionError, match=rf"{NAME}.*windows \d+ to \d+"):
            read_everything(root)
    path.write_bytes(whole)
    read_everything(root)
    return len(lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_at_any_boundary_is_found(tmp_path, kind):
    assert cut_everywhere(tmp_path, kind, every=211) > 100


def test_a_file_that_goes_on_after_its_end_is_found(tmp_path):
    path = shard(tmp_path, "counts")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CacheCorruptionError, match=NAME):
        read_everything(tmp_path)


def test_a_file_cut_while_it_is_open_is_found(tmp_path):
    path = shard(tmp_path, "counts")
    cache = Cache.open(tmp_path)
    cache.read(0)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CacheCorruptionError, match="bytes"):
        cache.read(19)


def test_a_shard_that_vanishes_is_named(tmp_path):
    path = shard(tmp_path, "counts")
    cache = Cache.open(tmp_path)
    assert len(cache) == 20
    path.unlink()
    with pytest.raises(CacheCorruptionError, match=NAME):
        cache.read(0)


@pytest.mark.parametrize("what", ["removed", "unreadable"])
def test_an_open_shard_that_cannot_be_read_is_named(tmp_path, monkeypatch, what):
    path = shard(tmp_path, "counts")
    cache = Cache.open(tmp_path)
    cache.read(0)
    opened = Shard(cache.storage, f"shards/{path.name}", cache.identity)
    if what == "removed":
        path.unlink()
    else:
        monkeypatch.setattr(os, "pread", _bad_sector)
    with pytest.raises(CacheCorruptionError, match=NAME):
        cache.read(19)
    with pytest.raises(CacheCorruptionError, match=NAME):
        opened.read_bytes()


def test_a_network_file_system_that_is_gone_is_no_damage(tmp_path, monkeypatch):
    shard(tmp_path, "counts")
    cache = Cache.open(tmp_path)
    cache.read(0)

    def stale(*_: object) -> NoReturn:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(StorageError, match="does not mean that the data"):
        cache.read(19)


def _bad_sector(*_: object) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_before_data_is_read(tmp_path, monkeypatch):
    shard(tmp_path, "counts")
    storage = LocalStorage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", _bad_sector)
        with pytest.raises(StorageError, match=r"cannot read .*cache\.json: Input/output error"):
            Cache.open(tmp_path)
    for module, call in ((os, "scandir"), (Path, "stat")):
        with monkeypatch.context() as patch:
            patch.setattr(module, call, _bad_sector)
            with pytest.raises(StorageError, match=r"cannot access .*: Input/output error"):
                storage.names("shards") if call == "scandir" else storage.size("cache.json")


@pytest.mark.parametrize("when", [0, 2**33])
def test_no_clock_is_believed(tmp_path, when):
    build(tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (when, when))
    build(tmp_path)
    assert verify(Cache.open(tmp_path), stop=12).ok
