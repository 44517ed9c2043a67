"""Publishing: a cache of this machine, put where its readers will find it by name.

What is put is what a build into that place would have written, in its order: cache.json first,
which claims the name, then the shards, each checked as it is read; the dataset card with the
figures is the last. A shard that is there is complete, so an interrupted push goes on where it
stopped, the next push adds what was built meanwhile, and readers may begin at once.
"""

from __future__ import annotations

from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.store.cache import Cache
from sparselogits.store.card import dataset_card
from sparselogits.store.merge import MergeReport, merge
from sparselogits.store.objects import ObjectStorage
from sparselogits.store.place import Place, is_url
from sparselogits.store.verify import Progress


def push(cache: Cache, url: Place, *, progress: Progress | None = None) -> MergeReport:
    """Copy a cache to a URL, and write a dataset card with its figures there.

    A put is a request; on the Hugging Face hub (`hf://datasets/ORG/NAME`, which must exist) it is a
    commit, so that a cache of thousands of shards is better uploaded as a folder.

    Args:
        cache: with at least one finished shard.
        url: whatever fsspec writes to.
        progress: called with (shards done, shards in all).

    Raises:
        InvalidArgumentError: no URL.
        IdentityMismatchError: another cache is there; names the fields in which they differ.
        CacheError: nothing to publish, or shards there that overlap these.
        CacheCorruptionError: a damaged shard; the ones before it are there.
        StorageError: the place cannot be reached or written to.
    """
    if not is_url(url):
        raise InvalidArgumentError(
            f"{url} is no URL; push to one (hf://datasets/ORG/NAME, s3://bucket/prefix), or copy "
            "the folder"
        )
    if not cache.finished():
        raise CacheError(f"{cache.root} holds no finished shard yet; build some first")
    storage = ObjectStorage(str(url))
    report = merge([cache], url, progress=progress)
    there = Cache.open(storage)
    whole = cache if there.finished() == cache.finished() else there
    storage.replace("README.md", dataset_card(cache.identity, whole.statistics()).encode())
    return report
