"""Encode and write shards in a thread while the teacher runs.

Encoding, reading back and writing take about 20 microseconds of one core per token. One range of
windows is written while the next is computed, so the records of at most two ranges are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from sparselogits.store import Cache, WindowRecord
from sparselogits.store.ranges import Range


class Writer:
    """Context manager that writes shards in order, in a separate thread.

    An error in the thread is raised by the next `write`, or at the end of the block. If the block
    raises an exception, such as KeyboardInterrupt, the current shard is finished before the
    exception propagates, and an error in the thread is ignored.

    Args:
        caches: caches to write, in the order of the lists of records that `write` takes.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self._caches = caches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._pending: Future[None] | None = None

    def write(
        self, span: Range, records: Sequence[list[WindowRecord]], provenance: Mapping[str, Any]
    ) -> None:
        """Wait until the previous shard is written, then start to write the next.

        The arguments are those of `commit_missing`.

        Raises:
            SparseLogitsError: the previous shard could not be written; see `Cache.commit`.
        """
        self._wait()
        self._pending = self._thread.submit(commit_missing, self._caches, span, records, provenance)

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
        """Wait until the previous shard is written; raise its error, if any."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def commit_missing(
    caches: Sequence[Cache],
    span: Range,
    records: Sequence[list[WindowRecord]],
    provenance: Mapping[str, Any],
) -> None:
    """Write the shard of a range to each cache that lacks it; see `Cache.commit`."""
    for cache, of_cache in zip(caches, records, strict=True):
        if not cache.holds(span):
            cache.commit(of_cache, provenance)
