"""Convert rows of token ids, as prepared for another trainer, to windows.

A row is one sequence of that trainer, and becomes one window: a shorter row is padded at its end
with tokens that carry no target, and a longer row is rejected, because cutting it would give
sequences that the trainer does not use. With `joined`, rows are concatenated and cut without gaps
instead.

| column | meaning |
|---|---|
| `input_ids` | token ids |
| `labels` | -100: the token carries no target; all others must equal the ids |
| `completion_mask`, `assistant_masks` | 0: the token carries no target |
| `attention_mask` | 0: padding at the end; a change of the number begins a document |
| `position_ids` | 0: begins a document; otherwise the previous position plus one |
| `seq_lengths` | lengths of the documents of a packed row |

Trainers do not let the documents of a row attend to each other, so a row of several documents needs
`reset_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sparselogits.corpus.pieces import Piece, TokenRow, document_key
from sparselogits.corpus.tokenizer_identity import TokenizerFingerprint
from sparselogits.corpus.windows import Packing
from sparselogits.errors import CorpusError
from sparselogits.objectives import IGNORE_INDEX

IDS = "input_ids"
"""Name of the column with token ids."""
COLUMNS = (
    *(IDS, "labels", "completion_mask", "assistant_masks"),
    *("attention_mask", "position_ids", "seq_lengths"),
)
"""Names of the columns that are read; others are ignored."""

_Where = Callable[[], str]
_Array = NDArray[Any]


@dataclass(frozen=True)
class TokenReading:
    """Settings for reading rows of token ids."""

    tokenizer: TokenizerFingerprint
    """Fingerprint of the tokenizer that the user gives for the ids."""
    joined: bool = False
    """Whether rows are concatenated and cut into windows; otherwise each row is one window."""
    packing: Packing | None = None
    """Rules that form the windows; None until `pack` sets them."""
    vocab_size: int = 0
    """Number V of the teacher's logits per position; 0 until `pack` sets it."""

    def to_json(self) -> dict[str, Any]:
        """Return the description of the settings in a packed corpus, as plain JSON values."""
        return {"tokenizer": str(self.tokenizer), "rows": "joined" if self.joined else "windows"}

    @property
    def settled(self) -> Packing:
        """Rules that form the windows.

        Raises:
            CorpusError: `pack` has not set them.
        """
        if self.packing is None:
            raise CorpusError(
                "the source contains token ids, which have no text to show; pack it, then read "
                "windows"
            )
        return self.packing


def token_piece(
    ids: _Array,
    where: _Where,
    reading: TokenReading,
    size: int,
    *,
    learnt: NDArray[np.bool_] | None = None,
    starts: _Array | None = None,
    opens: bool = True,
    closes: bool = True,
) -> Piece:
    """Return the piece for a row of at least one token id, or for a part of a joined row.

    Args:
        ids: integer [N] token ids without padding.
        where: function that returns the name of the row, for errors.
        reading: settings, with `packing` and `vocab_size` set.
        size: number of bytes that the row occupies in the source.
        learnt: whether each token carries a target, bool [N]; None if all tokens do.
        starts: positions greater than 0 at which documents begin; None for one document.
        opens: whether the piece begins with the row's first token.
        closes: whether the piece ends with the row's last token.

    Raises:
        CorpusError: an id lies outside the vocabulary; the row is longer than a window, and rows
            are not joined; or the row has several documents although each window is to have one.
    """
    packing, count = reading.settled, len(ids)
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or largest >= reading.vocab_size:
        wrong = least if least < 0 else largest
        raise CorpusError(
            f"{where()} contains the token id {wrong}, but the teacher's vocabulary has "
            f"{reading.vocab_size} ids. The ids are of another tokenizer, or were stored in too "
            "few bits; tokenize the text again with the teacher's tokenizer"
        )
    require_fitting(count, where, reading)
    length = count if reading.joined else packing.window_length
    padding = packing.separator_id if packing.padding_id is None else packing.padding_id
    padded = np.full(length, padding, np.int64)
    padded[:count] = ids
    flags, begins = np.zeros(length, np.bool_), np.zeros(length, np.bool_)
    flags[:count] = True if learnt is None else learnt
    if starts is not None:
        if len(starts) and packing.of_documents:
            _reject(
                where,
                f"contains {len(starts) + 1} documents, but each window was to have one document "
                "(--packing documents); give a row per document, or leave the option out",
            )
        begins[starts] = True
    if count < length:  # padding counts as a separate document
        begins[count] = True
    key = document_key(padded.astype("<i4").tobytes())
    row = TokenRow(padded, flags, begins)
    return Piece("", 0, 0, key, opens, closes, size=size, tokens=row)


def require_fitting(count: int, where: _Where, reading: TokenReading) -> None:
    """Validate that a row of `count` tokens is not longer than a window, unless rows are joined.

    Raises:
        CorpusError: the row is longer.
    """
    length = reading.settled.window_length
    if not reading.joined and count > length:
        raise CorpusError(
            f"{where()} has {count:,} tokens, more than a window of {length}. Give a window as "
            "long as the longest row (--window), or join the rows and cut them into windows "
            "(--join-rows)"
        )


