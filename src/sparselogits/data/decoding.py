"""Decode the targets of rows that DuckDB, Polars, pandas, pyarrow or datasets read from a cache."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any

from sparselogits.data.dataset import CacheDataset
from sparselogits.store import Cache, Location
from sparselogits.targets import SparseTargets

_LOCK = Lock()
"""Lock for open shards, which are not thread-safe, as databases may decode in several threads."""


def decode(row: Mapping[str, Any], cache: CacheDataset | Cache | Location) -> SparseTargets:
    """Decode the targets of a cache's row that another tool has read.

    The cache is required because its identity contains the vocabulary size and the number of
    rounds, and the footer of the shard contains the coding tables of its rows.

    Args:
        row: columns by name, as a dict, a pandas Series or any other mapping: `window_index`,
            `tokens`, `mask` and `targets`. If all columns of the shard are present, the checksum of
            the row is verified.
        cache: the cache that contains the row. To decode many rows, pass an open cache, because a
            path is opened at each call.

    Returns:
        The targets of the window's L positions, for the ids of the teacher, even if the dataset has
        a draft vocabulary.

    Raises:
        InvalidArgumentError: the row lacks columns, or the dataset mixes several caches.
        CacheError: there is no cache, or no shard contains the window of the row.
        CacheCorruptionError: the row cannot be decoded, or its checksum is wrong.

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
    with _LOCK:
        return (cache if isinstance(cache, Cache) else Cache.open(cache)).decode(row)
