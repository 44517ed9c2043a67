"""Convert records with named fields to documents, independently of their file format.

A record contains token ids (see `token_rows`), or text in one of three forms: a field, a `prompt`
and a `completion`, or a conversation. If several forms are present, the first that is not empty is
used, in this order, so that one file may contain records of different forms. Prompt and completion
are tokenised separately, as at inference; with `completion_only` the tokens of the prompt carry no
targets. A conversation (`prompt` and `completion` may be messages, too) is rendered to one text by
a chat template and tokenised at once up to `CONVERSATION_BYTES`; without `completion`, its
completions are the assistant's turns. A record without text (with `completion_only`, without a
completion) is counted but not packed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sparselogits.corpus.chat import ChatTemplate, Rendered
from sparselogits.corpus.conversation import EXTRAS, MESSAGES, conversation_of
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
"""Function that returns the file name and position of a record, for error messages only."""

TEXT_FIELD = "(text_field, --text-field on the command line)"
"""Names of the option that chooses the field with text, for error messages."""

CONVERSATION_BYTES = 4 << 20
"""Maximum size, in bytes, of a conversation that is tokenised at once; longer ones are cut into
pieces like long documents."""

LONGEST_LABEL = 200
"""Maximum length of a document's label, in characters."""


class Record(NamedTuple):
    """One record from a file, with its position and size."""

    values: Mapping[str, Any]
    """Values by field name."""
    where: Where
    """Function that returns the file name and position of the record."""
    size: int
    """Approximate number of bytes that the record occupies in the file, for progress."""


@dataclass(frozen=True)
class Fields:
    """Names of a record's text fields, and settings for reading them."""

    text: str = "text"
    """Name of the field with plain text or a conversation."""
    completion_only: bool = False
    """Whether only completions carry targets; records with only plain text are then rejected."""
    chat: ChatTemplate | None = None
    """Template that renders conversations to text; None if there is none, or before `read_by`."""
    tokens: TokenReading | None = None
    """Settings for reading token ids; None if the records contain text."""
    label: str | None = None
    """Name of the field whose value labels a document, or the path of one in an object, such as
    `meta.source`; None for no labels. Labels do not change the text."""

    def columns(self, found: Collection[str], where: Where) -> list[str]:
        """Return the columns to read from a table that has the columns `found`.

        Raises:
            CorpusError: no column could contain text; the message contains the table's columns.
        """
        labels = [n for n in self._label_path(found)[:1] if n in found]
        if self.tokens is not None:
            return list(dict.fromkeys([*(name for name in COLUMNS if name in found), *labels]))
        forms = self._forms(found)
        if self.completion_only and self.text in found:
            forms.append([self.text])  # may contain conversations, depending on the record
        if not forms:
            raise self._no_text_error(found, where)
        wanted = [name for form in forms for name in form]
        extras = [name for name in EXTRAS if name in found]
        return list(dict.fromkeys([*wanted, *extras, *labels]))

    def chosen(self, record: Mapping[str, Any], where: Where) -> list[str]:
        """Return the names of the fields that contain a record's text, which may be empty.

        Raises:
            CorpusError: the record has no such fields, or contains only plain text although
                `completion_only` is set; the message contains the fields that it has.
        """
        forms = self._forms(record)
        if self.completion_only and _is_list_of_objects(record.get(self.text)):
            forms = [[self.text], *forms]
        for form in forms:
            if any(record[name] not in (None, "", []) for name in form):
                return form
        if not forms or (self.completion_only and record.get(self.text)):
            present = [name for name in record if record[name] is not None]
            raise self._no_text_error(present, where)
        return forms[0]

    def kept(self, record: Mapping[str, Any], where: Where) -> dict[str, Any]:
        """Return the fields of a record that determine its text or tokens, by name.

        Raises:
            CorpusError: see `chosen`.
        """
        if self.tokens is not None:
            kept = {name: record[name] for name in COLUMNS if record.get(name) is not None}
            return {IDS: None} | kept if IDS in record else kept
        names = self.chosen(record, where)
        if is_conversation(record, names):
            names = [*names, *(name for name in EXTRAS if record.get(name) is not None)]
        return {name: record[name] for name in names}

    def label_of(self, record: Mapping[str, Any], where: Where) -> str | None:
        """Return the label of a record as text; None if it has none (absent, null or NaN).

        Raises:
            CorpusError: the value is not text, a number or a boolean, or too long for a label.
        """
        value: Any = record
        for name in self._label_path(record):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int | float):
            return None if value != value else str(value)
        if value is None or (isinstance(value, str) and len(value) <= LONGEST_LABEL):
            return value
        found = type(value).__name__
        if isinstance(value, str):
            found = f"text of {len(value):,} characters"
        raise CorpusError(
            f"{where()}: the field `{self.label}` contains {found}; expected text of at most "
            f"{LONGEST_LABEL} characters, a number or nothing. Name the field that contains the "
            "source of a document"
        )

    def _label_path(self, found: Collection[str]) -> list[str]:
        """Return the keys that lead to the label: a field, then keys within its value, if any."""
        if self.label is None:
            return []
        return [self.label] if self.label in found else self.label.split(".")

    def _forms(self, found: Collection[str]) -> list[list[str]]:
        forms = [["prompt", "completion"], *([name] for name in MESSAGES)]
        if not self.completion_only:
            forms = [[self.text], *forms]
        return [form for form in forms if all(name in found for name in form)]

    def _no_text_error(self, found: Collection[str], where: Where) -> CorpusError:
        wanted = "`prompt` and `completion`, nor `messages` (or `conversations`)"
        if not self.completion_only:
            wanted = f"`{self.text}`, nor {wanted}"
        advice = f". Give the name of the field that contains the text {TEXT_FIELD}"
        if self.completion_only:
            advice = ". Give records with completions, or train on all tokens"
        if self.completion_only and self.text in found:
            advice = ". Plain text has no completions: remove it, or train on all tokens"
        if IDS in found:
            advice = (
                ". To read its token ids, give their tokenizer (tokenized_by), "
                "--tokenized-by on the command line"
            )
        names = ", ".join(f"`{name}`" for name in found) or "none"
        return CorpusError(f"{where()} has no field {wanted}; its fields are {names}{advice}")


