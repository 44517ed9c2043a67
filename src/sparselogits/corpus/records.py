"""A record with named fields is one document, wherever it comes from.

A record holds either its text in one field, or a `prompt` and a `completion`. Prompt and
completion are tokenised each for itself, as they are when the model is used, and where only
completions are to be learnt the prompt's tokens carry no target. A record without any text (null,
empty or white space only, or an empty completion where only completions count) becomes a blank
piece, to be left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparselogits.corpus.pieces import PIECE_BYTES, Piece, cut_pieces, document_key
from sparselogits.errors import CorpusError

Where = Callable[[], str]
"""Names a record's place for an error; called only if there is one."""


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold its text."""

    text: str = "text"
    """The field of plain text; records without it may hold `prompt` and `completion`."""
    completion_only: bool = False
    """Only completions carry targets; every record must then be a prompt and a completion."""

    def chosen(self, found: Collection[str], where: Where) -> list[str]:
        """The fields to read among those found.

        Raises:
            CorpusError: naming the place and the fields that are there.
        """
        if self.text in found and not self.completion_only:
            return [self.text]
        if "prompt" in found and "completion" in found:
            return ["prompt", "completion"]
        wanted = "`prompt` and `completion`"
        if not self.completion_only:
            wanted = f"`{self.text}`, nor {wanted}"
        advice = "" if self.completion_only else ". Name the field that holds the text (text_field)"
        names = ", ".join(f"`{name}`" for name in found) or "none"
        raise CorpusError(f"{where()} has no field {wanted}; its fields are {names}{advice}")


def record_pieces(
    record: Mapping[str, Any], fields: Fields, where: Where, size: int
) -> Iterator[Piece]:
    """The pieces of one record; none if it holds no text.

    Raises:
        CorpusError: for a missing field, or one that holds no text.
    """
    names = fields.chosen(record, where)
    texts = [_text(record[name], name, where) for name in names]
    wanted = texts[-1] if fields.completion_only else "".join(texts)
    if not wanted.strip():
        yield Piece("", 0, 0, 0, opens=True, closes=True, carries_target=True, size=size)
        return
    parts = [
        (name, raw)
        for name, text in zip(names, texts, strict=True)
        if (raw := _encoded(text, name, where))
    ]
    key = document_key(b"".join(raw for _, raw in parts))
    for number, (name, raw) in enumerate(parts):
        yield from _field_pieces(
            raw,
            key,
            opens=number == 0,
            closes=number == len(parts) - 1,
            carries_target=name != "prompt" or not fields.completion_only,
            size=size if number == 0 else 0,
        )


def _field_pieces(
    raw: bytes, key: int, *, opens: bool, closes: bool, carries_target: bool, size: int
) -> Iterator[Piece]:
    if len(raw) <= PIECE_BYTES:
        text = raw.decode()
        yield Piece(text, 0, len(text), key, opens, closes, carries_target, size)
        return
    for piece in cut_pieces(
        lambda start, stop: raw[start:stop], 0, len(raw), document=(0, len(raw)), key=key, name=""
    ):
        yield Piece(
            piece.text,
            piece.start,
            piece.stop,
            key,
            opens=piece.opens and opens,
            closes=piece.closes and closes,
            carries_target=carries_target,
            size=size if piece.opens else 0,
        )


def _text(value: object, name: str, where: Where) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise CorpusError(
        f"{where()}: the field `{name}` holds {type(value).__name__}, not text; name the field "
        "that holds the text (text_field)"
    )


def _encoded(text: str, name: str, where: Where) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where()}: the field `{name}` holds half of a surrogate pair at character "
            f"{error.start}, which is no Unicode text; remove or repair the record"
        ) from None
