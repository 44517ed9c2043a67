"""Find the label of every document in packed windows, such as the source of a mixed corpus.

A packed corpus stores tokens, not the other columns of its records. The text is therefore read
again: a part of the stream has the documents of one portion of the source, in order, and marks
where each begins. Only the parts of the requested windows are read, and no text is tokenised.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparselogits.corpus.packed import (
    PackedCorpus,
    Paths,
    public_source,
    read_description,
    text_fingerprint,
)
from sparselogits.corpus.source import Portion, Source, open_source
from sparselogits.errors import CorpusError, IdentityMismatchError, InvalidArgumentError

_BLOCK = 1 << 20  # tokens that are read at once


class LabelledRun(NamedTuple):
    """Consecutive tokens of a window that belong to one document."""

    label: str | None
    """Label of the document; None for a document without a label."""
    tokens: int
    """Number of tokens."""


class DocumentLabels:
    """Labels of the documents in the training windows of a packed corpus.

    Args:
        corpus: the packed corpus.
        data: path of the text from which the corpus was packed, or name of the dataset, as for
            `open_source`.
        field: name of the field with the label, see `Fields.label`.
        tokenizer: tokenizer with which the text was packed; for text, only its chat
            template is compared.
        split: split that was packed, if the dataset has several.

    Raises:
        IdentityMismatchError: the corpus was packed from other text, with another chat template, or
            from ids of another tokenizer.
        InvalidArgumentError: a file of the text contains no records with named fields.
        CorpusError: the text or `corpus.json` cannot be read, or the corpus was retokenized.
    """

    def __init__(
        self,
        corpus: PackedCorpus,
        data: str | os.PathLike[str],
        field: str,
        *,
        tokenizer: Any,
        split: str = "train",
    ) -> None:
        made_from = read_description(Paths(corpus.folder).made_from)
        told, part_bytes = made_from["source"], made_from.get("part_bytes")
        if not {"text_field", "completion_only"} <= told.keys() or type(part_bytes) is not int:
            raise CorpusError(
                f"{corpus.folder} does not state how its text was read, so documents cannot be "
                "found: the cache was retokenized, or corpus.json is damaged. Give the cache that "
                "was built from the text"
            )
        rows = told.get("tokens", {}).get("rows")
        source = open_source(
            data,
            text_field=told["text_field"],
            split=split,
            completion_only=told["completion_only"],
            tokenized_by=None if rows is None else tokenizer,
            join_rows=rows == "joined",
        ).read_by(tokenizer, corpus.packing, corpus.vocab_size)
        if text_fingerprint(public_source(source.to_json())) != corpus.text_fingerprint:
            raise IdentityMismatchError(
                f"{data} is not the text of {corpus.folder}: its files, their contents or the "
                "chat template differ. Give the text and the tokenizer that the cache was built "
                "from"
            )
        for file in source.files:
            if file.format.holds_tokens or not file.format.holds_records:
                raise InvalidArgumentError(
                    f"{file.name} has no field {field!r}, because it contains no records; only "
                    "JSON lines, Parquet and datasets have fields"
                )
        self._corpus, self._source, self._field = corpus, source, field
        self._part_bytes = max(1, part_bytes)
        self._read: dict[int, tuple[list[str | None], NDArray[np.int64]]] = {}

    def of_window(self, index: int) -> list[LabelledRun]:
        """Return the documents of a training window as runs of tokens, in order.

        Raises:
            CorpusError: the text cannot be read or has changed, a label is invalid, or the corpus
                is damaged.
        """
        runs = []
        for start, stop in self._corpus.ranges(index, index + 1):
            while start < stop:
                part = self._corpus.stream.part_at(start)
                labels, ends = self._documents(part)
                document = int(np.searchsorted(ends, start, side="right"))
                end = min(stop, int(ends[document]))
                runs.append(LabelledRun(labels[document], end - start))
                start = end
        return runs

    @cached_property
    def _portions(self) -> list[Portion]:
        return self._source.portions(self._part_bytes)

    def _documents(self, part: int) -> tuple[list[str | None], NDArray[np.int64]]:
        """Return the labels of the documents in a part, and the documents' ends in the stream."""
        if part not in self._read:
            found = self._read_part(part)
            if len(self._read) > 1:  # a window may span two parts
                self._read.pop(next(iter(self._read)))
            self._read[part] = found
        return self._read[part]

    def _read_part(self, part: int) -> tuple[list[str | None], NDArray[np.int64]]:
        stream = self._corpus.stream
        begin, end = stream.begin(part), stream.begin(part + 1)
        # the field is not in the fields of `portions`, because the sizes of columns divide a file
        labelled: Source = replace(
            self._source, fields=replace(self._source.fields, label=self._field)
        )
        labels: list[str | None] = []
        lengths: list[int] = []
        portion = self._portions[part] if part < len(self._portions) else ()
        for piece in labelled.pieces(portion):
            if piece.blank:
                continue
            if piece.opens:
                labels.append(piece.label)
                lengths.append(0)
            if piece.tokens is not None:
                lengths[-1] += len(piece.tokens.ids)
        if labelled.fields.tokens is not None:  # a row may have several documents of its trainer
            ends = begin + np.cumsum(np.array(lengths, np.int64))
        else:
            ends = np.append(self._starts(begin, end)[1:], end)
        if not labels or len(ends) != len(labels) or ends[-1] != end:
            raise CorpusError(
                f"{stream.path(part)} has {len(ends)} documents and {end - begin} tokens, but its "
                f"text has {len(labels)} documents: the text has changed, or an old version of "
                "sparselogits packed it. Pack the text again"
            )
        return labels, ends

    def _starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Return the positions in [begin, end) of the stream at which documents begin, int64."""
        found = [
            at + np.flatnonzero(self._corpus.stream.read(at, min(at + _BLOCK, end)).starts)
            for at in range(begin, end, _BLOCK)
        ]
        starts = np.concatenate([np.empty(0, np.int64), *found])
        if self._corpus.packing.of_documents:  # padding is marked like a document
            starts = starts[(starts - begin) % self._corpus.packing.window_length == 0]
        return starts
