"""Validate rows of Top-K logprobs from an inference server or another trainer, and flatten them.

Two forms are read. In lists of the tokens' length, `topk_ids` and `topk_logprobs` (or `top_ids` and
`top_logprobs`, as `export --format topk` writes them), element j is the teacher's distribution of
the token *after* token j. In vLLM's `prompt_logprobs`, element j is the distribution *of* token j,
{id: logprob} or {id: {"logprob": ...}}, and the first one is null. A null or empty element is a
position without a target; an entry with the logprob -inf is padding.
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
from sparselogits.objectives import Causal

TOKENS = ("input_ids", "tokens", "prompt_token_ids")
LISTS = (("topk_ids", "topk_logprobs"), ("top_ids", "top_logprobs"))
PROMPT = "prompt_logprobs"
MASS_TOLERANCE = 1e-3  # half-precision probabilities may sum to a little more than one

_BESIDE = ("window_index",)  # further columns of `export --format topk`
_EXPECTED = f"one of {', '.join(TOKENS)}, and " + " or ".join(
    [*(" with ".join(pair) for pair in LISTS), PROMPT]
)

_Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Collected:
    """A sequence of n tokens with its collected targets of E entries in total.

    Args:
        tokens: int32 [n].
        starts: bool [n], true where a row begins.
        lengths: int64 [n], number of entries of each position; 0 where it carries no target.
            Position j is the distribution of the token after token j.
        ids: int64 [E], ascending within a position.
        weights: float32 [E], the teacher's raw probabilities.
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
        """Return copies of tokens [start, stop) and their targets; views keep the rest alive."""
        first, last = (int(self.lengths[:end].sum()) for end in (start, stop))
        here, entries = slice(start, stop), slice(first, last)
        return Collected(
            self.tokens[here].copy(),
            self.starts[here].copy(),
            self.lengths[here].copy(),
            self.ids[entries].copy(),
            self.weights[entries].copy(),
        )

    @staticmethod
    def cat(parts: list[Collected]) -> Collected:
        """Return the concatenation of at least one sequence."""
        names = ("tokens", "starts", "lengths", "ids", "weights")
        return Collected(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def entries_per_position(record: Mapping[str, Any], where: Where) -> int:
    """Return the K with which a row was collected: the length of its longest list.

    Of `prompt_logprobs` it is the shortest, since vLLM adds the true token to the K likeliest where
    it is not among them. (A row in which it never is gives one too many.)
    """
    _, ids, _ = _parts(record, where)
    lengths = [len(row) for row in ids if row]
    if not lengths:
        _refuse(where, "no position has logprobs, so K is unknown; give --k")
    return min(lengths) if PROMPT in record else max(lengths)


def tokens_of(record: Mapping[str, Any], where: Where) -> int:
    """Return the number of tokens of a row."""
    return len(_parts(record, where)[0])


def read_row(record: Mapping[str, Any], where: Where, vocab_size: int, k: int) -> Collected:
    """Validate a row and return it; a position with more than k entries keeps its k likeliest.

    Raises:
        InvalidTargetsError: the row has another form; names the file and the row.
    """
    raw, id_rows, log_rows = _parts(record, where)
    tokens = _numbers(raw, "iu", "token ids", where)
    _require_ids(tokens, vocab_size, "token id", where)
    lengths = np.array([len(row) for row in id_rows], np.int64)
    for position, row in enumerate(log_rows):
        if len(row) != lengths[position]:
            there = f"position {position} has {lengths[position]} ids and {len(row)} logprobs"
            _refuse(where, f"{there}; expected pairs")
    ids = _numbers(list(chain.from_iterable(id_rows)), "iu", "ids", where)
    logs = _numbers(list(chain.from_iterable(log_rows)), "fiu", "logprobs", where)
    owner = np.repeat(np.arange(len(tokens)), lengths)
    wrong = np.flatnonzero(~(logs <= 0))  # NaN included
    if len(wrong):
        found = f"position {owner[wrong[0]]} has the logprob {logs[wrong[0]]}"
        _refuse(where, f"{found}; expected 0 or less")
    kept = logs > -np.inf
    ids, logs, owner = ids[kept], logs[kept].astype(np.float64), owner[kept]
    _require_ids(ids, vocab_size, "id", where)
    ids, logs, owner = _sets(ids, logs, owner, k, where)
    present = np.bincount(owner, minlength=len(tokens))
    starts = np.zeros(len(tokens), np.bool_)
    starts[:1] = True
    weights = np.exp(logs).astype(np.float32)
    return Collected(tokens.astype(np.int32), starts, present, ids.astype(np.int64), weights)


def _sets(
    ids: _Array, logs: _Array, owner: _Array, k: int, where: Where
) -> tuple[_Array, _Array, _Array]:
    """Return the k likeliest entries of each position, ordered by position and id."""
    by_id = np.lexsort((ids, owner))
    ids, logs, owner = ids[by_id], logs[by_id], owner[by_id]
    again = np.flatnonzero((owner[1:] == owner[:-1]) & (ids[1:] == ids[:-1]))
    if len(again):
        _refuse(
            where,
            f"position {owner[again[0]]} names the id {ids[again[0]]} more than once",
        )
    mass = np.bincount(owner, np.exp(logs))
    heavy = np.flatnonzero(mass > 1 + MASS_TOLERANCE)
    if len(heavy):
        found = f"position {heavy[0]} has probabilities that sum to {mass[heavy[0]]:.4f}"
        _refuse(where, f"{found}, more than 1; give natural logarithms at temperature 1")
    likeliest = np.lexsort((-logs, owner))
    ranked = owner[likeliest]
    rank = np.arange(len(ranked)) - np.searchsorted(ranked, ranked)
    kept = np.sort(likeliest[rank < k])
    return ids[kept], logs[kept], owner[kept]


def _parts(record: Mapping[str, Any], where: Where) -> tuple[list[Any], list[Any], list[Any]]:
    """Return tokens, and each position's ids and logprobs, as lists of equal length."""
    named = [name for name in TOKENS if name in record]
    pairs = [pair for pair in LISTS if all(name in record for name in pair)]
    shapes = [*pairs, *([(PROMPT,)] if PROMPT in record else [])]
    if len(named) != 1 or len(shapes) != 1 or set(record) - {*named, *shapes[0], *_BESIDE}:
        _refuse(where, f"the columns are {', '.join(record)}; expected {_EXPECTED}, and no others")
    for name in (*named, *shapes[0]):
        if not isinstance(record[name], list):
            _refuse(where, f"{name} is {type(record[name]).__name__}, not a list")
    tokens = record[named[0]]
    for name in shapes[0]:
        if len(record[name]) != len(tokens):
            _refuse(where, f"{len(tokens)} tokens, but {name} has {len(record[name])} elements")
    if shapes[0] == (PROMPT,):
        return tokens, *_of_prompt(record[PROMPT], where)
    ids, logs = ([_list(row, name, where) for row in record[name]] for name in shapes[0])
    return tokens, ids, logs


def _of_prompt(elements: list[Any], where: Where) -> tuple[list[Any], list[Any]]:
    """Return the ids and logprobs of vLLM's form: an element per token, as it was predicted."""
    if elements and elements[0]:
        _refuse(
            where,
            f"{PROMPT} begins with logprobs; expected null, as nothing predicts the first token",
        )
    predicted = Causal().at_positions(np.arange(len(elements)), -1).tolist()
    pairs = [[] if token < 0 else list(_pairs(elements[token], where)) for token in predicted]
    return [[i for i, _ in row] for row in pairs], [[x for _, x in row] for row in pairs]


def _pairs(element: Any, where: Where) -> Iterator[tuple[int, Any]]:
    # a map of Parquet is a list of pairs
    if isinstance(element, Mapping):
        element = list(element.items())
    for pair in _list(element, PROMPT, where):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            _refuse(where, f"{PROMPT} holds {pair!r}, not an id with its logprob")
        key, value = pair
        if isinstance(value, Mapping):
            value = value.get("logprob")
        try:
            yield int(key), value
        except (TypeError, ValueError):
            _refuse(where, f"{PROMPT} has the key {key!r}, which is no token id")


def _list(value: Any, name: str, where: Where) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        _refuse(where, f"{name} holds {value!r} where a position's list is expected")
    return value


def _numbers(values: list[Any], kinds: str, what: str, where: Where) -> _Array:
    """Return the values as an array, refused unless all are numbers of these kinds."""
    if not values:
        return np.empty(0, np.int64 if kinds == "iu" else np.float64)
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        array = np.array([None])
    if array.ndim != 1 or array.dtype.kind not in kinds:
        whole = "whole " if kinds == "iu" else ""
        _refuse(where, f"its {what} are not all {whole}numbers")
    return array


def _require_ids(ids: _Array, vocab_size: int, what: str, where: Where) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        _refuse(where, f"the {what} {wrong[0]} lies outside the vocabulary of {vocab_size} ids")


def _refuse(where: Where, what: str) -> NoReturn:
    raise InvalidTargetsError(f"{where()}: {what}")
