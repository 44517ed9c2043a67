"""Validate rows of Top-K logprobs and convert them to flat arrays.

A row has token ids and logprobs in one of two formats. In the lists `topk_ids` and `topk_logprobs`
(or `top_ids` and `top_logprobs`, as written by `export --format topk`), element j is the teacher's
distribution of the token *after* token j. In the list `prompt_logprobs` of vLLM, element j is the
distribution *of* token j, {id: logprob} or {id: {"logprob": ...}}, and the first element is null. A
null or empty element is a position without a target; entries with the logprob -inf are padding. The
optional list `document_starts`, also written by `export`, has the positions at which the teacher's
attention restarted, in addition to the beginning of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sparselogits.corpus.records import Where
from sparselogits.errors import InvalidTargetsError
from sparselogits.objectives import CAUSAL

TOKENS = ("input_ids", "tokens", "prompt_token_ids")
"""Accepted names of the column of token ids."""

LISTS = (("topk_ids", "topk_logprobs"), ("top_ids", "top_logprobs"))
"""Accepted names of the columns of ids and logprobs in the first format."""

PROMPT = "prompt_logprobs"
"""Name of the column of ids and logprobs in vLLM's format."""

STARTS = "document_starts"
"""Name of the optional column of the positions at which attention restarts."""

MASS_TOLERANCE = 1e-3
"""Amount by which a position's probabilities, rounded to half precision, may sum to more than 1."""

_OPTIONAL = ("window_index", STARTS)  # columns of `export --format topk`
_EXPECTED = f"one of {', '.join(TOKENS)}, and " + " or ".join(
    [*(" with ".join(pair) for pair in LISTS), PROMPT]
)

_Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Collected:
    """A sequence of n tokens with targets of E entries in total.

    The entries of position j are the teacher's distribution of the token after token j.

    Args:
        tokens: int32 [n].
        starts: bool [n], True for the first token of a row or of a document in it.
        lengths: int64 [n], number of entries per position; 0 for positions without a target.
        ids: int64 [E], in order of position and ascending within a position.
        weights: float32 [E], probabilities of the teacher.
    """

    tokens: _Array
    starts: _Array
    lengths: _Array
    ids: _Array
    weights: _Array

    def __len__(self) -> int:
        """Return the number n of tokens."""
        return len(self.tokens)

    def cut(self, start: int, stop: int) -> Collected:
        """Return a copy of the tokens [start, stop) and their targets."""
        first, last = (int(self.lengths[:end].sum()) for end in (start, stop))
        tokens, entries = slice(start, stop), slice(first, last)
        return Collected(  # copies, because views would keep the whole arrays in memory
            self.tokens[tokens].copy(),
            self.starts[tokens].copy(),
            self.lengths[tokens].copy(),
            self.ids[entries].copy(),
            self.weights[entries].copy(),
        )

    @staticmethod
    def cat(parts: list[Collected]) -> Collected:
        """Concatenate one or more sequences."""
        names = ("tokens", "starts", "lengths", "ids", "weights")
        return Collected(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def entries_per_position(record: Mapping[str, Any], where: Where) -> int:
    """Return the number K of entries per position with which a row was collected.

    K is the length of the longest list; for `prompt_logprobs`, the length of the shortest non-empty
    one, because vLLM adds the actual token to the K likeliest tokens if these lack it. If the K
    likeliest tokens lack the actual token at every position, the result is too large by one.

    Raises:
        InvalidTargetsError: the row has another format, or no position has logprobs.
    """
    _, ids, _ = _parts(record, where)
    lengths = [len(row) for row in ids if row]
    if not lengths:
        fail(where, "no position has logprobs, so K is unknown", "Give K (--k)")
    return min(lengths) if PROMPT in record else max(lengths)


def tokens_of(record: Mapping[str, Any], where: Where) -> int:
    """Return the number of tokens in a row. Raises InvalidTargetsError."""
    return len(_parts(record, where)[0])


def read_row(record: Mapping[str, Any], where: Where, vocab_size: int, k: int) -> Collected:
    """Validate a row, and convert it to arrays with at most k entries, the likeliest, per position.

    Raises:
        InvalidTargetsError: the row is invalid; the message contains the file and the row.
    """
    raw, id_rows, log_rows = _parts(record, where)
    tokens = as_numbers(raw, "iu", "token ids", where)
    _require_ids(tokens, vocab_size, "token id", where)
    lengths = np.array([len(row) for row in id_rows], np.int64)
    for position, row in enumerate(log_rows):
        if len(row) != lengths[position]:
            found = f"position {position} has {lengths[position]} ids and {len(row)} logprobs"
            fail(where, f"{found}; expected equal numbers")
    ids = as_numbers(list(chain.from_iterable(id_rows)), "iu", "ids", where)
    logs = as_numbers(list(chain.from_iterable(log_rows)), "fiu", "logprobs", where)
    owner = np.repeat(np.arange(len(tokens)), lengths)
    wrong = np.flatnonzero(~(logs <= 0))  # NaN included
    if len(wrong):
        found = f"position {owner[wrong[0]]} has the logprob {logs[wrong[0]]}"
        fail(where, f"{found}; expected 0 or less")
    kept = logs > -np.inf
    ids, logs, owner = ids[kept], logs[kept].astype(np.float64), owner[kept]
    _require_ids(ids, vocab_size, "id", where)
    ids, logs, owner = _sets(ids, logs, owner, k, where)
    present = np.bincount(owner, minlength=len(tokens))
    starts = np.zeros(len(tokens), np.bool_)
    starts[:1] = True
    starts[_restarts(record, len(tokens), where)] = True
    weights = np.exp(logs).astype(np.float32)
    return Collected(tokens.astype(np.int32), starts, present, ids.astype(np.int64), weights)


def _restarts(record: Mapping[str, Any], count: int, where: Where) -> _Array:
    """Return the positions in the column `STARTS`, int64. Raises InvalidTargetsError."""
    positions = as_numbers(_list(record.get(STARTS), STARTS, where), "iu", STARTS, where)
    wrong = positions[(positions < 0) | (positions >= count)]
    if len(wrong):
        fail(where, f"{STARTS} contains {wrong[0]}; expected positions of the row's {count} tokens")
    return positions.astype(np.int64)


def _sets(
    ids: _Array, logs: _Array, owner: _Array, k: int, where: Where
) -> tuple[_Array, _Array, _Array]:
    """Return ids, logprobs and positions of at most k entries, the likeliest, per position.

    The result is sorted by position and id. Raises InvalidTargetsError for repeated ids, or
    probabilities that sum to more than 1 + `MASS_TOLERANCE`.
    """
    by_id = np.lexsort((ids, owner))
    ids, logs, owner = ids[by_id], logs[by_id], owner[by_id]
    again = np.flatnonzero((owner[1:] == owner[:-1]) & (ids[1:] == ids[:-1]))
    if len(again):
        found = f"position {owner[again[0]]} has the id {ids[again[0]]} more than once"
        fail(where, f"{found}; expected distinct ids per position")
    mass = np.bincount(owner, np.exp(logs))
    heavy = np.flatnonzero(mass > 1 + MASS_TOLERANCE)
    if len(heavy):
        found = f"the probabilities of position {heavy[0]} sum to {mass[heavy[0]]:.4f}"
        advice = "Give natural logarithms at temperature 1"
        fail(where, f"{found}; expected at most 1", advice)
    likeliest = np.lexsort((-logs, owner))
    ranked = owner[likeliest]
    rank = np.arange(len(ranked)) - np.searchsorted(ranked, ranked)
    kept = np.sort(likeliest[rank < k])
    return ids[kept], logs[kept], owner[kept]


def _parts(record: Mapping[str, Any], where: Where) -> tuple[list[Any], list[Any], list[Any]]:
    """Return a row's tokens, and lists of ids and of logprobs per position.

    Raises InvalidTargetsError if the row has another format.
    """
    named = [name for name in TOKENS if name in record]
    pairs = [pair for pair in LISTS if all(name in record for name in pair)]
    shapes = [*pairs, *([(PROMPT,)] if PROMPT in record else [])]
    if len(named) != 1 or len(shapes) != 1 or set(record) - {*named, *shapes[0], *_OPTIONAL}:
        found = f"the columns are {', '.join(record)}"
        advice = "Rename or remove columns"
        fail(where, f"{found}; expected {_EXPECTED}, and no others", advice)
    for name in (*named, *shapes[0]):
        if not isinstance(record[name], list):
            fail(where, f"{name} is of type {type(record[name]).__name__}; expected a list")
    tokens = record[named[0]]
    for name in shapes[0]:
        if len(record[name]) != len(tokens):
            found = f"{name} has {len(record[name])} elements"
            fail(where, f"{found}; expected {len(tokens)}, one per token")
    if shapes[0] == (PROMPT,):
        return tokens, *_of_prompt(record[PROMPT], where)
    ids, logs = ([_list(row, name, where) for row in record[name]] for name in shapes[0])
    return tokens, ids, logs


def _of_prompt(elements: list[Any], where: Where) -> tuple[list[Any], list[Any]]:
    """Convert vLLM's format to lists of ids and logprobs per position.

    Element j + 1 belongs to position j, and the last position has no entries. Raises
    InvalidTargetsError for another format.
    """
    if elements and elements[0]:
        fail(where, f"{PROMPT} starts with logprobs; expected null for the first token")
    predicted = CAUSAL.at_positions(np.arange(len(elements)), -1).tolist()
    pairs = [[] if token < 0 else list(_pairs(elements[token], where)) for token in predicted]
    return [[i for i, _ in row] for row in pairs], [[x for _, x in row] for row in pairs]


def _pairs(element: Any, where: Where) -> Iterator[tuple[int, Any]]:
    """Yield the id and logprob of each entry in one element of vLLM's list."""
    if isinstance(element, Mapping):  # a map column of Parquet is a list of pairs already
        element = list(element.items())
    for pair in _list(element, PROMPT, where):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            fail(where, f"{PROMPT} contains {pair!r}; expected an id and its logprob")
        key, value = pair
        if isinstance(value, Mapping):
            value = value.get("logprob")
        try:
            yield int(key), value
        except (TypeError, ValueError):
            fail(where, f"{PROMPT} has the key {key!r}; expected a token id")


def _list(value: Any, name: str, where: Where) -> list[Any]:
    """Return a position's list, or an empty list for None. Raises InvalidTargetsError."""
    if value is None:
        return []
    if not isinstance(value, list):
        fail(where, f"{name} contains {value!r}; expected a list or null for each position")
    return value


def as_numbers(values: list[Any], kinds: str, what: str, where: Where) -> _Array:
    """Convert numbers to an array, whose `dtype.kind` must be one of the characters in `kinds`.

    Raises InvalidTargetsError if the array has another kind or several dimensions, or if some of
    the values are booleans.
    """
    if not values:
        return np.empty(0, np.int64 if kinds == "iu" else np.float64)
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        array = np.array([None])
    mixed = bool in set(map(type, values))  # NumPy converts booleans among numbers to 0 and 1
    if mixed or array.ndim != 1 or array.dtype.kind not in kinds:
        whole = "whole " if kinds == "iu" else ""
        fail(where, f"{what} are not all {whole}numbers")
    return array


def _require_ids(ids: _Array, vocab_size: int, what: str, where: Where) -> None:
    """Validate that ids are in the vocabulary. Raises InvalidTargetsError."""
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        fail(
            where,
            f"the {what} {wrong[0]} is outside the vocabulary of {vocab_size} ids",
            "Give the vocabulary size of the teacher's head",
        )


def fail(where: Where, what: str, advice: str = "Correct or remove the row") -> NoReturn:
    """Raise InvalidTargetsError with the location of a row."""
    raise InvalidTargetsError(f"{where()}: {what}. {advice}")
