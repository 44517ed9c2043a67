"""Decode targets of rows that DuckDB, Polars, pandas, pyarrow or datasets read from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

from sparselogits.data.dataset import CacheDataset
from sparselogits.store import Cache, Location
from sparselogits.targets import SparseTargets

_ONE_AT_A_TIME = Lock()
"""A database calls functions from several threads; an open shard serves one at a time."""


def decode(row: Mapping[str, Any], cache: CacheDataset | Cache | Location) -> SparseTargets:
    """Return the targets of one row of a cache's shards, whatever tool has read it.

    The cache is needed as well: its identity has the numbers of ids and rounds, and the footer of
    the shard has the coding tables that its rows share.

    Args:
        row: columns by name: `window_index`, `tokens`, `mask` and `targets`. A dict, a pandas
            Series, or any other mapping. If all columns are there, the checksum of the row is
            verified.
        cache: the cache that the row is from. Pass an open one to decode many rows: a path is
            opened at each call.

    Raises:
        InvalidArgumentError: the row lacks columns, or the dataset mixes several caches.
        CacheError: there is no such cache, or no shard of it holds the window of the row.
        CacheCorruptionError: the row differs from what was written.

    Examples:
        >>> import pyarrow.dataset
        >>> from sparselogits import CacheDataset, decode
        >>> rows = pyarrow.dataset.dataset("my-cache/shards").head(2).to_pylist()
        >>> cache = CacheDataset("my-cache")
        >>> decode(rows[1], cache).ids.equal(cache[1]["targets"].ids)
        True
    """
    if isinstance(cache, CacheDataset):
        cache = cache.only_cache("decoded")
    with _ONE_AT_A_TIME:
        return (cache if isinstance(cache, Cache) else Cache.open(cache)).decode(row)
