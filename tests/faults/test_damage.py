"""Flipped bits, cut files, strange clocks: every damage is a typed error that names the place.

.venv/bin/pytest tests/faults/test_damage.py            a share
.venv/bin/pytest tests/faults/test_damage.py -m slow    10 000 flips
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from sparselogits.errors import CacheCorruptionError
from sparselogits.store import Cache, verify
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
        assert re.search(r"footer|windows \d+ to \d+", str(caught.value)), str(caught.value)
    path.write_bytes(whole)
    read_everything(root)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_found(tmp_path: Path, kind: str) -> None:
    flip_bits(tmp_path, kind, 75, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_flipped_bits_are_found(tmp_path: Path, kind: str) -> None:
    flip_bits(tmp_path, kind, 2500, seed=2)


def test_a_file_cut_anywhere_is_found(tmp_path: Path) -> None:
    path = shard(tmp_path, "counts")
    whole = path.read_bytes()
    near_ends = [*range(70), *range(len(whole) - 300, len(whole))]
    for length in sorted({*near_ends, *range(0, len(whole), 211)}):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheCorruptionError, match=NAME):
            read_everything(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheCorruptionError, match=NAME):
        read_everything(tmp_path)


def test_a_file_cut_while_it_is_open_is_found(tmp_path: Path) -> None:
    path = shard(tmp_path, "counts")
    cache = Cache.open(tmp_path)
    cache.read(0)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CacheCorruptionError, match="bytes"):
        cache.read(19)


def test_a_shard_that_vanishes_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path, "counts")
    cache = Cache.open(tmp_path)
    assert len(cache) == 20
    path.unlink()
    with pytest.raises(CacheCorruptionError, match=NAME):
        cache.read(0)


@pytest.mark.parametrize("when", [0, 2**33])
def test_no_clock_is_believed(tmp_path: Path, when: int) -> None:
    build(tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (when, when))
    build(tmp_path)
    assert verify(Cache.open(tmp_path), stop=12).ok
