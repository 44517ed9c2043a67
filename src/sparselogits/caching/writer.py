"""Shards are encoded and written while the teacher reads on.

Encoding, reading back and writing take some twenty microseconds of one core a token, which a
teacher on a GPU does not wait for. One shard is on its way at a time, so at most two are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from sparselogits.store import Cache, WindowRecord
from sparselogits.store.ranges import Range


class Writer:
    """Commits shards from a thread of its own, in order.

    What goes wrong there is raised by the next `write`, or at the end. An exception in the block,
    Ctrl-C above all, lets the shard on its way finish (it is whole or absent in any case) and
    passes on.

    Args:
        caches: one a list of records that `write` is given.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        self._caches = caches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._pending: Future[None] | None = None

    def write(
        self, span: Range, made: Sequence[list[WindowRecord]], provenance: Mapping[str, Any]
    ) -> None:
        """Wait for the shard before, then begin with this one.

        Args:
            span: the shard's range; caches that have it already are left alone.
            made: a shard's records for each cache.
            provenance: see `Cache.commit`.

        Raises:
            SparseLogitsError: of the shard before; see `Cache.commit`.
        """
        self._wait()
        self._pending = self._thread.submit(self._commit, span, made, provenance)

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

    def _commit(
        self, span: Range, made: Sequence[list[WindowRecord]], provenance: Mapping[str, Any]
    ) -> None:
        for cache, records in zip(self._caches, made, strict=True):
            if not cache.holds(span):
                cache.commit(records, provenance)