def record_row(
    values: Mapping[str, Any], where: _Where, size: int, reading: TokenReading
) -> Piece | None:
    """Return a record's row of token ids as a piece; None if the row is null or has no tokens.

    Raises:
        CorpusError: `input_ids` is missing, a column is invalid or contradicts another column, or
            the row has several documents although attention is not reset; or the errors of
            `token_piece`.
    """
    found = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    if IDS not in values:
        names = ", ".join(f"`{name}`" for name in values) or "none"
        _reject(where, f"has no column `{IDS}`; its columns are {names}. Give tokenized data")
    if IDS not in found:
        return None
    ids = _integers(found, IDS, where)
    columns = {
        name: _integers(found, name, where, len(ids))
        for name in found
        if name not in (IDS, "seq_lengths")
    }
    count = _unpadded(columns.get("attention_mask"), len(ids), where)
    if not count:
        return None
    learnt = np.ones(len(ids), np.bool_)
    for name in ("completion_mask", "assistant_masks"):
        if name in columns:
            learnt &= columns[name] != 0
    if "labels" in columns:
        _require_labels(columns["labels"][:count], ids[:count], where)
        learnt &= columns["labels"] != IGNORE_INDEX
    starts = _starts(columns, found, count, len(ids), where)
    if starts is not None and len(starts) and not reading.settled.reset_attention:
        _reject(
            where,
            f"contains {len(starts) + 1} documents that must not attend to each other, but "
            "attention is not reset; reset attention at documents (--reset-attention), or remove "
            "the columns position_ids, seq_lengths and attention_mask",
        )
    return token_piece(ids[:count], where, reading, size, learnt=learnt[:count], starts=starts)


def _integers(
    columns: Mapping[str, Any], name: str, where: _Where, length: int | None = None
) -> _Array:
    """Return a column of a row as int64 [N]; booleans become 0 and 1.

    Raises:
        CorpusError: the column is not a flat list of integers or booleans, or not of the given
            length.
    """
    value = columns[name]
    if not isinstance(value, list | tuple | np.ndarray):
        _reject(where, f"has {type(value).__name__} in `{name}`; give a list of numbers")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # ragged, or beyond 64 bits
        array = np.array([None])
    if array.size == 0:
        array = np.empty(0, np.int64)
    if array.ndim != 1:
        _reject(where, f"has lists in `{name}`; give one flat list of numbers per row")
    if array.dtype.kind not in "iub":
        _reject(where, f"has other values than integers in `{name}`; tokenize the text again")
    if array.size and int(array.max()) >= 1 << 63:
        _reject(
            where,
            f"has the number {array.max()} in `{name}`, which no tokenizer has; tokenize the text "
            "again",
        )
    if length is not None and len(array) != length:
        _reject(
            where,
            f"has {length} ids and {len(array)} values of `{name}`; give one value per id",
        )
    return array.astype(np.int64)


def _unpadded(mask: _Array | None, length: int, where: _Where) -> int:
    """Return the number of tokens before the padding at the end of a row."""
    if mask is None:
        return length
    count = int(np.count_nonzero(mask))
    if not mask[:count].all():
        at = int(np.flatnonzero(mask == 0)[0])
        _reject(
            where,
            f"has an attention_mask of 0 at position {at}, before tokens; expected padding only at "
            "the end, which does not shift positions. Pad on the right, or do not pad",
        )
    return count


def _require_labels(labels: _Array, ids: _Array, where: _Where) -> None:
    """Validate that labels are the ids at the same positions or `IGNORE_INDEX`."""
    wrong = np.flatnonzero((labels != IGNORE_INDEX) & (labels != ids))
    if not len(wrong):
        return
    at = int(wrong[0])
    ahead = labels[:-1]
    shifted = bool(((ahead == ids[1:]) | (ahead == IGNORE_INDEX)).all())
    advice = (
        "the labels are shifted by one; give unshifted labels, as for transformers' models"
        if shifted
        else f"give the id or {IGNORE_INDEX}; targets other than the text are not supported"
    )
    _reject(where, f"has the label {labels[at]} for the id {ids[at]} at position {at}; {advice}")


def _starts(
    columns: Mapping[str, _Array], found: Mapping[str, Any], count: int, padded: int, where: _Where
) -> _Array | None:
    """Return the positions greater than 0 at which documents begin; None if no column states them.

    Raises:
        CorpusError: columns contradict each other, or a column is invalid.
    """
    marks: dict[str, _Array] = {}
    mask, positions = columns.get("attention_mask"), columns.get("position_ids")
    if mask is not None and (changes := np.flatnonzero(np.diff(mask[:count])) + 1).size:
        marks["attention_mask"] = changes
    if positions is not None:
        positions = positions[:count]
        begins = np.append(0, np.flatnonzero(np.diff(positions) != 1) + 1)
        wrong = begins[positions[begins] != 0]
        if len(wrong):
            _reject(
                where,
                f"has the position id {positions[wrong[0]]} at position {wrong[0]}; give 0, or the "
                "previous position id plus one; other positions are not supported",
            )
        marks["position_ids"] = begins[1:]
    if "seq_lengths" in found:
        lengths = _integers(found, "seq_lengths", where)
        within = ((lengths > 0) & (lengths <= padded)).all()
        if not within or int(lengths.sum()) not in (count, padded):
            total = f"sum to {int(lengths.sum())}" if within else "are not positive"
            _reject(
                where,
                f"has seq_lengths that {total}; give lengths that sum to the row's {count} tokens",
            )
        ends = np.cumsum(lengths)[:-1]
        marks["seq_lengths"] = ends[ends < count]
    for (first, starts), (second, others) in pairwise(marks.items()):
        if not np.array_equal(starts, others):
            at = np.setxor1d(starts, others)[0]
            _reject(
                where,
                f"begins a document at position {at} according to only one of {first} and "
                f"{second}; remove the column that the trainer does not read",
            )
    return next(iter(marks.values()), None)


def _reject(where: _Where, what: str) -> NoReturn:
    raise CorpusError(f"{where()} {what}")