def is_conversation(record: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Return whether the fields of a record that `Fields.chosen` selected contain messages."""
    if names[0] in MESSAGES or _is_list_of_objects(record[names[0]]):
        return True
    return len(names) > 1 and any(
        isinstance(record[name], list | tuple | Mapping) for name in names
    )


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def record_pieces(record: Record, fields: Fields) -> Iterator[Piece]:
    """Yield the pieces of a record's text or token ids.

    A record that has no text or tokens, or, with `completion_only`, no completion, yields one blank
    piece.

    Raises:
        CorpusError: a field is missing or invalid, or the chat template cannot render the
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
    encoded = [(raw, learnt) for text, learnt in parts if (raw := _to_utf8(text, names, where))]
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
    rendered = _render(record, names, fields)
    if rendered is None:
        yield blank_piece(record.size)
        return
    learnt = tuple(rendered.learnt) if fields.completion_only else None
    raw = _to_utf8(rendered.text, names, record.where)
    key = document_key(raw)
    done = 0
    for piece in _field_pieces(raw, key, size=record.size, whole=CONVERSATION_BYTES):
        first = done - piece.start  # index in the whole text of the first character of piece.text
        done += piece.stop - piece.start
        yield replace(piece, rendered=True, learnt=_intersect(learnt, first, len(piece.text)))


def _intersect(
    spans: tuple[tuple[int, int], ...] | None, first: int, length: int
) -> tuple[tuple[int, int], ...] | None:
    """Clip ranges to [first, first + length) and subtract `first`; None remains None."""
    if spans is None:
        return None
    cut = [(max(start - first, 0), min(stop - first, length)) for start, stop in spans]
    return tuple((start, stop) for start, stop in cut if start < stop)


def _render(record: Record, names: Sequence[str], fields: Fields) -> Rendered | None:
    """Return the rendering of a conversation; None if it has no text that carries targets."""
    values, where, _ = record
    try:
        unread = fields.chat.unread(EXTRAS) if fields.chat is not None else ()
        read = {name: value for name, value in values.items() if name not in unread}
        conversation = conversation_of(read, names)
        if not conversation.messages:
            return None
        if fields.chat is None:
            raise CorpusError(
                "the record contains messages, but the tokenizer has no chat template to render "
                "them; give a tokenizer with a template (for a base model, set the template that "
                "the student will be used with), or give records of text"
            )
        rendered = fields.chat.rendered(conversation, masked=fields.completion_only)
    except CorpusError as error:
        raise CorpusError(f"{where()}: {error}") from error
    text = rendered.text
    if fields.completion_only:
        text = "".join(text[start:stop] for start, stop in rendered.learnt)
    return rendered if text.strip() else None


def _field_pieces(raw: bytes, key: int, *, size: int, whole: int = 0) -> Iterator[Piece]:
    """Yield the pieces of a text; a text of at most max(whole, PIECE_BYTES) bytes is one piece."""
    if len(raw) <= max(whole, PIECE_BYTES):
        text = raw.decode()
        yield Piece(text, 0, len(text), key, size=size)
        return
    pieces = cut_pieces(
        lambda start, stop: raw[start:stop], 0, len(raw), document=(0, len(raw)), key=key, name=""
    )
    for piece in pieces:
        yield replace(piece, size=size if piece.opens else 0)


def _text(value: object, name: str, where: Where) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise CorpusError(
        f"{where()}: the field `{name}` contains {type(value).__name__}, not text; give the name "
        f"of the field that contains the text {TEXT_FIELD}"
    )


def _to_utf8(text: str, names: Sequence[str], where: Where) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where()}: the field `{'`, `'.join(names)}` contains half of a surrogate pair at "
            f"character {error.start}, which is not valid Unicode; remove or repair the record"
        ) from None
