"""Publish a cache of this machine at a URL.

Files are put in the order in which a build writes them: cache.json first, which claims the name,
then the shards, each verified as it is read; the dataset card with the statistics is the last.
Nothing else is touched there, and no link is followed. A sound shard that is there stays, so an
interrupted push continues when it is called again, the next push adds what was built meanwhile, and
readers may begin at once.
"""

from __future__ import annotations

import stat
from pathlib import Path

from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.progress import Progress
from sparselogits.store.cache import CACHE_JSON, Cache
from sparselogits.store.ranges import SHARDS, shard_name
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.storage.location import Location, is_url, storage_at
from sparselogits.store.texts import TEXTS
from sparselogits.store.tools.card import dataset_card
from sparselogits.store.tools.merge import MergeReport, merge


def push(cache: Cache, url: Location, *, progress: Progress | None = None) -> MergeReport:
    """Copy a cache to a URL, and write a dataset card with its statistics there.

    One put is one request. On the Hugging Face hub (`hf://datasets/ORG/NAME`, which must exist) it
    is one commit, so upload a cache of thousands of shards as a folder.

    Args:
        cache: a cache with at least one finished shard.
        url: a URL that fsspec can write to.
        progress: called with (shards done, shards in all).

    Raises:
        InvalidArgumentError: not a URL; or a file of the cache is a link.
        IdentityMismatchError: another cache is there; names the fields in which they differ.
        CacheError: there is nothing to publish, or shards there overlap these.
        CacheCorruptionError: a shard is damaged; the ones before it have been copied.
        StorageError: the URL cannot be reached or written.
    """
    if not is_url(url):
        raise InvalidArgumentError(
            f"{url} is not a URL. Push to one (hf://datasets/ORG/NAME, s3://bucket/prefix), or "
            "copy the folder"
        )
    if not cache.finished():
        raise CacheError(f"{cache.root} has no finished shard yet; build some first")
    if isinstance(cache.storage, LocalStorage):
        _require_no_links(cache, cache.storage.root)
    storage = storage_at(url)
    report = merge([cache], url, progress=progress)
    there = Cache.open(storage)
    whole = cache if there.finished() == cache.finished() else there
    storage.replace("README.md", dataset_card(there.identity, whole.statistics()).encode())
    return report


def require_unlinked(path: Path) -> None:
    """Validate that a path to be published is a file or a folder, not a link.

    Raises:
        InvalidArgumentError: the path is something else.
    """
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
        raise InvalidArgumentError(
            f"{path} is {what}; only files and folders of the cache are published. Replace it by "
            "a copy of the file (cp -L), or remove it, then push again"
        )


def _require_no_links(cache: Cache, root: Path) -> None:
    require_unlinked(root / CACHE_JSON)
    for folder in (SHARDS, TEXTS):
        if (root / folder).exists():
            require_unlinked(root / folder)
    for windows in cache.finished():
        require_unlinked(root / shard_name(*windows))
    for name in cache.storage.names(TEXTS):
        require_unlinked(root / TEXTS / name)
