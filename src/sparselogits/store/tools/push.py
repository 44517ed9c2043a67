"""Publishing: a cache of this machine, put where its readers will find it by name.

What is put is what a build into that place would have written, in its order: cache.json first,
which claims the name, then the shards, each checked as it is read; the dataset card with the
figures is the last. Nothing else in the folder is touched, and no link is followed. A shard that
is there whole is left alone, so an interrupted push goes on where it stopped, the next push adds
what was built meanwhile, and readers may begin at once.
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
    """Copy a cache to a URL, and write a dataset card with its figures there.

    A put is a request; on the Hugging Face hub (`hf://datasets/ORG/NAME`, which must exist) it is a
    commit, so that a cache of thousands of shards is better uploaded as a folder.

    Args:
        cache: with at least one finished shard.
        url: whatever fsspec writes to.
        progress: called with (shards done, shards in all).

    Raises:
        InvalidArgumentError: no URL; or a link among the cache's files.
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
    if isinstance(cache.storage, LocalStorage):
        _require_no_links(cache, cache.storage.root)
    storage = storage_at(url)
    report = merge([cache], url, progress=progress)
    there = Cache.open(storage)
    whole = cache if there.finished() == cache.finished() else there
    storage.replace("README.md", dataset_card(there.identity, whole.statistics()).encode())
    return report


def require_unlinked(path: Path) -> None:
    """Validate that a path that is to be published is a file or folder itself, not a link.

    Raises:
        InvalidArgumentError: it is something else.
    """
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
        raise InvalidArgumentError(
            f"{path} is {what}; what is published are the cache's own files. Put a copy of the "
            "file that is meant in its place (cp -L), or remove it, then push again"
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
