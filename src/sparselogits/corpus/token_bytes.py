"""Determine the bytes of each token of a tokenizer, and tokenise texts and byte strings.

A token of a byte-level tokenizer (GPT-2 and its successors) or of a SentencePiece tokenizer stands
for a fixed byte string, so two tokenisations of one text can be compared byte by byte. Tokenizers
whose tokens do not determine the text are rejected: WordPiece drops white space. Those that change
a text are rejected for students: lowercasing and NFKC map different texts to the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from sparselogits.corpus.tokenizer_identity import ROLES
from sparselogits.corpus.tokenizing import added_tokens
from sparselogits.errors import InvalidArgumentError

SPACE_MARK = "\u2581"
"""Character by which SentencePiece tokenizers write a space."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOSSLESS_NORMALISERS = {"NFC", "Prepend", "ByteLevel"}
_DROPPING = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit"}
_CACHED_STRINGS = 1 << 20  # maximum number of byte strings whose first token is cached


class ByteTokens(NamedTuple):
    """Tokens of a text with their positions in the bytes of the text.

    Args:
        ids: int64 [N] token ids.
        starts: int64 [N], position of each token's first byte; -1 for a token whose bytes do not
            occur there in the text (an unknown token, or a token of normalised text).
        ends: int64 [N], position after each token's last byte; an estimate where the start is -1.
        words: int64 [N], index of the pre-tokenizer's word that contains each token; -1 for none.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    words: NDArray[np.int64]


class TokenBytes:
    """Tokenizer whose tokens are byte strings.

    Args:
        tokenizer: a fast transformers tokenizer.
        whose: name of the tokenizer in messages, as in "the student's tokenizer".

    Attributes:
        size: number of ids, one more than the largest id.
        roles: ids of the special tokens by role (`ROLES`).
        added: ids of the added tokens, special or not, by which a text is divided before the model
            cuts it; not the unknown token, which the model makes.
        special: content of each special token by id; special tokens stand for no bytes of the text.
        bytes_of: byte string of each id; empty for special tokens and unused ids.
        bos_id: id of the first token that the tokenizer adds before a text; None for no token.
        first_of: function from a byte string to the id of its first token, see `_first_of`; results
            are cached.

    Raises:
        InvalidArgumentError: the tokenizer is not fast, drops bytes of a text, or is neither
            byte-level nor SentencePiece's.
    """

    def __init__(self, tokenizer: Any, whose: str = "the tokenizer") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InvalidArgumentError(
                f"{whose} is a {type(tokenizer).__name__} without tokenizer.json, so the bytes of "
                "its tokens are unknown. Convert it to a fast tokenizer (use_fast=True) and save it"
            )
        self._whose, self._state = whose, json.loads(tokenizer.backend_tokenizer.to_str())
        model = self._state["model"]
        self._family = self._checked_family(model)
        self.roles = {
            role: int(own)
            for role in ROLES
            if (own := getattr(tokenizer, f"{role}_token_id", None)) is not None
        }
        added = {int(token["id"]): token for token in self._state.get("added_tokens") or ()}
        names = {int(i): token for token, i in tokenizer.get_vocab().items()}
        self.added = frozenset(added) - {self.roles.get("unk"), model.get("unk_id")}
        special = {i for i, token in added.items() if token["special"]} | set(self.roles.values())
        if isinstance(model.get("unk_id"), int):
            special.add(model["unk_id"])
        self.special = {i: names[i] for i in sorted(special) if i in names}
        self.size = max(names) + 1
        self.bytes_of: list[bytes] = [b""] * self.size
        for i, name in names.items():
            if i not in self.special:
                literal = i in added and self._family == "bytes"
                self.bytes_of[i] = name.encode() if literal else self._spelled(name)
        before, _ = added_tokens(tokenizer)
        self.bos_id = before[0] if before else None
        self.first_of = lru_cache(_CACHED_STRINGS)(self._first_of)

    # -- construction ------------------------------------------------------------------------------

    def _checked_family(self, model: dict[str, Any]) -> str:
        """Return "bytes" or "sentencepiece"; reject a tokenizer that may drop bytes of a text."""
        kind = model.get("type")
        if kind not in ("BPE", "Unigram"):
            self._reject(
                f"its model is {kind}",
                "WordPiece and word tokenizers drop white space or rare words",
            )
        marked = [n for n in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(n)]
        if marked:
            self._reject(
                f"its tokens have a {marked[0]} ({model[marked[0]]!r})",
                "such tokenizers split text at white space and drop it",
            )
        for part in self._parts("pre_tokenizer"):
            if part["type"] in _DROPPING or part.get("behavior") == "Removed":
                self._reject(f"its pre-tokenizer is {part['type']}", "it drops white space")
        names = ("normalizer", "pre_tokenizer", "decoder")
        kinds = {part["type"] for name in names for part in self._parts(name)}
        marks = SPACE_MARK in json.dumps(self._state.get("normalizer"), ensure_ascii=False)
        if not kinds & {"ByteLevel", "Metaspace"} and not marks:
            self._reject("it is neither byte-level nor SentencePiece's", "its bytes are unknown")
        return "bytes" if "ByteLevel" in kinds else "sentencepiece"

    def require_lossless(self) -> None:
        """Validate that the normaliser preserves the bytes of a text.

        NFC is accepted: it does not change text that is in this form, which is most text, and
        tokens of changed text are recognised (`ByteTokens.starts`).

        Raises:
            InvalidArgumentError: the normaliser has another component that may change the bytes.
        """
        for part in self._parts("normalizer"):
            kind = part["type"]
            spaces = kind == "Replace" and part.get("content") == SPACE_MARK
            if kind not in _LOSSLESS_NORMALISERS and not spaces:
                self._reject(f"its normaliser is {kind}", "it changes the bytes of the text")

    def _reject(self, found: str, why: str) -> NoReturn:
        """Raise an `InvalidArgumentError` that names the component of the tokenizer."""
        raise InvalidArgumentError(
            f"{self._whose} cannot be aligned by bytes: {found}; {why}. Use a byte-level BPE, or a "
            "SentencePiece BPE or Unigram tokenizer without such normalisation"
        )

    def _parts(self, name: str) -> list[dict[str, Any]]:
        """Return the components of one part of tokenizer.json.

        `name` is "normalizer", "pre_tokenizer" or "decoder".
        """
        return list(_flat(self._state.get(name)))

    def _spelled(self, token: str) -> bytes:
        """Return the byte string for which a token of the model's vocabulary stands."""
        if self._family == "bytes":
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:
                return token.encode()
        byte = _BYTE.fullmatch(token)
        if byte and self._state["model"].get("byte_fallback"):
            return bytes([int(byte[1], 16)])
        return token.replace(SPACE_MARK, " ").encode()

    def _compiled(self, **changes: Any) -> Tokenizer:
        """Compile the tokenizer with `changes`; special tokens in a text are read as plain text."""
        state = {**self._state, "post_processor": None, "truncation": None, "padding": None}
        if "dropout" in state["model"]:
            state["model"] = {**state["model"], "dropout": None}
        compiled = Tokenizer.from_str(json.dumps({**state, **changes}))
        compiled.encode_special_tokens = True
        return compiled

    @cached_property
    def _beginning(self) -> Tokenizer:
        """Tokenizer for the beginning of a document, where some tokenizers add a space."""
        return self._compiled()

    @cached_property
    def _changes(self) -> dict[str, Any]:
        """Normaliser and pre-tokenizer that add no space before a text; empty if none is added."""
        changes = {
            name: _without_added_space(self._state.get(name))
            for name in ("normalizer", "pre_tokenizer")
        }
        kept = all(changes[name] == self._state.get(name) for name in changes)
        return {} if kept else changes

    @cached_property
    def _inside(self) -> Tokenizer:
        """Tokenizer for text that continues a document, which adds no space."""
        return self._compiled(**self._changes) if self._changes else self._beginning

    @cached_property
    def _plain(self) -> Tokenizer:
        """Tokenizer without normaliser and pre-tokenizer, for bytes that are not valid UTF-8."""
        return self._compiled(normalizer=None, pre_tokenizer=None, added_tokens=[])

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer adds a space at the beginning of a document."""
        return self._beginning is not self._inside

    @cached_property
    def adds_space_everywhere(self) -> bool:
        """Whether the tokenizer adds a space before a text and after every added token."""
        return any(
            part["type"] == "Prepend"
            or part.get("prepend_scheme") == "always"
            or (part["type"] == "ByteLevel" and bool(part.get("add_prefix_space")))
            for name in ("normalizer", "pre_tokenizer")
            for part in self._parts(name)
        )

    @cached_property
    def crosses_spaces(self) -> bool:
        """Whether any token has ASCII white space after a non-space character, as in "of the"."""
        return any(re.search(rb"\S\s", own) for own in self.bytes_of)

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Id of the token that stands for one byte alone, by byte."""
        found = {own[0]: i for i, own in enumerate(self.bytes_of) if len(own) == 1}
        if self._family == "sentencepiece":
            for i, name in enumerate(map(self._inside.id_to_token, range(self.size))):
                if name and (byte := _BYTE.fullmatch(name)) and self.bytes_of[i]:
                    found[int(byte[1], 16)] = i
        return found

    # -- tokenisation ------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str], begins: Sequence[bool]) -> list[ByteTokens]:
        """Tokenise texts, and return the tokens of each with positions in its UTF-8 bytes.

        Args:
            texts: the texts; special tokens in them are read as plain text.
            begins: whether each text begins a document, where the tokenizer may add a space.
        """
        results: list[ByteTokens | None] = [None] * len(texts)
        for first, compiled in ((True, self._beginning), (False, self._inside)):
            chosen = [i for i, own in enumerate(begins) if own is first]
            encodings = compiled.encode_batch([texts[i] for i in chosen], add_special_tokens=False)
            for i, encoding in zip(chosen, encodings, strict=True):
                results[i] = self._placed(texts[i], encoding, added_space=first)
        return [own for own in results if own is not None]

    def _placed(self, text: str, encoding: Encoding, *, added_space: bool) -> ByteTokens:
        """Return the tokens of a text with their positions in its bytes.

        A token is located where its bytes continue the text. Character offsets are used only after
        a token whose bytes do not, because several tokens of one character share their offsets, and
        for added tokens, which may include white space of the text (`lstrip`, `rstrip`). A token
        before which the tokenizer adds a space within the text has no position.
        """
        data, cursor, spaced = text.encode(), 0, False
        byte_of: Sequence[int] = range(len(text) + 1)
        if not text.isascii():
            byte_of = np.cumsum([0, *(len(c.encode()) for c in text)]).tolist()
        starts, ends = [], []
        for place, (i, span) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            own = self.bytes_of[i]
            first, last = byte_of[span[0]], byte_of[span[1]]
            added = place == 0 and added_space and own[:1] == b" " and not data.startswith(own)
            own = own[1:] if added else own
            if own and i in self.added:
                found, stop = first == cursor, last
            else:
                found = data.startswith(own, cursor) and bool(own or added) and not spaced
                stop = cursor + len(own) if found else last
            starts.append(cursor if found else -1)
            cursor = max(cursor, stop)
            ends.append(cursor)
            spaced = i in self.added and self.adds_space_everywhere
        words = [-1 if word is None else word for word in encoding.word_ids]
        arrays = (encoding.ids, starts, ends, words)
        return ByteTokens(*(np.array(own, np.int64) for own in arrays))

    def byte_tokens(self, data: bytes) -> list[int]:
        """Return one id per byte; an empty list if the tokenizer lacks a token for a byte."""
        ids = [self._byte_ids.get(byte, -1) for byte in data]
        return [] if -1 in ids else ids

    def _first_of(self, data: bytes, begins: bool = False) -> int:
        """Return the id of the first token of a byte string that is tokenised by itself.

        Bytes from the first invalid UTF-8 on are left out, unless there is nothing before them or
        the tokenizer is byte-level. If no token stands for the bytes, the result is the unknown
        token, or -1 if there is none.

        Args:
            data: bytes that follow a boundary between tokens.
            begins: whether the bytes begin a document, where the tokenizer may add a space.
        """
        compiled = self._beginning if begins else self._inside
        try:
            ids = compiled.encode(data.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError as error:
            if self._family == "bytes":
                spelled = "".join(_CHARACTER_OF[byte] for byte in data)
                ids = self._plain.encode(spelled, add_special_tokens=False).ids
            elif error.start:
                whole = data[: error.start].decode()
                ids = compiled.encode(whole, add_special_tokens=False).ids
            else:
                ids = self.byte_tokens(data[:1]) or [self.roles.get("unk", -1)]
        return ids[0] if ids else -1


def _flat(part: Any) -> Iterable[dict[str, Any]]:
    """Yield the components of a possibly nested sequence in tokenizer.json."""
    if not isinstance(part, dict):
        return
    nested = next(
        (part[n] for n in ("normalizers", "pretokenizers", "decoders") if n in part), None
    )
    if nested is None:
        yield part
        return
    for own in nested:
        yield from _flat(own)


def _without_added_space(part: Any) -> Any:
    """Return a component of tokenizer.json without its added space; None if nothing is left."""
    if not isinstance(part, dict):
        return part
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            kept = [own for each in part[name] if (own := _without_added_space(each)) is not None]
            return {**part, name: kept} if kept else None
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part.get("add_prefix_space") else part


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level tokenizers stands for (as in GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + number): byte for number, byte in enumerate(others)},
    }


_BYTE_OF = _byte_alphabet()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}
