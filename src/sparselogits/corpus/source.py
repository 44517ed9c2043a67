"""Open files, folders of files, and datasets as one stream of documents.

    open_source("book.txt")                  a text file; one document, or several with separators
    open_source("pages/")                    a folder with all its subfolders
    open_source("src/**/*.py")               a pattern
    open_source("web.jsonl.zst")             JSON lines, plain or compressed
    open_source("web-00000.parquet")         Parquet
    open_source("saved/")                    a dataset saved with `datasets`' save_to_disk
    open_source("org/dataset:config")        a dataset on the Hugging Face hub, downloaded once
    open_source(dataset)                     a `datasets` object, or any iterable of dicts
    open_source("tokens.bin", tokenized_by=tokenizer)   token ids of a trainer, see `token_rows`

Documents are in a stable order: files by their relative path, and within each file from its
beginning. Packing distributes portions of the source over processes; their boundaries depend only
on the source and the requested size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparselogits.corpus.chat import ChatTemplate
from sparselogits.corpus.formats import SourceFile, Span, read_errors
from sparselogits.corpus.given import Records, chosen_split, write_down
from sparselogits.corpus.locate import LeftOut, Located, locate
from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.records import Fields
from sparselogits.corpus.token_rows import TokenReading
from sparselogits.corpus.tokenizer_identity import require_tokenizer, tokenizer_fingerprint
from sparselogits.corpus.windows import Packing
from sparselogits.errors import CorpusError, InvalidArgumentError
from sparselogits.identity import label_of

Portion = tuple[Span, ...]
"""Consecutive spans of a source that one process packs into one part."""

_SAMPLES = 16
_SAMPLE_BYTES = 4096
_EDGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Source:
    """Text to pack: files, and the names of the fields in which their records contain text.

    A source contains paths, but neither open files nor text, so it can be pickled.
    """

    name: str
    """Name for display; not part of the fingerprint."""
    files: tuple[SourceFile, ...]
    """Files that are read, in order."""
    fields: Fields
    """Names of the fields that contain text, and settings for reading them."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that were found but are not read, by reason, for display."""
    shared: tuple[LeftOut, ...] = ()
    """Files that are read although their names match another split too, for display."""

    @property
    def masked(self) -> bool:
        """Whether some tokens may carry no target."""
        return self.fields.completion_only or self.fields.tokens is not None

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of every file's relative name, format, size and content samples.

        Samples are the first and last 64 KiB and sixteen blocks of 4 KiB in between, or the whole
        of a small file. A change outside the samples that does not change the size is not detected.
        Times and absolute paths are not hashed, so a copy of the files under the same relative
        names has the same fingerprint.
        """
        digest = hashlib.sha256()
        for file in self.files:
            # a file name may contain bytes that are not UTF-8
            described = json.dumps(
                [file.name, file.format.name], ensure_ascii=False, separators=(",", ":")
            )
            digest.update(described.encode("utf-8", "surrogateescape") + b"\n")
            for path in file.format.files(file.path):
                digest.update(_sampled(path))
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the description of the source in a packed corpus, as plain JSON values."""
        described = {
            "name": self.name.encode("utf-8", "replace").decode(),
            "fingerprint": self.fingerprint,
            "text_field": self.fields.text,
            "completion_only": self.fields.completion_only,
        }
        if self.fields.chat is not None:
            described["chat_template"] = self.fields.chat.fingerprint
        if self.fields.tokens is not None:
            described["tokens"] = self.fields.tokens.to_json()
        return described

    def in_words(self) -> str:
        """Return a sentence about the files that are read and those that are not, for display."""
        names = [file.name for file in self.files]
        few = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        reading = f"reading {few}" if len(names) == 1 else f"reading {len(names):,} files ({few})"
        left = "; ".join(group.in_words() for group in self.left_out)
        both = [group.in_words(" that is read", " that are read") for group in self.shared]
        return "; ".join([reading, *([f"left out: {left}"] if left else []), *both])

    def selection(self) -> dict[str, Any]:
        """Return the names of the files that are read and of those that are not, as JSON values."""
        return {
            "files": [file.name for file in self.files],
            "left_out": {group.reason: list(group.names) for group in self.left_out},
            "also_of_another_split": [name for group in self.shared for name in group.names],
        }

    def read_by(
        self, tokenizer: Any, packing: Packing | None = None, vocab_size: int = 0
    ) -> Source:
        """Return the source with the settings for packing; `pack` calls this method.

        Conversations are then rendered with the tokenizer's chat template, if it has one, and
        `to_json` contains the hash of the template. Token ids are validated with `packing` and
        `vocab_size`.

        Args:
            tokenizer: a transformers tokenizer.
            packing: rules that form windows; required for token ids.
            vocab_size: number V of the teacher's logits per position; token ids must be smaller.

        Raises:
            IdentityMismatchError: the source contains token ids of another tokenizer.
            InvalidArgumentError: rows of ids are joined, but each window is to have one document.
            CorpusError: the tokenizer has several chat templates and no default.
        """
        if (tokens := self.fields.tokens) is not None:
            require_tokenizer(
                tokenizer,
                tokens.tokenizer,
                tokens.tokenizer.record(),
                whose="the teacher's tokenizer",
                origin=label_of(self.name),
            )
            if tokens.joined and packing is not None and packing.of_documents:
                raise InvalidArgumentError(
                    "found join_rows with the packing kind 'documents'; joined rows are no "
                    "documents, so leave out --join-rows or --packing documents"
                )
            tokens = replace(tokens, packing=packing, vocab_size=vocab_size)
            return replace(self, fields=replace(self.fields, tokens=tokens))
        if not any(file.format.holds_records for file in self.files):
            return self
        return replace(self, fields=replace(self.fields, chat=ChatTemplate.of(tokenizer)))

    def portions(self, portion_bytes: int) -> list[Portion]:
        """Divide the source into consecutive portions of about `portion_bytes` bytes.

        Raises:
            CorpusError: a file cannot be read or lacks the fields, or the source contains token ids
                and `read_by` was not called with a packing.
        """
        portions: list[Portion] = []
        spans: list[Span] = []
        size = 0
        for file in self.files:
            with read_errors(file.path):
                for span in file.format.spans(file, portion_bytes, self.fields):
                    if spans and size + span.size > portion_bytes:
                        portions.append(tuple(spans))
                        spans, size = [], 0
                    spans.append(span)
                    size += span.size
        return [*portions, tuple(spans)] if spans else portions

    def pieces(self, portion: Portion) -> Iterator[Piece]:
        """Yield the pieces of a portion's text or token ids, in order.

        Raises:
            CorpusError: a file cannot be read, or a record cannot be converted to text or tokens.
        """
        for span in portion:
            with read_errors(span.file.path):
                yield from span.file.format.pieces(span, self.fields)

    def documents(self) -> Iterator[str]:
        """Yield each document of text that is not blank as one string, to inspect a corpus.

        Raises:
            CorpusError: the text cannot be read, the source contains token ids, or a conversation
                is reached without the chat template that `read_by` sets.
        """
        parts: list[str] = []
        for portion in self.portions(1 << 62):
            for piece in self.pieces(portion):
                if piece.opens:
                    parts = []
                parts.append(piece.text[piece.start : piece.stop])
                if piece.closes and not piece.blank:
                    yield "".join(parts)


