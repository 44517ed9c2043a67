"""Encode a window's sets of ids as an inverted index over positions sorted by token.

The sets consist of pairs of an id and a position. A pair takes about 11 bits if pairs are stored by
position, and about 10 bits if they are stored by id, as one list of positions per id, because few
different ids occur in a window and a list contains only gaps between positions. Two facts known to
the decoder reduce the size further. Positions are numbered in the order of (token, position), so
that positions with similar distributions are neighbours and gaps are small. The label of a position
is usually in its set, so it is left out of the lists and one bit per position states whether the
set contains it (a hit). benchmarks/size.py measures both savings.

No model of the vocabulary is fitted or stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparselogits.store.bounds import DamageError
from sparselogits.store.codec.columns import Array, BlockPages, Bool

SIZE_CLASSES = 8
"""Number of size classes of lists; each class has a separate column for its gaps."""

COLUMNS = ("hits", "ids", "sizes", *(f"places_{c}" for c in range(SIZE_CLASSES)))

_NO_ID = np.iinfo(np.uint32).max
_CLASS_OF_SIZE = np.array([max(n, 1).bit_length() - 1 for n in range(129)], np.uint8)


@dataclass(frozen=True)
class Sets:
    """Sets of ids at the P = W * L positions of W windows."""

    ids: Array  # int64 [E], in order of position and ascending within a position
    offsets: Array  # int64 [P + 1]; position p has entries [offsets[p], offsets[p + 1])
    is_hit: Bool  # [E], whether the id is the label of its position
    has_hit: Bool  # [P], whether the label of the position is in its set


def split(
    ids: Array, lengths: Array, tokens: Array, labels: Array, present: Bool
) -> dict[str, Array]:
    """Convert the sets of a window to columns.

    Args:
        ids: int64 [E], in order of position and strictly ascending within a position.
        lengths: int64 [L], number of ids of each position; 0 where `present` is False.
        tokens: int32 [L].
        labels: int64 [L], the token that each position predicts; negative if there is none.
        present: bool [L], True for positions with a target.

    Returns:
        uint32 arrays by the names in COLUMNS; "ids" has one number per list.
    """
    order = reading_order(tokens[None], present[None])
    rank_of = np.zeros(len(tokens), np.int64)
    rank_of[order] = np.arange(len(order))
    owner = np.repeat(np.arange(len(tokens)), lengths)
    hit = ids == labels[owner]
    hits = np.zeros(len(order), np.uint32)
    hits[rank_of[owner[hit]]] = 1
    pair_ids, pair_ranks = ids[~hit], rank_of[owner[~hit]]
    by_id = np.lexsort((pair_ranks, pair_ids))
    pair_ids, pair_ranks = pair_ids[by_id], pair_ranks[by_id]
    listed, starts, sizes = np.unique(pair_ids, return_index=True, return_counts=True)
    gaps = np.diff(pair_ranks, prepend=-1) - 1
    gaps[starts] = pair_ranks[starts]
    class_of_pair = np.repeat(size_class(sizes), sizes)
    columns = {"hits": hits, "ids": np.diff(listed, prepend=-1) - 1, "sizes": sizes - 1}
    columns |= {f"places_{c}": gaps[class_of_pair == c] for c in range(SIZE_CLASSES)}
    return {name: column.astype(np.uint32) for name, column in columns.items()}


def join(
    pages: BlockPages,
    lists: Array,
    tokens: Array,
    labels: Array,
    present: Bool,
    vocab_size: int,
    limit: int,
) -> Sets:
    """Convert the columns of W windows to sets of ids, as the inverse of `split`.

    Pairs are first arranged in order of window and id, and hits are appended. A stable sort by
    position then results in ascending ids at each position, followed by the position's hit, if any.

    Args:
        pages: columns, which are read in the order of COLUMNS.
        lists: int64 [W], number of lists of each window.
        tokens: int32 [W, L].
        labels: int64 [W, L]; see `split`.
        present: bool [W, L], True for positions with a target.
        vocab_size: vocabulary size V, at most 2^31.
        limit: largest total number of entries in all windows.

    Raises:
        DamageError: the columns do not encode sets of ids, or more than `limit` entries.
    """
    order, carrying = reading_order(tokens, present), present.sum(1)
    labels = labels.reshape(-1)
    hits = _hits(pages.read("hits", carrying), order, labels, vocab_size)
    listed = _ascending(pages.read("ids", lists), lists, vocab_size)
    sizes = pages.read("sizes", lists).astype(np.int64)
    sizes += 1
    pairs = int(sizes.sum())
    if pairs + len(hits) > limit:
        raise DamageError(
            f"found {pairs} pairs and {len(hits)} hits, expected at most {limit} entries"
        )
    positions = np.empty(pairs + len(hits), np.min_scalar_type(tokens.size))
    destinations, ranks = _ranks(pages, lists, sizes, carrying)
    positions[destinations] = order.astype(positions.dtype).take(ranks)
    positions[pairs:] = hits
    ids = np.empty(len(positions), np.uint32)
    ids[:pairs] = np.repeat(listed.astype(np.uint32), sizes)
    ids[pairs:] = labels.take(hits)
    offsets = running_sums(np.bincount(positions, minlength=tokens.size))
    ids = ids.take(np.argsort(positions, kind="stable"))
    has_hit = np.zeros(tokens.size, np.bool_)
    has_hit[hits] = True
    ids, is_hit = _merge_hits(ids, offsets, np.where(has_hit, labels, _NO_ID))
    _require_ascending(ids, offsets)
    return Sets(ids.astype(np.int64), offsets, is_hit, has_hit)


def reading_order(tokens: Array, present: Bool) -> Array:
    """Return the positions w * L + p with a target, sorted by (window w, token, position p)."""
    windows, length = tokens.shape
    shift = max(length - 1, 1).bit_length()
    largest, least = int(tokens.max(initial=0)), int(tokens.min(initial=0))
    narrow = least >= 0 and (largest + 1) << shift <= 1 << 31
    key = tokens.astype(np.int32 if narrow else np.int64) << shift
    key |= np.arange(length, dtype=key.dtype)
    everywhere = bool(present.all())
    if not everywhere:
        key[~present] = np.iinfo(key.dtype).max  # sorted last
    key.sort(axis=1)
    order: Array = (key & ((1 << shift) - 1)) + np.arange(windows)[:, None] * length
    if everywhere:
        return order.reshape(-1)
    carrying: Array = order[np.arange(length) < present.sum(1)[:, None]]
    return carrying


def size_class(sizes: Array) -> Array:
    """Return the size class min(floor(log2(size)), 7) of each list, uint8; sizes are positive."""
    return _CLASS_OF_SIZE.take(sizes, mode="clip")


def running_sums(lengths: Array) -> Array:
    """Return 0, followed by the running sums of n lengths, int64 [n + 1]."""
    sums = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=sums[1:])
    return sums


def _hits(hits: Array, order: Array, labels: Array, vocab_size: int) -> Array:
    """Return the positions whose label is in their set, int64."""
    if len(hits) and int(hits.max()) > 1:
        raise DamageError("a hit flag is neither 0 nor 1")
    positions: Array = order[hits.astype(np.bool_)]
    ids = labels.take(positions)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DamageError("a hit is at a position without a label in the vocabulary")
    return positions


def _merge_hits(ids: Array, offsets: Array, hit_ids: Array) -> tuple[Array, Bool]:
    """Sort the ids at each position, which ascend except for a hit at the end.

    Element i of the ascending sequence a with h inserted is max(a[i - 1], min(a[i], h)). `hit_ids`
    contains the hit of each position, or _NO_ID. The result is the ids, uint32 [E], and whether
    each is a hit, bool [E].
    """
    inserted = np.repeat(hit_ids.astype(np.uint32), np.diff(offsets))
    before = np.empty(len(ids) + 1, np.uint32)
    before[1:] = ids
    before[offsets] = 0
    moved = np.minimum(ids, inserted)
    np.maximum(moved, before[:-1], out=moved)
    return moved, moved == inserted


def _ascending(gaps: Array, lists: Array, vocab_size: int) -> Array:
    """Return the ids of all lists of all windows, int64 [D]."""
    running: Array = np.cumsum(gaps, dtype=np.int64) + np.arange(1, len(gaps) + 1)
    stops = np.cumsum(lists)
    last = np.append(0, running)[stops]
    before = np.append(0, last[:-1])
    if bool((last - before > vocab_size).any()):
        raise DamageError(
            f"found id {int((last - before).max()) - 1}, expected an id below {vocab_size}"
        )
    running -= np.repeat(before + 1, lists)
    return running


def _ranks(pages: BlockPages, lists: Array, sizes: Array, carrying: Array) -> tuple[Array, Array]:
    """Return each pair's index in order of id, and the rank of its position, int64 each.

    The columns contain the lists of a window in order of (size class, id). The rank of a position
    is its index in `reading_order`. `lists` and `carrying` contain the numbers of lists and of
    positions with a target in each window, and `sizes` contains the size of each list.
    """
    windows, window = len(lists), np.repeat(np.arange(len(lists)), lists)
    classes = (window * SIZE_CLASSES + size_class(sizes)).astype(np.min_scalar_type(8 * windows))
    by_class = np.argsort(classes, kind="stable")
    starts = running_sums(sizes)[by_class]
    sizes = sizes[by_class]
    bounds = running_sums(sizes)
    runs = np.searchsorted(classes[by_class], np.arange(SIZE_CLASSES * windows + 1))
    ends = bounds[runs].tolist()
    gaps = np.empty(ends[-1], np.uint32)
    for c in range(SIZE_CLASSES):
        pages.fill(f"places_{c}", gaps, ends[c:-1:SIZE_CLASSES], ends[c + 1 :: SIZE_CLASSES])
    # ranks are running sums of gaps, minus the sum before each list
    index = np.arange(len(gaps))
    ranks = np.cumsum(gaps, dtype=np.int64)
    ranks += index
    stops = ranks.take(bounds[1:] - 1) + 1 if len(sizes) else bounds[1:]
    before = np.append(0, stops)[:-1]
    if bool((stops - before > carrying[window]).any()):
        raise DamageError("a gap exceeds the positions with a target")
    ranks += np.repeat(running_sums(carrying)[window] - before, sizes)
    index += np.repeat(starts - bounds[:-1], sizes)
    return index, ranks


def _require_ascending(ids: Array, offsets: Array) -> None:
    """Validate that ids ascend strictly at each position."""
    ascends = np.empty(len(ids) + 1, np.bool_)
    np.greater(ids[1:], ids[:-1], out=ascends[1:-1])
    ascends[offsets] = True
    if not bool(ascends.all()):
        raise DamageError("an id occurs twice at one position")
