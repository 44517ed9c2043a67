"""Test a cache in an object store on an S3 server: the same files and guarantees."""

import multiprocessing
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader

from sparselogits.data import CacheDataset
from sparselogits.errors import (
    CacheCorruptionError,
    CacheError,
    IdentityMismatchError,
    InvalidArgumentError,
    StorageError,
)
from sparselogits.store import Cache, CopyFolder, merge, repair, verify
from sparselogits.store.cache import same_record
from sparselogits.store.storage.location import Location
from sparselogits.store.storage.objects import ObjectStorage
from tests.conftest import files_of
from tests.store.draws import identity, record, records


def build(place: Location, *starts: int) -> Cache:
    cache = Cache.create(place, identity(packing={"reset_attention": False}))
    for start in starts:
        cache.commit(records("counts", start, start + 20), {"batch": 4})
    return cache


def test_the_same_files_as_in_a_folder(tmp_path, s3):
    build(tmp_path / "c", 0, 20)
    build(s3.url, 20, 0)
    assert s3.objects() == files_of(tmp_path / "c")
    cache = Cache.open(f"{s3.url}/")
    assert cache.finished() == [(0, 20), (20, 40)]
    assert verify(cache).ok
    for i in (39, 0, 21):
        assert same_record(cache.read(i), record("counts", i))
    assert cache.statistics() == Cache.open(tmp_path / "c").statistics()


def test_nothing_there_and_another_identity(s3):
    assert not Cache.exists(s3.url)
    with pytest.raises(CacheError, match="there is no cache at s3://"):
        Cache.open(s3.url)
    build(s3.url)
    assert Cache.exists(s3.url)
    with pytest.raises(IdentityMismatchError, match="seed: 1 in this build, 0 in the cache at s3"):
        Cache.create(s3.url, identity(seed=1, packing={"reset_attention": False}))


def test_of_many_writers_of_one_name_one_wins_and_its_object_stays(s3):
    contents = [b"%d" % i * 1000 for i in range(8)]
    stores = [ObjectStorage(s3.url) for _ in contents]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: stores[i].create("shards/x", contents[i]), range(8)))
    assert won.count(True) == 1
    assert stores[0].read("shards/x") == contents[won.index(True)]


def test_a_shard_that_is_there_stays(s3):
    cache = build(s3.url, 0)
    before = s3.objects()
    cache.commit(records("counts", 0, 20), {"batch": 5})
    assert s3.objects() == before
    assert cache.holds((0, 20))
    assert not cache.holds((20, 40))


def test_a_listing_of_more_than_a_thousand_names(s3, s3_server):
    build(s3.url)
    names = [f"windows-{20 * i:012d}-{20 * i + 20:012d}.parquet" for i in range(1234)]
    key = s3.url.removeprefix("s3://")

    def put(name: str) -> None:  # unsigned and plain, because it is faster
        url = f"{s3_server.endpoint}/{key}/shards/{name}"
        urllib.request.urlopen(urllib.request.Request(url, b"x", method="PUT")).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, names))
    assert Cache.open(s3.url).finished() == [(20 * i, 20 * i + 20) for i in range(1234)]


def test_ranges_end_where_an_object_ends(s3):
    storage = ObjectStorage(s3.url)
    storage.create("a", b"0123456789")
    assert storage.read("a", 3, 5) == b"34"
    assert storage.read("a", 8, 50) == b"89"
    assert storage.read("a", 50, 60) == b""
    assert storage.read("a", 4, 4) == b""
    assert storage.read("a") == b"0123456789"
    assert storage.tail("a", 4) == (10, b"6789")
    assert storage.tail("a", 40) == (10, b"0123456789")
    with pytest.raises(FileNotFoundError):
        storage.read("b", 0, 5)
    with pytest.raises(FileNotFoundError):
        storage.size("b")


def test_repair_sets_aside_and_the_next_build_fills(s3):
    cache = build(s3.url, 0, 20)
    name = "shards/windows-000000000020-000000000040.parquet"
    storage, whole = ObjectStorage(s3.url), s3.objects()[name]
    files, root = storage._open()
    damaged = whole[:5000] + b"?" + whole[5001:]
    files.pipe_file(f"{root}/{name}", damaged)
    done = repair(cache)
    assert done.rebuild == ((20, 40),)
    assert s3.objects()[done.set_aside[0][1]] == damaged
    assert cache.finished() == [(0, 20)]
    cache.commit(records("counts", 20, 40), {"batch": 4})
    assert s3.objects()[name] == whole
    assert verify(cache).ok


