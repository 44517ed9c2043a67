"""Merging: shards of one identity, built apart, in one cache. Files are copied, never rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparselogits.errors import CacheError
from sparselogits.store.cache import Cache
from sparselogits.store.place import Place
from sparselogits.store.ranges import Range, shard_name
from sparselogits.store.shard import Shard
from sparselogits.store.verify import Progress


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Args:
        copied: ranges whose shards were copied.
        kept: ranges that stood in the merged cache before.
    """

    copied: tuple[Range, ...]
    kept: tuple[Range, ...]


def merge(sources: Sequence[Cache], out: Place, *, progress: Progress | None = None) -> MergeReport:
    """Copy the shards of several caches into one, new or begun before.

    Every byte is checked on the way. Interrupted, it goes on where it stopped. Where two sources
    hold the same range, the first one's shard is taken: the two hold the same targets.

    Args:
        sources: at least one.
        out: folder or URL of the merged cache.
        progress: called with (shards done, shards in all).

    Raises:
        IdentityMismatchError: naming the fields in which two sources differ.
        CacheError: ranges that overlap without being equal; nothing is written then.
        CacheCorruptionError: a damaged shard; the ones before it have been copied.
    """
    if not sources:
        raise CacheError("nothing to merge: name at least one cache")
    first = sources[0]
    for other in sources[1:]:
        first.identity.require_equal(other.identity, here=str(first.root), there=str(other.root))
    holder = {r: source for source in reversed(sources) for r in source.finished()}
    target = Cache.create(out, first.identity)
    kept = target.finished()
    _require_disjoint({**holder, **dict.fromkeys(kept, target)})
    copied = []
    for done, windows in enumerate(sorted(holder)):
        if windows not in kept:
            name, source = shard_name(*windows), holder[windows]
            target.storage.create(name, Shard(source.storage, name, source.identity).read_bytes())
            copied.append(windows)
        if progress is not None:
            progress(done + 1, len(holder))
    target.finished()
    return MergeReport(tuple(copied), tuple(kept))


def _require_disjoint(holder: dict[Range, Cache]) -> None:
    for before, after in pairwise(sorted(holder)):
        if after[0] < before[1]:
            raise CacheError(
                f"windows {before[0]} to {before[1] - 1} of {holder[before].root} and "
                f"{after[0]} to {after[1] - 1} of {holder[after].root} overlap: they were built "
                "with different shard boundaries; build one of them again with the other's"
            )
