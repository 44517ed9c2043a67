"""The coding of ids: a window's sets as an inverted index over positions sorted by their token.

The ids of a window are a set of (id, position) pairs. Written position by position they cost 11
bits per pair. Written id by id, each id with the list of positions that hold it, they cost 9: few
different ids occur in a window, and a list states its id once and then only gaps. Two things that
the reader knows make it less. The tokens of the window: positions are numbered by (their token,
position in the window), so that positions with similar distributions are neighbours and gaps are
small. And the label of each position, which is usually in the set: one bit per position says
whether, and the lists leave it out. benchmarks/size.py measures what each of these saves.

No model of the vocabulary is fitted or stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sparselogits.store.bounds import DamageError

Array = NDArray[Any]
Bool = NDArray[np.bool_]

SIZE_CLASSES = 8
COLUMNS = ("hits", "ids", "sizes", *(f"places_{c}" for c in range(SIZE_CLASSES)))

_NONE = np.iinfo(np.uint32).max  # no id
_CLASS_OF_SIZE = np.array([max(n, 1).bit_length() - 1 for n in range(129)], np.uint8)


class Pages(Protocol):
    """The coded columns of a run of windows, read one after another."""

    def read(self, column: str, lengths: Array) -> Array:
        """Return the next `lengths[w]` numbers of each window w, uint32, window after window."""
        ...

    def fill(self, column: str, out: Array, starts: Sequence[int], stops: Sequence[int]) -> None:
        """Read the next numbers of a column into `out[starts[w]:stops[w]]` for each window w."""
        ...


@dataclass(frozen=True)
class Sets:
    """The sets of ids of the P = W L positions of W windows.

    Args:
        ids: int64 [E], ascending within a position, positions in order.
        offsets: int64 [P + 1]: position p owns entries offsets[p] to offsets[p + 1].
        is_hit: bool [E]: whether the id is the label of its position.
        has_hit: bool [P]: whether a position has such an entry.
    """

    ids: Array
    offsets: Array
    is_hit: Bool
    has_hit: Bool


def split(
    ids: Array, lengths: Array, tokens: Array, labels: Array, present: Bool
) -> dict[str, Array]:
    """Split the sets of a window into columns.

    Args:
        ids: int64 [E], strictly ascending within a position.
        lengths: int64 [L], 0 where `present` is False.
        tokens: int32 [L].
        labels: int64 [L], the token that each position predicts; negative where there is none.
        present: bool [L]: positions that carry a target.

    Returns:
        uint32 arrays by the names in COLUMNS; "ids" has one number per list.
    """
    order = reading_order(tokens[None], present[None])
    place_of = np.zeros(len(tokens), np.int64)
    place_of[order] = np.arange(len(order))
    owner = np.repeat(np.arange(len(tokens)), lengths)
    hit = ids == labels[owner]
    hits = np.zeros(len(order), np.uint32)
    hits[place_of[owner[hit]]] = 1
    pair_ids, pair_places = ids[~hit], place_of[owner[~hit]]
    by_id = np.lexsort((pair_places, pair_ids))
    pair_ids, pair_places = pair_ids[by_id], pair_places[by_id]
    listed, starts, sizes = np.unique(pair_ids, return_index=True, return_counts=True)
    gaps = np.diff(pair_places, prepend=-1) - 1
    gaps[starts] = pair_places[starts]
    class_of_pair = np.repeat(size_class(sizes), sizes)
    columns = {"hits": hits, "ids": np.diff(listed, prepend=-1) - 1, "sizes": sizes - 1}
    columns |= {f"places_{c}": gaps[class_of_pair == c] for c in range(SIZE_CLASSES)}
    return {name: column.astype(np.uint32) for name, column in columns.items()}


def join(
    pages: Pages,
    lists: Array,
    tokens: Array,
    labels: Array,
    present: Bool,
    vocab_size: int,
    limit: int,
) -> Sets:
    """Join the columns that `split` made, of W windows at once.

    Pairs are put in the order of their ids by arithmetic on whole lists; a stable radix sort by
    position then leaves the ids of every position ascending, followed by its hit, if it has one.

    Args:
        pages: numbers of the columns, read in the order of COLUMNS.
        lists: int64 [W], number of lists per window.
        tokens: int32 [W, L].
        labels: int64 [W, L], see `split`.
        present: bool [W, L].
        vocab_size: V, at most 2^31; ids are below it.
        limit: largest number of entries of all windows together.

    Raises:
        DamageError: the numbers of `pages` are not such lists.
    """
    order, carrying = reading_order(tokens, present), present.sum(1)
    labels = labels.reshape(-1)
    hits = _hits(pages.read("hits", carrying), order, labels, vocab_size)
    listed = _ascending(pages.read("ids", lists), lists, vocab_size)
    sizes = pages.read("sizes", lists).astype(np.int64)
    sizes += 1
    pairs = int(sizes.sum())
    if pairs + len(hits) > limit:
        raise DamageError(f"{pairs} pairs and {len(hits)} hits, where {limit} entries are possible")
    positions = np.empty(pairs + len(hits), np.min_scalar_type(tokens.size))
    destinations, places = _places(pages, lists, sizes, carrying)
    positions[destinations] = order.astype(positions.dtype).take(places)
    positions[pairs:] = hits
    ids = np.empty(len(positions), np.uint32)
    ids[:pairs] = np.repeat(listed.astype(np.uint32), sizes)
    ids[pairs:] = labels.take(hits)
    offsets = _exclusive_sums(np.bincount(positions, minlength=tokens.size))
    ids = ids.take(np.argsort(positions, kind="stable"))
    has_hit = np.zeros(tokens.size, np.bool_)
    has_hit[hits] = True
    ids, is_hit = _hits_in_place(ids, offsets, np.where(has_hit, labels, _NONE))
    _require_ascending(ids, offsets)
    return Sets(ids.astype(np.int64), offsets, is_hit, has_hit)


def reading_order(tokens: Array, present: Bool) -> Array:
    """Return the positions w L + p that carry a target, by (window w, token, position p), int64.

    Args:
        tokens: int32 [W, L].
        present: bool [W, L].
    """
    windows, length = tokens.shape
    shift = max(length - 1, 1).bit_length()
    largest, least = int(tokens.max(initial=0)), int(tokens.min(initial=0))
    narrow = least >= 0 and (largest + 1) << shift <= 1 << 31
    key = tokens.astype(np.int32 if narrow else np.int64) << shift
    key |= np.arange(length, dtype=key.dtype)
    everywhere = bool(present.all())
    if not everywhere:
        key[~present] = np.iinfo(key.dtype).max  # behind all others
    key.sort(axis=1)
    order: Array = (key & ((1 << shift) - 1)) + np.arange(windows)[:, None] * length
    if everywhere:
        return order.reshape(-1)
    carrying: Array = order[np.arange(length) < present.sum(1)[:, None]]
    return carrying


def size_class(sizes: Array) -> Array:
    """Return floor(log2(size)) of positive sizes, 7 at most, uint8."""
    return _CLASS_OF_SIZE.take(sizes, mode="clip")


def _exclusive_sums(lengths: Array) -> Array:
    """Return where each of n runs starts, and where the last one ends, int64 [n + 1]."""
    sums = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=sums[1:])
    return sums


def _hits(hits: Array, order: Array, labels: Array, vocab_size: int) -> Array:
    """Return the positions whose label is in their set, int64."""
    if len(hits) and int(hits.max()) > 1:
        raise DamageError("a hit is neither 0 nor 1")
    positions: Array = order[hits.astype(np.bool_)]
    ids = labels.take(positions)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DamageError("a hit is at a position without a label in the vocabulary")
    return positions


def _hits_in_place(ids: Array, offsets: Array, hit_ids: Array) -> tuple[Array, Bool]:
    """Move the hit of each position from behind its other ids to its place among them.

    Inserting h into an ascending sequence a gives max(a[i - 1], min(a[i], h)) at every i.

    Args:
        ids: uint32 [E].
        offsets: int64 [P + 1].
        hit_ids: int64 [P], _NONE where there is no hit.

    Returns:
        uint32 [E] and bool [E]: where the hits are now.
    """
    inserted = np.repeat(hit_ids.astype(np.uint32), np.diff(offsets))
    before = np.empty(len(ids) + 1, np.uint32)
    before[1:] = ids
    before[offsets] = 0
    moved = np.minimum(ids, inserted)
    np.maximum(moved, before[:-1], out=moved)
    return moved, moved == inserted


def _ascending(gaps: Array, lists: Array, vocab_size: int) -> Array:
    """Return the ids of the lists of each window, int64 [D]."""
    running: Array = np.cumsum(gaps, dtype=np.int64) + np.arange(1, len(gaps) + 1)
    stops = np.cumsum(lists)
    last = np.append(0, running)[stops]
    before = np.append(0, last[:-1])
    if bool((last - before > vocab_size).any()):
        raise DamageError(f"id {int((last - before).max()) - 1} is not below {vocab_size}")
    running -= np.repeat(before + 1, lists)
    return running


def _places(pages: Pages, lists: Array, sizes: Array, carrying: Array) -> tuple[Array, Array]:
    """Return the index of every listed pair in the order of ids, and its place.

    Pages hold the lists of a window by (size class, id). Places are counted through all windows.
    """
    windows, window = len(lists), np.repeat(np.arange(len(lists)), lists)
    classes = (window * SIZE_CLASSES + size_class(sizes)).astype(np.min_scalar_type(8 * windows))
    by_class = np.argsort(classes, kind="stable")
    starts = _exclusive_sums(sizes)[by_class]
    sizes = sizes[by_class]
    bounds = _exclusive_sums(sizes)
    runs = np.searchsorted(classes[by_class], np.arange(SIZE_CLASSES * windows + 1))
    ends = bounds[runs].tolist()
    gaps = np.empty(ends[-1], np.uint32)
    for c in range(SIZE_CLASSES):
        pages.fill(f"places_{c}", gaps, ends[c:-1:SIZE_CLASSES], ends[c + 1 :: SIZE_CLASSES])
    # running sums of gaps, less what came before a list, are places
    index = np.arange(len(gaps))
    places = np.cumsum(gaps, dtype=np.int64)
    places += index
    stops = places.take(bounds[1:] - 1) + 1 if len(sizes) else bounds[1:]
    before = np.append(0, stops)[:-1]
    if bool((stops - before > carrying[window]).any()):
        raise DamageError("a gap leads beyond the positions that carry a target")
    places += np.repeat(_exclusive_sums(carrying)[window] - before, sizes)
    index += np.repeat(starts - bounds[:-1], sizes)
    return index, places


def _require_ascending(ids: Array, offsets: Array) -> None:
    """Validate that ids ascend: a hit that is also in a list would be there twice."""
    ascends = np.empty(len(ids) + 1, np.bool_)
    np.greater(ids[1:], ids[:-1], out=ascends[1:-1])
    ascends[offsets] = True
    if not bool(ascends.all()):
        raise DamageError("an id occurs twice at one position")
