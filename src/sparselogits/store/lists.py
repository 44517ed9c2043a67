"""The coding of ids: a window's sets as an inverted index over positions sorted by their token.

The ids of a window are a set of (id, position) pairs. Written position by position they cost 11
bits a pair. Written id by id, each id with the list of positions that hold it, they cost 9: a
window speaks of few things, so a list says its id once and then only gaps. Two things the reader
knows already make it less. The window's own tokens: positions are numbered by (their token, place
in the window), so that positions with alike distributions stand side by side and gaps are small.
And the true next token, which more often than not is in the set: one bit a position says whether,
and the lists leave it out. benchmarks/size.py measures what each of these buys.

No model of the vocabulary is fitted or stored: nothing to keep, mix up, or fit on the wrong text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bool = NDArray[np.bool_]

SIZE_CLASSES = 8
COLUMNS = ("hits", "ids", "sizes", *(f"places_{c}" for c in range(SIZE_CLASSES)))
LARGEST_WINDOW = 1 << 24  # entries a window may hold: what bounds a decoder's memory


_CLASS_OF_SIZE = np.array([max(n, 1).bit_length() - 1 for n in range(129)], np.uint8)


class ListsError(ValueError):
    """Lists that are no sets of ids at positions of the window."""


@dataclass(frozen=True)
class Sets:
    """The sets of a window's positions.

    Args:
        ids: int64 [E], ascending within a position, positions in order.
        lengths: int64 [L], entries of each position.
        hits: int64, ascending: the entries whose id is the true next token.
        hit_positions: int64: the positions of these.
    """

    ids: Array
    lengths: Array
    hits: Array
    hit_positions: Array


def split(ids: Array, lengths: Array, tokens: Array, present: Bool) -> dict[str, Array]:
    """The columns of a window's sets.

    Args:
        ids: int64 [E], strictly ascending within a position.
        lengths: int64 [L], 0 where `present` is False.
        tokens: int32 [L].
        present: bool [L]: positions that carry a target.

    Returns:
        uint32 arrays by the names in COLUMNS; "ids" has one number a list.
    """
    order = reading_order(tokens, present)
    place_of = np.zeros(len(tokens), np.int64)
    place_of[order] = np.arange(len(order))
    owner = np.repeat(np.arange(len(tokens)), lengths)
    hit = ids == next_tokens(tokens)[owner]
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
    read: Callable[[str, int], Array],
    lists: int,
    tokens: Array,
    present: Bool,
    vocab_size: int,
    limit: int = LARGEST_WINDOW,
) -> Sets:
    """The sets that `split` took apart.

    Args:
        read: gives the next `length` numbers, uint32, of a column; called in COLUMNS' order.
        lists: how many lists there are.
        tokens: int32 [L].
        present: bool [L].
        vocab_size: ids lie below it.
        limit: entries the window can have at most.

    Raises:
        ListsError: what `read` gave are no such lists.
    """
    order = reading_order(tokens, present)
    bits = _key_bits(len(tokens), vocab_size)
    hit_keys = _keys_of_hits(read("hits", len(order)), order, tokens, vocab_size, bits)
    listed = _ascending(read("ids", lists), vocab_size, "id")
    sizes = read("sizes", lists).astype(np.int64) + 1
    entries = int(sizes.sum()) + len(hit_keys)
    if lists and (int(sizes.max()) > len(order) or entries > limit):
        raise ListsError(f"{entries} entries in {lists} lists over {len(order)} positions")
    keys = np.empty(entries, hit_keys.dtype)
    _fill_keys(keys[: entries - len(hit_keys)], read, listed, sizes, order, bits)
    keys[entries - len(hit_keys) :] = hit_keys
    keys.sort()
    if bool(((keys[1:] ^ keys[:-1]) <= 1).any()):
        raise ListsError("an id stands twice at one position")
    owner = (keys >> bits).astype(np.int64)
    lengths = np.bincount(owner, minlength=len(tokens))
    ids = ((keys & keys.dtype.type((1 << bits) - 1)) >> 1).astype(np.int64)
    hits = np.flatnonzero(keys & 1)
    return Sets(ids, lengths, hits, owner[hits])


def reading_order(tokens: Array, present: Bool) -> Array:
    """int64 [Q]: the positions that carry a target, by (token, position)."""
    shift = max(len(tokens) - 1, 1).bit_length()
    key = tokens.astype(np.int64) << shift | np.arange(len(tokens))
    key = np.sort(key if bool(present.all()) else key[present])
    order: Array = key & ((1 << shift) - 1)
    return order


def next_tokens(tokens: Array) -> Array:
    """int64 [L]: each position's true next token; -1 at the last, whose next is not there."""
    following = np.full(len(tokens), -1, np.int64)
    following[:-1] = tokens[1:]
    return following


def size_class(sizes: Array) -> Array:
    """uint8: floor(log2(size)), 7 at most, of positive sizes."""
    return _CLASS_OF_SIZE.take(sizes, mode="clip")


def _key_bits(length: int, vocab_size: int) -> int:
    """A pair is sorted as the number position << bits | id << 1 | hit; uint32 where it fits."""
    return max(vocab_size - 1, 1).bit_length() + 1


def _keys_of_hits(hits: Array, order: Array, tokens: Array, vocab_size: int, bits: int) -> Array:
    if len(hits) and int(hits.max()) > 1:
        raise ListsError("a hit is neither 0 nor 1")
    positions = order[hits != 0]
    ids = next_tokens(tokens)[positions]
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ListsError("a hit stands where there is no next token within the vocabulary")
    narrow = (len(tokens) << bits) <= 1 << 32
    keys: Array = positions << bits | ids << 1 | 1
    return keys.astype(np.uint32 if narrow else np.uint64)


def _ascending(gaps: Array, stop: int, what: str) -> Array:
    values: Array = np.cumsum(gaps, dtype=np.int64) + np.arange(len(gaps))
    if len(values) and int(values[-1]) >= stop:
        raise ListsError(f"{what} {int(values[-1])} is not below {stop}")
    return values


def _fill_keys(
    keys: Array,
    read: Callable[[str, int], Array],
    listed: Array,
    sizes: Array,
    order: Array,
    bits: int,
) -> None:
    """Keys of the listed pairs, list by list, lists by (class, id).

    Arithmetic is modulo the key's width throughout. A forged gap may wrap; what comes out is then
    a wrong place, caught by its range, or by a key that stands twice.
    """
    classes = size_class(sizes)
    by_class = np.argsort(classes, kind="stable")
    sizes = sizes[by_class]
    ends = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    stops = ends[np.cumsum(np.bincount(classes, minlength=SIZE_CLASSES))].tolist()
    start = 0
    for c, stop in enumerate(stops):
        keys[start:stop] = read(f"places_{c}", stop - start)
        start = stop
    if len(keys) == 0:
        return
    # running sums of gaps, less what came before a list, are places; ids are added on the way
    keys += 1
    np.cumsum(keys, dtype=keys.dtype, out=keys)
    before = np.zeros(len(sizes), np.int64)
    before[1:] = keys[ends[1:-1] - 1]
    keys <<= keys.dtype.type(bits)
    keys += np.repeat(((listed[by_class] << 1) - ((before + 1) << bits)).astype(keys.dtype), sizes)
    places = (keys >> keys.dtype.type(bits)).astype(np.int64)
    if int(places.max()) >= len(order):
        raise ListsError(f"a gap leads beyond the {len(order)} positions")
    keys += ((order - np.arange(len(order))) << bits).astype(keys.dtype).take(places, mode="clip")
