"""A record with named fields is one document, wherever it comes from.

A record holds its text in one field, or a `prompt` and a `completion`, or `messages`. Prompt and
completion are tokenised each for itself, as they are when the model is used, and where only
completions are to be learnt the prompt's tokens carry no target. Messages (a `prompt` and a
`completion` may be messages, too) become text by a chat template, and what the assistant says is
the completion, turn by turn. A record without any text (null, empty or white space only, or an
empty completion where only completions count) becomes a blank piece, to be left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparselogits.corpus.chat import ChatTemplate, Part
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
    """Only completions carry targets; every record must then hold one."""
    chat: ChatTemplate | None = None
    """Makes text of messages; None where records hold none."""

    def chosen(self, found: Collection[str], where: Where) -> list[str]:
        """The fields to read among those found.

        Raises:
            CorpusError: naming the place and the fields that are there.
        """
        if self.text in found and not self.completion_only:
            return [self.text]
        if "prompt" in found and "completion" in found:
            return ["prompt", "completion"]
        if "messages" in found:
            return ["messages"]
        wanted = "`prompt` and `completion`, nor `messages`"
        if not self.completion_only:
            wanted = f"`{self.text}`, nor {wanted}"
        advice = "" if self.completion_only else ". Name the field that holds the text (text_field)"
        names = ", ".join(f"`{name}`" for name in found) or "none"
        raise CorpusError(f"{where()} has no field {wanted}; its fields are {names}{advice}")


def is_conversation(record: Mapping[str, Any], fields: Fields, where: Where) -> bool:
    """Whether a record's text is to be made of messages. Errors are those of `Fields.chosen`."""
    return _is_conversation({name: record[name] for name in fields.chosen(record, where)})


def _is_conversation(chosen: Mapping[str, Any]) -> bool:
    if "prompt" in chosen and "completion" in chosen:
        return any(isinstance(value, list) for value in chosen.values())
    return "messages" in chosen


def record_pieces(
    record: Mapping[str, Any], fields: Fields, where: Where, size: int
) -> Iterator[Piece]:
    """The pieces of one record; none if it holds no text.

    Raises:
        CorpusError: for a missing field, one that holds no text, or messages without a template.
    """
    names = fields.chosen(record, where)
    parts = _parts({name: record[name] for name in names}, fields, where)
    wanted = "".join(text for text, learnt in parts if learnt or not fields.completion_only)
    if not wanted.strip():
        yield Piece("", 0, 0, 0, opens=True, closes=True, carries_target=True, size=size)
        return
    encoded = [
        (raw, learnt)
        for text, learnt in parts
        if (raw := _encoded(text, "`, `".join(names), where))
    ]
    key = document_key(b"".join(raw for raw, _ in encoded))
    for number, (raw, learnt) in enumerate(encoded):
        yield from _field_pieces(
            raw,
            key,
            opens=number == 0,
            closes=number == len(encoded) - 1,
            carries_target=learnt or not fields.completion_only,
            size=size if number == 0 else 0,
        )


def _parts(chosen: Mapping[str, Any], fields: Fields, where: Where) -> list[Part]:
    if not _is_conversation(chosen):
        return [(_text(value, name, where), name != "prompt") for name, value in chosen.items()]
    if all(value is None for value in chosen.values()):
        return []
    for name, value in chosen.items():
        if not (isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value)):
            raise CorpusError(
                f"{where()}: the field `{name}` holds no messages, which are a list of objects "
                "with `role` and `content`"
            )
    if fields.chat is None:
        raise CorpusError(
            f"{where()} holds messages, and nothing that makes text of them: give a tokenizer that "
            "has a chat template (of a base model, set one that writes turns as the student is to "
            "read them), or write text into the records"
        )
    try:
        if "messages" in chosen:
            return fields.chat.parts(chosen["messages"])
        return fields.chat.answered(chosen["prompt"], chosen["completion"])
    except CorpusError as error:
        raise CorpusError(f"{where()}: {error}") from error


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