def open_source(
    data: str | os.PathLike[str] | Records,
    *,
    text_field: str = "text",
    split: str = "train",
    completion_only: bool = False,
    tokenized_by: Any = None,
    join_rows: bool = False,
    work: Path | None = None,
) -> Source:
    """Open text for packing.

    Args:
        data: path of a file, a folder or a saved dataset, a pattern of paths, or, if no such path
            exists, the name of a dataset on the Hugging Face hub (`name:config` selects a
            configuration). Or the records: a `datasets.Dataset`, `IterableDataset` or
            `DatasetDict`, or an iterable of dicts. Records are written to a file first (see
            `corpus.given`).
        text_field: name of the field or column with the text of records.
        split: split to read, if the dataset has several.
        completion_only: whether only completions carry targets: the `completion` of records with
            `prompt` and `completion`, and the assistant's turns of conversations.
        tokenized_by: transformers tokenizer of the token ids in the data; None for text. Rows of
            ids are used as windows, see `corpus.token_rows`.
        join_rows: whether rows of ids are concatenated and cut into windows instead.
        work: folder to which given records are written; None for one in the user's cache folder.

    Raises:
        CorpusError: the text or the split does not exist, the folder contains no text, a file
            cannot be read, or the files are of another kind than the options require.
        InvalidArgumentError: `completion_only` is given with `tokenized_by`, or `join_rows` without
            `tokenized_by`.
        StorageError: given records cannot be written to `work`.

    Example:
        >>> source = open_source([{"text": "a first document"}, {"text": "a second one"}])
        >>> list(source.documents())
        ['a first document', 'a second one']
    """
    fields = Fields(text_field, completion_only)
    if tokenized_by is not None:
        if completion_only:
            raise InvalidArgumentError(
                "found completion_only with token ids, whose labels determine the targets; remove "
                "completion_only"
            )
        fields = replace(
            fields, tokens=TokenReading(tokenizer_fingerprint(tokenized_by), join_rows)
        )
    elif join_rows:
        raise InvalidArgumentError(
            "found join_rows with text, but it is an option for token ids; remove it, or give the "
            "tokenizer of the token ids (tokenized_by), --tokenized-by on the command line"
        )
    if isinstance(data, str | os.PathLike):
        name = os.fspath(data)
        located = locate(name, split)
    else:
        records = chosen_split(data, split)
        name = f"records of a {type(records).__name__}"
        located = Located((write_down(records, fields, work),))
    if completion_only and not all(file.format.holds_records for file in located.files):
        raise CorpusError(
            f"{name} contains plain text, which has no completions; use JSON lines or Parquet with "
            "`prompt` and `completion`, or train on all tokens (completion_only=False)"
        )
    for file in located.files:
        if tokenized_by is None and file.format.holds_tokens:
            raise CorpusError(
                f"{file.name} contains token ids; give their tokenizer (tokenized_by), "
                "--tokenized-by on the command line"
            )
        if tokenized_by is not None and not file.format.holds_records:
            raise CorpusError(
                f"{file.name} is read as text, but tokenized_by is given as for token ids; remove "
                "tokenized_by, or give files of token ids"
            )
    return Source(name, located.files, fields, located.left_out, located.shared)


def _sampled(path: Path) -> bytes:
    digest = hashlib.sha256()
    with read_errors(path), path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        for start, length in _samples(size):
            handle.seek(start)
            digest.update(handle.read(length))
    return digest.digest()


def _samples(size: int) -> list[tuple[int, int]]:
    """Return (first byte, length) of each sample from a file; a small file is one sample."""
    between = size - 2 * _EDGE_BYTES
    if between < _SAMPLES * _SAMPLE_BYTES:
        return [(0, size)]
    blocks = [(_EDGE_BYTES + between * i // _SAMPLES, _SAMPLE_BYTES) for i in range(_SAMPLES)]
    return [(0, _EDGE_BYTES), *blocks, (size - _EDGE_BYTES, _EDGE_BYTES)]
