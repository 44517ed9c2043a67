"""Turn records with named fields into documents, whatever format the records come from.

A record holds its text in one field, or a `prompt` and a `completion`, or a conversation. If
several of them are present, the first that is not empty counts, in this order, so that records of
different forms may stand in one file. Prompt and completion are tokenised separately, as they are
when the model is used, and where only completions are learnt the prompt's tokens carry no target. A
conversation (`prompt` and `completion` may be messages, too) becomes one text by a chat template
and is tokenised at once, as transformers' `apply_chat_template` does; its completions are the
assistant's turns. A record without any text (null, empty or white space only, or without a
completion where only completions count) becomes a blank piece, which is left out and counted.

Records of token ids (`token_rows`) are read only if the user names the tokenizer that made them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sparselogits.corpus.chat import ChatTemplate, Rendered
from sparselogits.corpus.conversation import EXTRAS, MESSAGES, conversation_of, holds_messages
from sparselogits.corpus.pieces import (
    PIECE_BYTES,
    Piece,
    blank_piece,
    cut_pieces,
    document_key,
)
from sparselogits.corpus.token_rows import COLUMNS, IDS, TokenReading, record_row
from sparselogits.errors import CorpusError

Where = Callable[[], str]
"""Returns the file and the position of a record, for errors; called only if there is one."""

CONVERSATION_BYTES = 4 << 20
"""Bytes up to which a conversation is tokenised at once; longer ones are cut into pieces, as long
documents are."""


class Record(NamedTuple):
    """One record of a file."""

    values: Mapping[str, Any]
    """Values by field name."""
    where: Where
    size: int
    """Bytes of the file that the record takes, for progress."""


@dataclass(frozen=True)
class Fields:
    """Names the fields of a record that hold its text."""

    text: str = "text"
    """Field that holds plain text or a conversation."""
    completion_only: bool = False
    """Whether only completions carry targets; every record must then hold one."""
    chat: ChatTemplate | None = None
    """Template that makes text of conversations; None where the tokenizer has none."""
    tokens: TokenReading | None = None
    """How token ids are read; None where records hold text."""

    def columns(self, found: Collection[str], where: Where) -> list[str]:
        """Return the columns to read among those that a table has.

        Raises:
            CorpusError: no column could hold text; names the file and its columns.
        """
        if self.tokens is not None:
            return [name for name in COLUMNS if name in found]
        forms = self._forms(found)
        if self.completion_only and self.text in found:
            forms.append([self.text])  # may hold conversations, which the records show
        if not forms:
            raise self._nothing(found, where)
        wanted = [name for form in forms for name in form]
        return list(dict.fromkeys([*wanted, *(name for name in EXTRAS if name in found)]))

    def chosen(self, record: Mapping[str, Any], where: Where) -> list[str]:
        """Return the names of the fields that hold a record's text.

        Raises:
            CorpusError: no field does; names the record and its fields.
        """
        forms = self._forms(record)
        if self.completion_only and _is_talk(record.get(self.text)):
            forms = [[self.text], *forms]
        for form in forms:
            if any(record[name] not in (None, "", []) for name in form):
                return form
        if not forms or (self.completion_only and record.get(self.text)):
            raise self._nothing([name for name in record if record[name] is not None], where)
        return forms[0]

    def kept(self, record: Mapping[str, Any], where: Where) -> dict[str, Any]:
        """Return the fields that decide what text a record becomes; raises what `chosen` raises."""
        if self.tokens is not None:
            return {name: record[name] for name in COLUMNS if record.get(name) is not None}
        names = self.chosen(record, where)
        if is_conversation(record, names):
            names = [*names, *(name for name in EXTRAS if record.get(name) is not None)]
        return {name: record[name] for name in names}

    def _forms(self, found: Collection[str]) -> list[list[str]]:
        forms = [["prompt", "completion"], *([name] for name in MESSAGES)]
        if not self.completion_only:
            forms = [[self.text], *forms]
        return [form for form in forms if all(name in found for name in form)]

    def _nothing(self, found: Collection[str], where: Where) -> CorpusError:
        wanted = "`prompt` and `completion`, nor `messages` (or `conversations`)"
        if not self.completion_only:
            wanted = f"`{self.text}`, nor {wanted}"
        advice = ". Name the field that holds the text (text_field)"
        if self.completion_only:
            advice = ". Give records that hold completions, or learn all tokens"
        if self.completion_only and self.text in found:
            advice = ". Plain text has no completions: leave it out, or learn all tokens"
        if IDS in found:
            advice = ". To read its token ids, name the tokenizer that made them (tokenized_by)"
        names = ", ".join(f"`{name}`" for name in found) or "none"
        return CorpusError(f"{where()} has no field {wanted}; its fields are {names}{advice}")


def is_conversation(record: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Return whether the chosen fields of a record hold messages."""
    if names[0] in MESSAGES or _is_talk(record[names[0]]):
        return True
    return len(names) > 1 and any(holds_messages(record[name]) for name in names)


