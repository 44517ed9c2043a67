"""Merge caches of one identity that were built apart; files are copied, never rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparselogits.errors import CacheCorruptionError, CacheError, IdentityMismatchError
from sparselogits.progress import Progress
from sparselogits.store.bounds import DamageError
from sparselogits.store.cache import Cache
from sparselogits.store.ranges import Range, shard_name
from sparselogits.store.shard.guard import Guard, read_frame
from sparselogits.store.shard.reader import Shard
from sparselogits.store.storage.interface import Storage
from sparselogits.store.storage.location import Location
from sparselogits.store.texts import TextCheck, claim_text, named_texts
from sparselogits.store.tools.repair import set_aside
from sparselogits.store.tools.verify import is_sound


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    Args:
        copied: ranges whose shards were copied.
        kept: ranges that were in the merged cache before.
        set_aside: (old name, new name) of damaged files that were in the merged cache.
    """

    copied: tuple[Range, ...]
    kept: tuple[Range, ...]
    set_aside: tuple[tuple[str, str], ...] = ()


def merge(
    sources: Sequence[Cache], out: Location, *, progress: Progress | None = None
) -> MergeReport:
    """Copy the shards of several caches into one, which may exist already.

    Every byte is verified. An interrupted merge continues when it is called again. If two sources
    hold the same range, the shard of the first is copied: the two hold the same targets. A shard
    that is in the merged cache already is compared by size and checksums; a damaged one, as a
    storage without atomic writes may hold, is set aside and written again.

    Args:
        sources: at least one cache.
        out: folder or URL of the merged cache.
        progress: called with (shards done, shards in all).

    Raises:
        IdentityMismatchError: names the fields in which two sources differ; or the shards are of
            different texts.
        CacheError: ranges overlap without being equal; nothing is written then.
        CacheCorruptionError: a shard is damaged; the ones before it have been copied.
    """
    if not sources:
        raise CacheError("there is nothing to merge: name at least one cache")
    first = sources[0]
    for other in sources[1:]:
        first.identity.require_equal(other.identity, here=str(first.root), there=str(other.root))
    # listed once, since a source may grow meanwhile
    shards = [(source, windows) for source in sources for windows in source.finished()]
    holder = {windows: source for source, windows in reversed(shards)}
    texts = _texts_of(sources, shards, holder)
    target = Cache.create(out, first.identity)
    kept = target.finished()
    _require_disjoint({**holder, **dict.fromkeys(kept, target)})
    if not named_texts(target.storage):  # written by an older version
        _require_texts(texts, ((windows, target) for windows in kept))
    for text in texts.texts:
        claim_text(target.storage, text)
    copied, stay, aside = [], [], []
    for done, windows in enumerate(sorted(holder)):
        name, source = shard_name(*windows), holder[windows]
        if windows in kept and _stays(source, target, windows):
            stay.append(windows)
        else:
            if windows in kept:
                aside.append((name, set_aside(target, name)))
            target.storage.create(name, Shard(source.storage, name, source.identity).read_bytes())
            copied.append(windows)
        if progress is not None:
            progress(done + 1, len(holder))
    target.finished()
    others = [windows for windows in kept if windows not in holder]
    return MergeReport(tuple(copied), tuple(sorted([*stay, *others])), tuple(aside))


def _texts_of(
    sources: Sequence[Cache],
    shards: Sequence[tuple[Cache, Range]],
    holder: Mapping[Range, Cache],
) -> TextCheck:
    """Return the texts that the sources and their shards name.

    Raises:
        IdentityMismatchError: two of them claim the same windows.
    """
    texts = TextCheck([])
    for source in sources:
        for text in named_texts(source.storage):
            try:
                texts.add(text)
            except ValueError as error:
                raise IdentityMismatchError(f"{source.root}: {error}; {_APART}") from error
    _require_texts(texts, holder.items())
    for source, windows in shards:
        other = holder[windows]
        if other is not source:
            _require_same_text(source, other, windows)
    return texts


def _require_texts(texts: TextCheck, shards: Iterable[tuple[Range, Cache]]) -> None:
    for windows, cache in sorted(shards, key=lambda shard: shard[0]):
        try:
            texts.require(windows, cache.provenance(windows[0]))
        except CacheCorruptionError:
            continue  # raised when it is copied
        except ValueError as error:
            name = shard_name(*windows)
            raise IdentityMismatchError(f"{cache.root}/{name}: {error}; {_APART}") from error


_APART = "caches of different texts cannot be merged: give each its own folder"


def _require_same_text(one: Cache, other: Cache, windows: Range) -> None:
    found = [cache.provenance(windows[0]).get("corpus") for cache in (one, other)]
    if found[0] != found[1]:
        raise IdentityMismatchError(
            f"windows {windows[0]}:{windows[1]} of {one.root} and of {other.root} were made from "
            f"different text; {_APART}"
        )


def _stays(source: Cache, target: Cache, windows: Range) -> bool:
    """Return whether the shard that is in the merged cache is sound.

    Raises:
        IdentityMismatchError: it is sound, and of other text.
    """
    name = shard_name(*windows)
    here, there = _frame(source.storage, name), _frame(target.storage, name)
    if there is not None and here == there:
        return True
    if not is_sound(target, windows):
        return False
    _require_same_text(source, target, windows)  # one of another machine may differ in low bits
    return True


def _frame(storage: Storage, name: str) -> tuple[Guard, bytes] | None:
    """Return the checksums and the footer of a shard; None if they do not match each other."""
    try:
        size, guard, tail = read_frame(storage, name)
    except (DamageError, OSError):
        return None
    return guard, tail[len(tail) - (size - guard.footer_start) :]


def _require_disjoint(holder: dict[Range, Cache]) -> None:
    for before, after in pairwise(sorted(holder)):
        if after[0] < before[1]:
            raise CacheError(
                f"windows {before[0]} to {before[1] - 1} of {holder[before].root} and "
                f"{after[0]} to {after[1] - 1} of {holder[after].root} overlap: they were built "
                "with different shard boundaries. Build one of them again with those of the other"
            )