def test_merge_between_a_folder_and_a_bucket(tmp_path, s3):
    build(tmp_path / "a", 0)
    there = build(s3.url, 20)
    merge([Cache.open(tmp_path / "a"), there], tmp_path / "both")
    merge([Cache.open(tmp_path / "a")], s3.url)
    assert s3.objects() == files_of(tmp_path / "both")


def test_what_cannot_be_reached_is_not_damaged(s3, monkeypatch):
    build(s3.url, 0)
    before = s3.objects()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    cache = Cache.open(s3.url)
    cache.finished()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="does not mean that the data"):
        Cache.open(s3.url)
    cache.storage = ObjectStorage(s3.url)
    with pytest.raises(StorageError):
        verify(cache, sample=1)
    with pytest.raises(StorageError):
        repair(cache)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert s3.objects() == before


def test_a_bucket_that_is_not_there(s3):
    with pytest.raises(StorageError, match="bucket does not exist"):
        Cache.create("s3://no-such-bucket-here/c", identity())


def test_urls_of_other_kinds():
    url = "memory://bucket/c"
    build(url, 0)
    assert same_record(Cache.open(url).read(7), record("counts", 7))
    assert verify(build(url, 0)).ok
    with pytest.raises(InvalidArgumentError, match="no installed fsspec driver opens"):
        Cache.open("carrier-pigeon://loft/c")


@pytest.mark.parametrize("wrong", ["abc", ""])
def test_a_number_of_attempts_that_is_no_number_is_refused_by_name(monkeypatch, wrong):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", wrong)
    with pytest.raises(InvalidArgumentError, match=f"AWS_MAX_ATTEMPTS='{wrong}'"):
        Cache.open("s3://bucket/c")


def _first_tokens(batch: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [window["input_ids"].tolist() for window in batch]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_a_bucket_through_one_bounded_copy(tmp_path, s3, method):
    build(s3.url, 0, 20)
    copy = CopyFolder(tmp_path / "copy", limit=30_000)  # less than a shard and a half
    dataset = CacheDataset(s3.url, copy=copy)
    dataset[0]  # the parent's connections are open when it forks
    loader = DataLoader(
        dataset,
        batch_size=5,
        num_workers=2,
        collate_fn=_first_tokens,
        multiprocessing_context=multiprocessing.get_context(method),
    )
    tokens = [row for batch in loader for row in batch]
    assert tokens == [record("counts", i).tokens.tolist() for i in range(40)]
    kept = [p.stat().st_size for p in tmp_path.glob("copy/*/*")]
    assert 0 < sum(kept) <= 30_000


def test_a_copy_is_read_again_and_never_believed(tmp_path, s3):
    build(s3.url, 0)
    copy = CopyFolder(tmp_path / "copy")
    dataset = CacheDataset(s3.url, copy=copy)
    whole = [dataset.cache.read(i).tokens.tolist() for i in range(20)]
    assert len(list(tmp_path.glob("copy/*/*"))) == 4  # footer and three row groups
    for number in range(4):
        for i in range(20):
            CacheDataset(s3.url, copy=copy).cache.read(i)
        path = sorted(tmp_path.glob("copy/*/*"))[number]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        again = CacheDataset(s3.url, copy=copy)
        assert [again.cache.read(i).tokens.tolist() for i in range(20)] == whole
    name = "shards/windows-000000000000-000000000020.parquet"
    files, root = ObjectStorage(s3.url)._open()
    files.pipe_file(f"{root}/{name}", s3.objects()[name][:-1])
    assert dataset.cache.read(3).tokens.tolist() == whole[3]  # from the copy
    for path in tmp_path.glob("copy/*/*"):
        path.unlink()
    with pytest.raises(CacheCorruptionError, match=name):
        CacheDataset(s3.url, copy=CopyFolder(tmp_path / "copy")).cache.read(3)