def _is_talk(value: object) -> bool:
    """Return whether a field of text holds a list of objects instead."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def record_pieces(record: Record, fields: Fields) -> Iterator[Piece]:
    """Yield the pieces of one record; a blank one if it holds no text.

    Raises:
        CorpusError: a field is missing or holds no text, or the chat template cannot render the
            conversation.
    """
    values, where, size = record
    if fields.tokens is not None:
        yield record_row(values, where, size, fields.tokens) or blank_piece(size)
        return
    names = fields.chosen(values, where)
    if is_conversation(values, names):
        yield from _conversation_pieces(record, names, fields)
        return
    parts = [(_text(values[name], name, where), name != "prompt") for name in names]
    wanted = "".join(text for text, learnt in parts if learnt or not fields.completion_only)
    if not wanted.strip():
        yield blank_piece(size)
        return
    encoded = [(raw, learnt) for text, learnt in parts if (raw := _encoded(text, names, where))]
    key = document_key(b"".join(raw for raw, _ in encoded))
    for number, (raw, learnt) in enumerate(encoded):
        for piece in _field_pieces(raw, key, size=0 if number else size):
            yield replace(
                piece,
                opens=piece.opens and number == 0,
                closes=piece.closes and number == len(encoded) - 1,
                carries_target=learnt or not fields.completion_only,
            )


def _conversation_pieces(record: Record, names: Sequence[str], fields: Fields) -> Iterator[Piece]:
    rendered = _rendered(record, names, fields)
    if rendered is None:
        yield blank_piece(record.size)
        return
    learnt = tuple(rendered.learnt) if fields.completion_only else None
    raw = _encoded(rendered.text, names, record.where)
    key = document_key(raw)
    done = 0
    for piece in _field_pieces(raw, key, size=record.size, whole=CONVERSATION_BYTES):
        first = done - piece.start  # the whole text's character with which the piece's text begins
        done += piece.stop - piece.start
        yield replace(piece, rendered=True, learnt=_within(learnt, first, len(piece.text)))


def _within(
    spans: tuple[tuple[int, int], ...] | None, first: int, length: int
) -> tuple[tuple[int, int], ...] | None:
    """Return the parts of ranges that lie in `length` characters from `first` on."""
    if spans is None:
        return None
    cut = [(max(start - first, 0), min(stop - first, length)) for start, stop in spans]
    return tuple((start, stop) for start, stop in cut if start < stop)


def _rendered(record: Record, names: Sequence[str], fields: Fields) -> Rendered | None:
    """Return a conversation's text; None if it holds nothing that is learnt."""
    values, where, _ = record
    try:
        unread = fields.chat.unread(EXTRAS) if fields.chat is not None else ()
        read = {name: value for name, value in values.items() if name not in unread}
        conversation = conversation_of(read, names)
        if not conversation.messages:
            return None
        if fields.chat is None:
            raise CorpusError(
                "it holds messages, but the tokenizer has no chat template to make text of them; "
                "give a tokenizer that has one (for a base model, set one that writes turns as the "
                "student will read them), or write text into the records"
            )
        rendered = fields.chat.rendered(conversation, masked=fields.completion_only)
    except CorpusError as error:
        raise CorpusError(f"{where()}: {error}") from error
    if fields.completion_only:
        said = "".join(rendered.text[start:stop] for start, stop in rendered.learnt)
        return rendered if said.strip() else None
    return rendered if rendered.text.strip() else None


def _field_pieces(raw: bytes, key: int, *, size: int, whole: int = 0) -> Iterator[Piece]:
    """Yield the pieces of a text; a text of at most `whole` bytes, or `PIECE_BYTES`, is one."""
    if len(raw) <= max(whole, PIECE_BYTES):
        text = raw.decode()
        yield Piece(
            text, 0, len(text), key, opens=True, closes=True, carries_target=True, size=size
        )
        return

    def read(start: int, stop: int) -> bytes:
        return raw[start:stop]

    for piece in cut_pieces(read, 0, len(raw), document=(0, len(raw)), key=key, name=""):
        yield replace(piece, size=size if piece.opens else 0)


def _text(value: object, name: str, where: Where) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise CorpusError(
        f"{where()}: the field `{name}` holds {type(value).__name__}, not text; name the field "
        "that holds the text (text_field)"
    )


def _encoded(text: str, names: Sequence[str], where: Where) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where()}: the field `{'`, `'.join(names)}` holds half of a surrogate pair at "
            f"character {error.start}, which is no Unicode text; remove or repair the record"
        ) from None
