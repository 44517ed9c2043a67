"""Turn rows of token ids that a trainer prepared into windows, exactly as that trainer reads them.

A row is one sequence of the trainer. It becomes one window: a shorter row is padded at its end with
tokens that carry no target, and a longer one is refused, because cutting it would make sequences
that the trainer never sees. With `joined`, rows are concatenated and cut without gaps instead.

| column | read as |
|---|---|
| `input_ids` | token ids |
| `labels` | -100: token that is not learnt; all others must equal the ids |
| `completion_mask`, `assistant_masks` | 0: token that is not learnt |
| `attention_mask` | 0: padding at the end; a change of the number begins a document |
| `position_ids` | 0: begins a document; otherwise one more than the position before |
| `seq_lengths` | lengths of the documents of a packed row |

Documents within a row are kept apart by the trainer, so such a row needs `reset_attention`.
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

IDS = "input_ids"
COLUMNS = (
    *(IDS, "labels", "completion_mask", "assistant_masks"),
    *("attention_mask", "position_ids", "seq_lengths"),
)
"""Columns that are read; others are ignored."""
IGNORED = -100
"""Label of a token that is not learnt."""

_Where = Callable[[], str]
_Array = NDArray[Any]


@dataclass(frozen=True)
class TokenReading:
    """How rows of token ids are read."""

    tokenizer: TokenizerFingerprint
    """Fingerprint of the tokenizer that made the ids, as named by the user."""
    joined: bool = False
    """Whether rows are concatenated and cut, instead of one row per window."""
    packing: Packing | None = None
    """Packing of the windows; None until the text is packed."""
    vocab_size: int = 0
    """Number of ids that the teacher knows; 0 until the text is packed."""

    def to_json(self) -> dict[str, Any]:
        """Return what a packed corpus records, as plain JSON values."""
        return {"tokenizer": str(self.tokenizer), "rows": "joined" if self.joined else "windows"}

    @property
    def settled(self) -> Packing:
        """The packing of the windows.

        Raises:
            CorpusError: the text is not being packed, so rows cannot become windows.
        """
        if self.packing is None:
            raise CorpusError(
                "the source holds token ids, which have no text to show; pack it, then read windows"
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
    """Return a row, or a part of a joined row, as a piece.

    Args:
        ids: token ids without padding, at least one.
        where: names the row, for errors.
        reading: how rows are read.
        size: bytes of the source that the row takes.
        learnt: whether each token is learnt; None if all are.
        starts: positions at which documents begin, besides 0.
        opens: whether the row begins here.
        closes: whether the row ends here.

    Raises:
        CorpusError: an id lies outside the vocabulary, or the row is longer than a window.
    """
    packing, count = reading.settled, len(ids)
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or largest >= reading.vocab_size:
        wrong = least if least < 0 else largest
        raise CorpusError(
            f"{where()} holds the token id {wrong}; the teacher's vocabulary has "
            f"{reading.vocab_size} ids. The ids were made by another tokenizer, or stored in too "
            "few bits: tokenize the text anew with the teacher's tokenizer"
        )
    require_fitting(count, where, reading)
    length = count if reading.joined else packing.window_length
    padded = np.full(length, packing.separator_id, np.int64)
    padded[:count] = ids
    flags, begins = np.zeros(length, np.bool_), np.zeros(length, np.bool_)
    flags[:count] = True if learnt is None else learnt
    if starts is not None:
        begins[starts] = True
    if count < length:  # so that padding belongs to no document
        begins[count] = True
    key = document_key(padded.astype("<i4").tobytes())
    row = TokenRow(padded, flags, begins)
    return Piece("", 0, 0, key, opens, closes, carries_target=True, size=size, tokens=row)


def require_fitting(count: int, where: _Where, reading: TokenReading) -> None:
    """Refuse a row that is longer than a window, unless rows are joined.

    Raises:
        CorpusError: the row is longer.
    """
    length = reading.settled.window_length
    if not reading.joined and count > length:
        raise CorpusError(
            f"{where()} has {count:,} tokens, more than a window of {length}. Give a window as "
            "long as the longest row (--window), or join the rows (--join-rows), which cuts them "
            "where windows end"
        )


def record_row(
    values: Mapping[str, Any], where: _Where, size: int, reading: TokenReading
) -> Piece | None:
    """Return the row of a record as a piece; None if it holds no token.

    Raises:
        CorpusError: a column is missing, has another length, or contradicts another; names the row.
    """
    found = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    if IDS not in found:
        names = ", ".join(f"`{name}`" for name in values) or "none"
        _refuse(where, f"has no column `{IDS}`; its columns are {names}. Name tokenized data")
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
        learnt &= columns["labels"] != IGNORED
    starts = _starts(columns, found, count, len(ids), where)
    if starts is not None and len(starts) and not reading.settled.reset_attention:
        _refuse(
            where,
            f"holds {len(starts) + 1} documents, which the trainer keeps apart, but attention "
            "crosses them here; reset attention at documents (--reset-attention), or leave out "
            "the columns position_ids, seq_lengths and attention_mask",
        )
    return token_piece(ids[:count], where, reading, size, learnt=learnt[:count], starts=starts)


def _integers(
    columns: Mapping[str, Any], name: str, where: _Where, length: int | None = None
) -> _Array:
    """Return a column of a row as int64, refused unless it is a flat list of whole numbers."""
    value = columns[name]
    if not isinstance(value, list | tuple | np.ndarray):
        _refuse(where, f"holds {type(value).__name__} in `{name}`; expected a list of numbers")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # ragged, or beyond 64 bits
        array = np.array([None])
    if array.size == 0:
        array = np.empty(0, np.int64)
    if array.ndim != 1:
        _refuse(where, f"holds lists in `{name}`; expected one flat list of numbers per row")
    if array.dtype.kind not in "iub":
        _refuse(where, f"holds other values than whole numbers in `{name}`; tokenize it anew")
    if length is not None and len(array) != length:
        _refuse(
            where,
            f"has {length} ids and {len(array)} values of `{name}`; expected equal numbers",
        )
    return array.astype(np.int64)


def _unpadded(mask: _Array | None, length: int, where: _Where) -> int:
    """Return the number of tokens before the padding at the end of a row."""
    if mask is None:
        return length
    count = int(np.count_nonzero(mask))
    if not mask[:count].all():
        at = int(np.flatnonzero(mask == 0)[0])
        _refuse(
            where,
            f"has an attention_mask of 0 at position {at}, before tokens; only padding at the end "
            "of a row keeps positions. Pad on the right, or do not pad",
        )
    return count


def _require_labels(labels: _Array, ids: _Array, where: _Where) -> None:
    """Refuse labels that are other tokens than the ids at the same positions."""
    wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
    if not len(wrong):
        return
    at = int(wrong[0])
    ahead = labels[:-1]
    shifted = bool(((ahead == ids[1:]) | (ahead == IGNORED)).all())
    advice = (
        "the labels are shifted by one; give them unshifted, as transformers' models take them"
        if shifted
        else f"expected the id or {IGNORED}: other targets than the text cannot be learnt here"
    )
    _refuse(where, f"has the label {labels[at]} for the id {ids[at]} at position {at}; {advice}")


def _starts(
    columns: Mapping[str, _Array], found: Mapping[str, Any], count: int, padded: int, where: _Where
) -> _Array | None:
    """Return where documents begin within a row, besides 0; None if no column tells."""
    marks: dict[str, _Array] = {}
    mask, positions = columns.get("attention_mask"), columns.get("position_ids")
    if mask is not None and (changes := np.flatnonzero(np.diff(mask[:count])) + 1).size:
        marks["attention_mask"] = changes
    if positions is not None:
        positions = positions[:count]
        begins = np.append(0, np.flatnonzero(np.diff(positions) != 1) + 1)
        wrong = begins[positions[begins] != 0]
        if len(wrong):
            _refuse(
                where,
                f"has the position id {positions[wrong[0]]} at position {wrong[0]}; expected 0, or "
                "one more than the position before. Other positions cannot be reproduced",
            )
        marks["position_ids"] = begins[1:]
    if "seq_lengths" in found:
        lengths = _integers(found, "seq_lengths", where)
        within = ((lengths > 0) & (lengths <= padded)).all()
        if not within or int(lengths.sum()) not in (count, padded):
            total = int(lengths.sum()) if within else "other than positive lengths"
            _refuse(where, f"has seq_lengths that make {total}; expected the row's {count} tokens")
        ends = np.cumsum(lengths)[:-1]
        marks["seq_lengths"] = ends[ends < count]
    for (first, own), (second, other) in pairwise(marks.items()):
        if not np.array_equal(own, other):
            _refuse(
                where,
                f"has {len(own) + 1} documents by {first} and {len(other) + 1} by {second}, or "
                "other ones; leave out the column that the trainer does not read",
            )
    return next(iter(marks.values()), None)


def _refuse(where: _Where, what: str) -> NoReturn:
    raise CorpusError(f"{where()} {what}")
