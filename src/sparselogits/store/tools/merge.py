"""Merge caches with the same identity by copying their shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.storage.location import Location
from sparselogits.store.texts import TextCheck, claim_text, named_texts
from sparselogits.store.tools.repair import set_aside
from sparselogits.store.tools.verify import is_sound


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge.

    Args:
        copied: ranges whose shards were copied.
        kept: ranges whose shards existed in the merged cache and were not replaced.
        set_aside: (old name, new name) of each damaged file of the merged cache that was moved.
    """

    copied: tuple[Range, ...]
    kept: tuple[Range, ...]
    set_aside: tuple[tuple[str, str], ...] = ()


def merge(
    sources: Sequence[Cache], out: Location, *, progress: Progress | None = None
) -> MergeReport:
    """Copy the shards of several caches to one cache, which is created if it is missing.

    Copied bytes are verified. After an interruption, call the function again to continue. If
    several sources contain a range, only the first source's shard is copied. If the merged cache
    has a shard of the range already, that shard is kept if its checksums and footer equal the
    source's, or if it is sound. Otherwise it is moved to the folder `damaged` and copied again; a
    storage without atomic writes may leave a damaged shard. If checksums and footer are equal, the
    bytes of the kept shard are verified in a local folder, but not at a URL, where the shard would
    have to be downloaded.

    Args:
        sources: at least one cache.
        out: folder or URL of the merged cache.
        progress: called with the numbers of shards done and in total.

    Raises:
        IdentityMismatchError: two of the caches have different identities, or were built from
            different texts.
        CacheError: there is no source, or two ranges overlap without being equal; no shard was
            written.
        CacheCorruptionError: a file of a cache is damaged; some shards may have been copied.
        StorageError: a cache cannot be reached or written.
        InvalidArgumentError: `out` is a malformed URL or has no driver; see `storage_at`.
        MissingDependencyError: the driver of the URL is not installed.

    Examples:
        >>> from sparselogits.store import Cache
        >>> report = merge([Cache.open("my-cache")], "merged")
        >>> report.copied == tuple(Cache.open("merged").ranges)
        True
    """
    if not sources:
        raise CacheError("found no caches to merge; name at least one")
    first = sources[0]
    for other in sources[1:]:
        first.identity.require_equal(other.identity, here=str(first.root), there=str(other.root))
    # listed once, because builds may add shards during the merge
    shards = [(source, windows) for source in sources for windows in source.finished()]
    holder = {windows: source for source, windows in reversed(shards)}
    texts = _texts_of(sources, shards, holder)
    target = Cache.create(out, first.identity)
    kept = target.finished()
    _require_disjoint({**holder, **dict.fromkeys(kept, target)})
    if not named_texts(target.storage):  # written by an old version
        _require_texts(texts, ((windows, target) for windows in kept))
    for text in texts.texts:
        claim_text(target.storage, text)
    copied, aside = [], []
    kept_ranges = [windows for windows in kept if windows not in holder]
    for done, windows in enumerate(sorted(holder)):
        name, source = shard_name(*windows), holder[windows]
        if windows in kept and _is_kept(source, target, windows):
            kept_ranges.append(windows)
        else:
            if windows in kept:
                aside.append((name, set_aside(target, name)))
            target.storage.create(name, Shard(source.storage, name, source.identity).read_bytes())
            copied.append(windows)
        if progress is not None:
            progress(done + 1, len(holder))
    target.finished()
    return MergeReport(tuple(copied), tuple(sorted(kept_ranges)), tuple(aside))


def _texts_of(
    sources: Sequence[Cache],
    shards: Sequence[tuple[Cache, Range]],
    holder: Mapping[Range, Cache],
) -> TextCheck:
    """Return the texts of the sources and of the shards to copy, after validating that all agree.

    `holder` maps each range to the cache whose shard is copied.
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
        if holder[windows] is not source:
            _require_same_text(source, holder[windows], windows)
    return texts


def _require_texts(texts: TextCheck, shards: Iterable[tuple[Range, Cache]]) -> None:
    """Validate the texts in the provenance of shards that are not damaged, and add them."""
    for windows, cache in sorted(shards, key=lambda shard: shard[0]):
        try:
            texts.require(windows, cache.provenance(windows[0]))
        except CacheCorruptionError:
            continue  # raised again when the shard is copied
        except ValueError as error:
            name = shard_name(*windows)
            raise IdentityMismatchError(f"{cache.root}/{name}: {error}; {_APART}") from error


_APART = "caches of different texts cannot be merged; store each text in a separate cache"


def _require_same_text(one: Cache, other: Cache, windows: Range) -> None:
    """Validate that two caches have the same text in a range."""
    found = [cache.provenance(windows[0]).get("corpus") for cache in (one, other)]
    if found[0] != found[1]:
        raise IdentityMismatchError(
            f"windows {windows[0]}:{windows[1]} of {one.root} and of {other.root} were built from "
            f"different texts; {_APART}"
        )


def _is_kept(source: Cache, target: Cache, windows: Range) -> bool:
    """Return whether the merged cache's shard equals the source's in guard and footer, or is sound.

    The pages of a local shard must also match its checksums.

    Raises IdentityMismatchError if the shard is sound, but was built from another text.
    """
    name = shard_name(*windows)
    here, there = _frame(source.storage, name), _frame(target.storage, name)
    if there is not None and here == there:
        if not isinstance(target.storage, LocalStorage):
            return True
        with suppress(CacheCorruptionError):
            Shard(target.storage, name, target.identity).read_bytes()
            return True
    if not is_sound(target, windows):
        return False
    # sound shards of two machines may differ in low-order bits
    _require_same_text(source, target, windows)
    return True


def _frame(storage: Storage, name: str) -> tuple[Guard, bytes] | None:
    """Return the guard and the footer of a shard; None if they are damaged or missing."""
    try:
        size, guard, tail = read_frame(storage, name)
    except (DamageError, OSError):
        return None
    return guard, tail[len(tail) - (size - guard.footer_start) :]


def _require_disjoint(holder: dict[Range, Cache]) -> None:
    """Validate that ranges do not overlap."""
    for before, after in pairwise(sorted(holder)):
        if after[0] < before[1]:
            raise CacheError(
                f"windows {before[0]} to {before[1] - 1} of {holder[before].root} and "
                f"{after[0]} to {after[1] - 1} of {holder[after].root} overlap, expected equal or "
                "disjoint ranges. Build one of the caches again with the shard boundaries of the "
                "other"
            )
