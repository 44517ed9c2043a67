"""Publish a cache at a URL.

Files are written in the order of a build: cache.json, which claims the URL, then the files of
`texts/` and the shards, which are verified, and finally the dataset card with statistics. A local
cache whose files are links is rejected. Sound shards at the URL are not copied again, so an
interrupted push can be repeated, and a later push adds the shards built since. Readers can open the
cache during a push.
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
    """Copy a cache to a URL, with a dataset card that contains its statistics.

    On the Hugging Face hub (`hf://datasets/ORG/NAME`, an existing dataset) each file is one commit,
    so use the hub's client to upload a cache with thousands of shards as one folder.

    Args:
        cache: a cache with at least one finished shard.
        url: URL to which fsspec can write.
        progress: called with the numbers of shards done and in total.

    Raises:
        InvalidArgumentError: `url` is not a URL to which fsspec can write, or a file of a local
            cache is a link.
        IdentityMismatchError: the URL contains a cache with another identity or text.
        CacheError: the cache has no shard, or one of its shards overlaps another range at the URL.
        CacheCorruptionError: a file of a cache is damaged; some shards may have been copied.
        StorageError: the cache or the URL cannot be reached, or the URL cannot be written.
        MissingDependencyError: the driver of the URL is not installed.

    Examples:
        >>> from sparselogits.store import Cache
        >>> report = push(Cache.open("my-cache"), "memory://published/my-cache")
        >>> len(report.copied) >= 1
        True
    """
    if not is_url(url):
        raise InvalidArgumentError(
            f"{url} is not a URL; give a URL such as hf://datasets/ORG/NAME or s3://bucket/prefix, "
            "or copy the folder"
        )
    if not cache.finished():
        raise CacheError(
            f"{cache.root} has no finished shard yet; build it with `sparselogits cache` first"
        )
    if isinstance(cache.storage, LocalStorage):
        _require_no_links(cache, cache.storage.root)
    storage = storage_at(url)
    report = merge([cache], url, progress=progress)
    published = Cache.open(storage)
    # statistics are read from the local copy if both have the same shards
    source = cache if published.finished() == cache.finished() else published
    storage.replace("README.md", dataset_card(published.identity, source.statistics()).encode())
    return report


def require_unlinked(path: Path) -> None:
    """Validate that a path is a regular file or a folder, not a link.

    Raises:
        InvalidArgumentError: the path is a link or a special file.
        FileNotFoundError: the path does not exist.
    """
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "neither a file nor a folder"
        raise InvalidArgumentError(
            f"{path} is {what}; only regular files and folders can be published. Replace the link "
            "with a copy of the file (cp -L), or remove it, then push again"
        )


def _require_no_links(cache: Cache, root: Path) -> None:
    """Validate that no file that a push reads from a local cache is a link."""
    folders = [folder for folder in (SHARDS, TEXTS) if (root / folder).exists()]
    shards = [shard_name(*windows) for windows in cache.finished()]
    texts = [f"{TEXTS}/{name}" for name in cache.storage.names(TEXTS)]
    for name in (CACHE_JSON, *folders, *shards, *texts):
        require_unlinked(root / name)
