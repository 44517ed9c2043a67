"""Encode and write shards in a thread while the teacher continues.

Encoding, reading back and writing take about twenty microseconds of one core per token, for which a
teacher on a GPU does not wait. One shard is written at a time, so at most two are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from sparselogits.store import Cache, WindowRecord
from sparselogits.store.ranges import Range


class Writer:
    """Commits shards in order, in a separate thread.

    An error there is raised by the next `write`, or at the end of the block. After an exception in
    the block, such as Ctrl-C, the shard being written is finished (it is whole or absent in any
    case) before the exception propagates.

    Args:
        caches: one cache per list of records in `write`.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self._caches = caches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._pending: Future[None] | None = None

    def write(
        self, span: Range, made: Sequence[list[WindowRecord]], provenance: Mapping[str, Any]
    ) -> None:
        """Wait for the previous shard, then start writing this one.

        Args:
            span: range of the shard; caches that have it already are not written.
            made: records of the shard for each cache.
            provenance: see `Cache.commit`.

        Raises:
            SparseLogitsError: the previous shard could not be written; see `Cache.commit`.
        """
        self._wait()
        self._pending = self._thread.submit(commit_missing, self._caches, span, made, provenance)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown(wait=True)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def commit_missing(
    caches: Sequence[Cache],
    span: Range,
    made: Sequence[list[WindowRecord]],
    provenance: Mapping[str, Any],
) -> None:
    """Commit the records of a range to every cache that lacks its shard; see `Cache.commit`."""
    for cache, records in zip(caches, made, strict=True):
        if not cache.holds(span):
            cache.commit(records, provenance)
