"""Test that the work before the first training step does not grow with the number of shards."""

from collections import Counter
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from sparselogits.data import CacheDataset, WindowOrder, WindowSampler, collate
from sparselogits.errors import CacheCorruptionError
from sparselogits.store import Cache, CopyFolder
from sparselogits.store.bounds import LARGEST_CACHE_JSON
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.storage.local_copy import LocalCopy
from tests.store.draws import identity, records

WINDOWS = 8


class Noted(LocalStorage):
    """A folder, and what was asked of it: everything goes through these four."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: Counter[str] = Counter()
        self.files: set[str] = set()

    def names(self, folder: str) -> list[str]:
        self.asked["names"] += 1
        return super().names(folder)

    def size(self, name: str) -> int:
        self._note("size", name)
        return super().size(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        self._note("read", name)
        return super().read(name, start, stop)

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        self._note("tail", name)
        return super().tail(name, length)

    def _note(self, operation: str, name: str) -> None:
        self.asked[operation] += 1
        self.files.add(name)


def started(folder: Path, shards: int) -> tuple[Noted, DataLoader]:
    """A loader over a cache of so many shards, none of them read yet."""
    storage = Noted(folder)
    dataset = CacheDataset(storage)
    assert len(dataset) == shards * WINDOWS
    order = WindowOrder(len(dataset), 3, dataset.identity.fingerprint)
    loader = DataLoader(dataset, 1, sampler=WindowSampler(order, world_size=2), collate_fn=collate)
    return storage, loader


@pytest.mark.parametrize("shards", [1, 7, 300])
def test_a_start_is_one_listing_and_one_file(tmp_path, shards):
    cache = Cache.create(tmp_path, identity(packing={"reset_attention": False}))
    whole = cache.commit(records("counts", 0, WINDOWS), {})
    for start in range(WINDOWS, shards * WINDOWS, WINDOWS):
        other = tmp_path / f"shards/windows-{start:012d}-{start + WINDOWS:012d}.parquet"
        other.touch()  # nobody looks into it
    storage, loader = started(tmp_path, shards)
    assert storage.asked == {"names": 1, "read": 1}
    assert storage.files == {"cache.json"}
    assert len(loader) == shards * WINDOWS // 2
    assert storage.asked == {"names": 1, "read": 1}

    before = storage.asked.copy()
    loader.dataset[3]
    assert storage.files == {"cache.json", f"shards/{Path(whole).name}"}
    assert storage.asked["names"] == before["names"]


def test_the_first_batch_opens_the_shards_of_its_windows(tmp_path):
    cache = Cache.create(tmp_path, identity(packing={"reset_attention": False}))
    for start in range(0, 20 * WINDOWS, WINDOWS):
        cache.commit(records("counts", start, start + WINDOWS), {})
    storage, loader = started(tmp_path, 20)
    next(iter(loader))
    assert len(storage.files - {"cache.json"}) == 1
    assert storage.asked["names"] == 1


def test_the_identity_is_read_where_the_cache_lies(tmp_path):
    """A copy of cache.json would outlive a cache that is made anew under the same URL."""
    Cache.create(tmp_path / "cache", identity())
    storage = LocalCopy(LocalStorage(tmp_path / "cache"), CopyFolder(tmp_path / "copy", 1 << 20))
    before = Cache.open(storage).identity
    (tmp_path / "cache/cache.json").unlink()
    other = Cache.create(tmp_path / "cache", identity(packing={"reset_attention": False})).identity
    assert Cache.open(storage).identity == other != before


def test_an_identity_without_bounds_is_read_in_part(tmp_path):
    with (tmp_path / "cache.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        CacheCorruptionError, match=f"more than the {LARGEST_CACHE_JSON:,} that are allowed"
    ):
        Cache.open(tmp_path)
