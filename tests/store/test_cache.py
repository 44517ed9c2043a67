"""Test the cache as a whole: committed windows are read back in order, bit for bit."""

import dataclasses
import errno
import json
import multiprocessing
import os
import pathlib
import shutil
from typing import NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from sparselogits.data import CacheDataset, WindowOrder, WindowSampler
from sparselogits.errors import (
    CacheCorruptionError,
    CacheError,
    IdentityMismatchError,
    InvalidTargetsError,
    StorageError,
)
from sparselogits.files import temporary_name
from sparselogits.store import Cache, verify
from sparselogits.store.cache import same_record
from sparselogits.store.shard.writer import METADATA_KEY
from sparselogits.store.storage.local import LocalStorage
from tests.faults.forge import Shard
from tests.store.draws import KINDS, identity, record, records


@pytest.mark.parametrize("vocab_size", [1000, 262144])
@pytest.mark.parametrize("kind", KINDS)
def test_records_come_back_bit_for_bit(tmp_path, kind, vocab_size):
    cache = Cache.create(tmp_path / "c", identity(kind, vocab_size=vocab_size))
    written = records(kind, 40, 53, vocab_size=vocab_size)
    cache.commit(written, {"threads": 1})
    reader = Cache.open(tmp_path / "c")
    assert len(reader) == 13
    for i, expected in enumerate(written):
        assert same_record(reader.read(i), expected)
        assert reader.window_index(i) == 40 + i
    assert reader.provenance(45) == {"threads": 1}


def test_windows_are_numbered_over_all_shards(tmp_path):
    cache = Cache.create(tmp_path, identity())
    for start in (60, 0, 20):
        cache.commit(records("counts", start, start + 20), {})
    assert cache.finished() == [(0, 20), (20, 40), (60, 80)]
    assert [cache.window_index(i) for i in (0, 39, 40, -1)] == [0, 39, 60, 79]
    for i in (45, 3, 59, 21, 45):
        assert same_record(cache.read(i), record("counts", cache.window_index(i)))
    with pytest.raises(IndexError):
        cache.read(60)


def test_a_finished_shard_stays(tmp_path):
    cache = Cache.create(tmp_path, identity())
    path = cache.commit(records("counts", 0, 20), {"batch": 1})
    before = path.stat()
    cache.commit(records("counts", 0, 20), {"batch": 2})
    assert path.stat().st_ino == before.st_ino
    assert cache.provenance(0) == {"batch": 1}


def test_another_identity_is_refused_by_name(tmp_path):
    Cache.create(tmp_path, identity())
    Cache.create(tmp_path, identity())
    with pytest.raises(IdentityMismatchError, match="seed: 1 in this build, 0 in the cache"):
        Cache.create(tmp_path, identity(seed=1))


def test_a_shard_of_another_cache_is_refused(tmp_path):
    stray = Cache.create(tmp_path / "a", identity(seed=1)).commit(records("counts", 0, 8), {})
    cache = Cache.create(tmp_path / "b", identity())
    (tmp_path / "b/shards").mkdir()
    os.link(stray, tmp_path / "b/shards" / stray.name)
    with pytest.raises(CacheCorruptionError, match="fingerprint"):
        cache.read(0)


def test_a_renamed_shard_is_refused(tmp_path):
    cache = Cache.create(tmp_path, identity())
    path = cache.commit(records("counts", 0, 8), {})
    path.rename(path.with_name("windows-000000000008-000000000016.parquet"))
    with pytest.raises(CacheCorruptionError, match="the description states"):
        Cache.open(tmp_path).read(0)


def test_overlapping_shards_are_refused(tmp_path):
    cache = Cache.create(tmp_path, identity())
    cache.commit(records("counts", 0, 8), {})
    cache.commit(records("counts", 4, 12), {})
    with pytest.raises(CacheError, match="overlap"):
        cache.finished()


def test_a_file_whose_name_is_no_range_is_no_shard(tmp_path):
    cache = Cache.create(tmp_path, identity())
    path = cache.commit(records("counts", 0, 8), {})
    for start, stop in ((10, 3), (12, 12)):
        shutil.copy(path, path.parent / f"windows-{start:012d}-{stop:012d}.parquet")
    assert cache.finished() == [(0, 8)]
    assert len(cache) == 8


def test_no_cache_and_a_damaged_one(tmp_path):
    with pytest.raises(CacheError, match="there is no cache"):
        Cache.open(tmp_path / "nowhere")
    Cache.create(tmp_path, identity())
    edited = (tmp_path / "cache.json").read_text().replace('"seed":0', '"seed":7')
    (tmp_path / "cache.json").write_text(edited)
    with pytest.raises(CacheCorruptionError, match="fingerprint"):
        Cache.open(tmp_path)


def test_a_folder_without_permission_is_no_missing_cache(tmp_path, monkeypatch):
    Cache.create(tmp_path, identity())

    def denied(path: object, **_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pathlib.Path, "stat", denied)
    monkeypatch.setattr(os, "scandir", denied)
    for ask in (Cache.exists, lambda root: Cache(LocalStorage(root), identity()).finished()):
        with pytest.raises(StorageError, match=r"Permission denied.*does not mean that the data"):
            ask(tmp_path)


def test_temporaries_of_the_dead_are_removed_and_others_kept(tmp_path):
    Cache.create(tmp_path, identity()).commit(records("counts", 0, 8), {})
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    alive = temporary_name(tmp_path / "shards/alive")
    words = alive.name.split("-")
    dead = alive.with_name("-".join([*words[:2], str(process.pid), *words[3:]]))
    foreign = tmp_path / "shards/.tmp-000000000000-1-1-000000000000"
    for path in (dead, alive, foreign):
        path.write_bytes(b"half a shard")
    cache = Cache.create(tmp_path, identity())
    assert not dead.exists()
    assert alive.exists()
    assert foreign.exists()
    assert cache.finished() == [(0, 8)]


def test_statistics_agree_with_the_rows(tmp_path):
    cache = Cache.create(tmp_path, identity())
    written = records("counts", 0, 12)
    path = cache.commit(written, {})
    found = cache.statistics()
    assert (found.shards, found.windows, found.tokens) == (1, 12, 12 * 64)
    assert found.entries == sum(r.targets.entries for r in written)
    assert found.positions == sum(int(r.present().sum()) for r in written)
    assert found.bytes_on_disk == path.stat().st_size
    assert found.mean_teacher_loss == pytest.approx(np.mean([r.teacher_loss for r in written]))
    assert found.bytes_per_token == found.bytes_on_disk / (12 * 64)


def test_any_parquet_reader_sees_the_windows(tmp_path):
    path = Cache.create(tmp_path, identity()).commit(records("counts", 0, 12), {})
    table = pq.read_table(path, page_checksum_verification=True)
    assert table["window_index"].to_pylist() == list(range(12))
    assert table["tokens"][3].as_py() == record("counts", 3).tokens.tolist()
    assert table["mask"][0].as_py() is None
    assert table["mask"][2].as_py() == record("counts", 2).present().tolist()


def test_a_mask_of_another_length_is_refused_in_a_masked_cache(tmp_path):
    written = record("masked-counts", 0)
    bad = dataclasses.replace(written, mask=written.present()[:-1])
    with pytest.raises(InvalidTargetsError, match=r"mask is not a bool array of shape \(64,\)"):
        Cache.create(tmp_path, identity("masked-counts")).commit([bad], {})


@pytest.mark.parametrize("part", ["tokens", "document_starts", "mask"])
def test_records_that_do_not_fit_are_refused(tmp_path, part):
    cache = Cache.create(tmp_path, identity())
    wrong = {
        "tokens": np.zeros(3, np.int32),
        "document_starts": np.array([5, 2], np.int32),
        "mask": np.ones(64, np.int8),
    }[part]
    bad = dataclasses.replace(record("counts", 0), **{part: wrong})
    with pytest.raises(InvalidTargetsError, match=f"window 0: {part}"):
        cache.commit([bad], {})
    assert cache.finished() == []


def test_masked_positions_own_no_entries(tmp_path):
    mask = np.ones(64, np.bool_)
    mask[7] = False
    bad = dataclasses.replace(record("counts", 0), mask=mask)
    with pytest.raises(InvalidTargetsError, match="position 7 is masked"):
        Cache.create(tmp_path, identity()).commit([bad], {})


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_of_reading_gives_the_same_windows(tmp_path, kind):
    """Windows read in order are decoded together, others alone; masked ones among them."""
    cache = Cache.create(tmp_path, identity(kind))
    for start in (0, 20):
        cache.commit(records(kind, start, start + 20), {})
    expected = records(kind, 0, 40)
    chance = np.random.default_rng(0)
    for order in (range(40), reversed(range(40)), [5, 6, 7, 8, 5, 30, 31, 8, 9, 39, 0, 1], None):
        for i in chance.permutation(40) if order is None else order:
            assert same_record(cache.read(int(i)), expected[i])


def test_a_damaged_window_is_named_and_the_others_of_its_row_group_are_read(tmp_path):
    """Checksums that hold around a block that does not decode, among seven that do."""
    written = records("counts", 0, 8)
    cache = Cache.create(tmp_path, identity())
    path = cache.commit(written, {})
    blocks = pq.read_table(path)["targets"].to_pylist()
    blocks[4] = blocks[4][:-1]
    forged = Shard.of(identity(), written)
    forged.columns["targets"] = blocks
    forged.description["tables"] = json.loads(pq.read_metadata(path).metadata[METADATA_KEY])[
        "tables"
    ]
    forged.write(tmp_path)
    reader = Cache.open(tmp_path)
    for i in (0, 1, 2, 3, 5, 6, 7):
        assert same_record(reader.read(i), written[i])
    with pytest.raises(CacheCorruptionError, match=r"row 4 \(windows 4 to 4\)"):
        reader.read(4)
    assert "row 4 (windows 4 to 4)" in str(verify(reader).shards[0].error)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_data_loader_s_workers_read_safely(tmp_path, method):
    """Shards are open in the parent when the workers start."""
    cache = Cache.create(tmp_path, identity(packing={"reset_attention": False}))
    for start in range(0, 200, 20):
        cache.commit(records("counts", start, start + 20), {})
    dataset = CacheDataset(tmp_path)
    first = [dataset[i]["targets"].ids.tolist() for i in (0, 1, 150)]
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=WindowSampler(WindowOrder(200, seed=1)),
        num_workers=2,
        multiprocessing_context=method,
    )
    seen = [item["input_ids"].tolist() for item in loader]
    expected = [record("counts", i).tokens.tolist() for i in range(200)]
    assert sorted(seen) == sorted(expected)
    assert [dataset[i]["targets"].ids.tolist() for i in (0, 1, 150)] == first
