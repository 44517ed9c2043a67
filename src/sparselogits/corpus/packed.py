"""Read any range of windows from a packed corpus on disk.

`packer` describes the layout of the folder. Opening a corpus reads two small JSON files. Besides
the windows that are read, a few row groups of tokens and the hold-out ranges of a few parts are in
memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparselogits.corpus.holdout import (
    SelectedStream,
    Split,
    choose_split,
    divide,
    document_counts,
)
from sparselogits.corpus.streams import (
    Counts,
    TokenStream,
    open_part,
    part_name,
    read_footer,
    read_group,
)
from sparselogits.corpus.windows import Packing, Window, text_length
from sparselogits.errors import CorpusError, InvalidArgumentError
from sparselogits.files import write_whole
from sparselogits.identity import LARGEST_VOCABULARY, canonical_json, label_of
from sparselogits.objectives import CAUSAL
from sparselogits.untrusted import parse_json, read_json, read_regular, shown
from sparselogits.wording import counted

FORMAT_VERSIONS = (1, 2)
"""Versions of the format that this library reads (see docs/corpus.md).

A corpus is written in format 2 if it has a hold-out, and in format 1 otherwise. In earlier corpora
of format 1 with a hold-out, documents were held out by their hash alone, and training and held-out
tokens were two streams.
"""
_LARGEST_JSON = 1 << 24  # bytes; an index contains the length of each part
_MOST_VALUES = 1 << 20  # in corpus.json and index.json
_BLOCK = 1 << 20
_ROWS = 1 << 20  # number of rows per row group of frequencies.parquet

_Stream = TokenStream | SelectedStream


class Paths:
    """Paths of the files in the folder of a packed corpus; `packer` describes the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made_from = folder / "corpus.json"
        self.index = folder / "index.json"  # written last, so its presence marks completion
        self.training = folder / "training"
        self.holdout = folder / "holdout"
        self.frequencies = folder / "frequencies.parquet"
        self.lock = folder / "lock"  # exists while the corpus is packed; see `claims`

    @property
    def begun(self) -> bool:
        """Whether at least one part of the corpus is finished."""
        return self.index.exists() or any(self.training.glob("part-*"))

    @property
    def names(self) -> set[str]:
        """Names of all files and folders in the folder of a packed corpus."""
        files = (self.made_from, self.index, self.training, self.holdout, self.frequencies)
        return {file.name for file in (*files, self.lock)}

    def clear(self) -> None:
        """Remove all packed files, `corpus.json` last."""
        for stream in (self.training, self.holdout):
            shutil.rmtree(stream, ignore_errors=True)
        for file in (self.index, self.frequencies, self.made_from):
            file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove a packed corpus, and its folder if the folder contains nothing else."""
        self.clear()
        self.lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder may contain other files
            self.folder.rmdir()


@dataclass(frozen=True)
class CorpusSummary:
    """Numbers of documents, characters and tokens in a packed corpus.

    Tokens include separators, beginning-of-text tokens, padding and dropped tokens. With the
    hold-out rule "windows", a document counts as held out if it begins at or after the first
    held-out token. Documents of token ids have no characters.
    """

    documents: int
    """Number of training documents."""
    characters: int
    """Number of characters in the training documents."""
    tokens: int
    """Number of training tokens."""
    dropped_tokens: int
    """Number of tokens in the last partial training window and in the gap before the hold-out."""
    holdout_documents: int
    """Number of held-out documents."""
    holdout_characters: int
    """Number of characters in the held-out documents."""
    holdout_tokens: int
    """Number of held-out tokens."""
    holdout_dropped_tokens: int
    """Number of held-out tokens after the last held-out window."""
    blank_documents: int
    """Number of documents that were not packed because they contain no text to train on."""
    holdout_rule: str | None = None
    """Rule of the hold-out, "documents" or "windows"; None without a hold-out, and in format 1."""
    split_documents: int = 0
    """Number of documents with both training and held-out tokens."""


class PackedCorpus:
    """Windows of tokens on disk, written by `pack` and opened by `PackedCorpus.open`.

    A corpus can be shared between threads and pickled; a pickled copy opens the files again.

    Attributes:
        folder: folder of the corpus.
        packing: rules by which the windows were formed.
        summary: numbers of documents, characters and tokens.
        holdout_windows: number of windows held out for evaluation.
        stream: all tokens, including held-out tokens in format 2 only.
        vocab_size: number V of the teacher's logits per position; all ids are smaller.
        source_name: name of the text, for display.
        source_fingerprint: hexadecimal sha256 of names and samples of the text's files.
        text_fingerprint: hexadecimal sha256 of the source's description, without the name.
        tokenizer_fingerprint: fingerprint of the tokenizer, hexadecimal sha256.
        pads_rows: whether each window is a row of token ids, padded at the end if the row is
            shorter.
        format: version of the format on disk, one of `FORMAT_VERSIONS`.

    Example:
        >>> corpus = PackedCorpus.open("my-cache/corpus")
        >>> [window.tokens.shape for window in corpus.read(0, 2)]
        [(32,), (32,)]
    """

    holdout_windows: int
    stream: TokenStream

    def __init__(self, folder: Path, made_from: dict[str, Any], index: dict[str, Any]) -> None:
        self.folder = folder
        self.packing = Packing(**made_from["packing"])
        self.source_name: str = made_from["source"]["name"]
        self.source_fingerprint: str = made_from["source"]["fingerprint"]
        self.text_fingerprint = text_fingerprint(made_from["source"])
        self.tokenizer_fingerprint: str = made_from["tokenizer"]
        self.vocab_size: int = made_from["vocab_size"]
        if type(self.vocab_size) is not int or not 0 < self.vocab_size <= LARGEST_VOCABULARY:
            raise ValueError(
                f"vocab_size is {shown(self.vocab_size)}, expected an integer from 1 to "
                f"{LARGEST_VOCABULARY}"
            )
        rows = made_from["source"].get("tokens", {}).get("rows")
        self.pads_rows: bool = rows == "windows"
        self.summary = CorpusSummary(**index["summary"])
        self.format: int = made_from["format"]
        self._training: _Stream
        self._holdout: _Stream
        paths, lengths = Paths(folder), [int(length) for length in index["training"]]
        self.stream, length = TokenStream(paths.training, lengths), self.packing.window_length
        self._training = self.stream
        if self.format == 1:
            self._holdout = TokenStream(paths.holdout, index["holdout"])
            self.holdout_windows = self._holdout.tokens // length
            return
        split = Split.from_json(index["holdout"])
        self._training, self._holdout = divide(self.stream, lengths, paths.holdout, split, length)
        self.holdout_windows = min(split.windows, self._holdout.tokens // length)

    @classmethod
    def open(cls, path: Path | str) -> PackedCorpus:
        """Open a complete packed corpus.

        Args:
            path: folder of the corpus.

        Raises:
            CorpusError: the folder contains no packed corpus, or one that is unfinished, damaged or
                of an unknown format.
        """
        paths = Paths(Path(path))
        if not paths.made_from.exists():
            raise CorpusError(f"{path} contains no packed corpus; pack text into it first")
        made_from = read_description(paths.made_from)
        if made_from.get("format") not in FORMAT_VERSIONS:
            raise CorpusError(
                f"the packed corpus at {path} has format {made_from.get('format')!r}, but this "
                f"library reads {' and '.join(map(str, FORMAT_VERSIONS))}; pack the text again"
            )
        if not paths.index.exists():
            raise CorpusError(
                f"the packed corpus at {path} is not finished; pack the text again to resume"
            )
        try:
            index = read_json(paths.index, largest=_LARGEST_JSON, most=_MOST_VALUES)
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{paths.index} cannot be read ({error}); pack the text again"
            ) from error
        try:
            return cls(paths.folder, made_from, index)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorpusError(
                f"the packed corpus at {path} is damaged: corpus.json or index.json has another "
                f"form ({type(error).__name__}: {error}). Delete it and pack the text again"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self._holdout is self._training)

    def held_out_whole(self) -> PackedCorpus:
        """Return a copy whose held-out windows are all of the training windows, for evaluation."""
        other = copy(self)
        other._holdout, other.holdout_windows = self._training, self.windows
        return other

    def in_words(self) -> str:
        """Describe the documents, the windows and the hold-out in a sentence, for display."""
        summary, length = self.summary, self.packing.window_length
        documents = counted(summary.documents + summary.holdout_documents, "document")
        text = f"{documents}, {counted(self.windows, 'window')} of {length} tokens"
        if self.packing.of_documents:
            text += ", one document per window"
        if summary.blank_documents:
            text += f"; {counted(summary.blank_documents, 'document')} without text left out"
        if not self.packing.holdout:
            return text
        held, total = self.holdout_windows, summary.tokens + summary.holdout_tokens
        share = held * length / max(total, 1)
        text += f"; held out for evaluation: {counted(held, 'window')} ({share:.1%}), "
        if summary.holdout_rule != "windows":
            return text + counted(summary.holdout_documents, "whole document")
        text += "the last of the text"
        if summary.dropped_tokens >= length:
            text += ", after a gap of one window"
        if summary.split_documents:
            text += "; each side has a part of one document"
        return text

    @property
    def windows(self) -> int:
        """Number of training windows."""
        return self._training.tokens // self.packing.window_length

    def read(self, start: int, stop: int) -> list[Window]:
        """Return the training windows [start, stop).

        Raises:
            InvalidArgumentError: the range is not within [0, windows].
            CorpusError: a file is damaged.
        """
        return self._read(self._training, start, stop, self.windows)

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the ranges of `stream` that contain the tokens of the training windows.

        Args:
            start: index of the first requested window.
            stop: index after the last requested window, at most `windows`.

        Raises:
            InvalidArgumentError: the range is not within [0, windows].
            CorpusError: a document table is damaged.
        """
        self._require_range(start, stop, self.windows)
        length = self.packing.window_length
        return list(self._training.ranges(start * length, stop * length))

    def read_holdout(self, start: int, stop: int) -> list[Window]:
        """Return the held-out windows [start, stop).

        Raises:
            InvalidArgumentError: the range is not within [0, holdout_windows].
            CorpusError: a file is damaged.
        """
        return self._read(self._holdout, start, stop, self.holdout_windows)

    @cached_property
    def token_frequencies(self) -> NDArray[np.int64]:
        """Number of occurrences of each id in the training windows, int64 [V].

        Raises:
            CorpusError: frequencies.parquet is missing or damaged.
        """
        path, tables, left = Paths(self.folder).frequencies, list[pa.Table](), self.vocab_size
        try:
            # written with pyarrow's defaults, unlike parts
            with open_part(path, 1 + left // _ROWS, with_schema=True) as file:
                for group in range(file.num_row_groups):
                    tables.append(read_group(path, file, group, left, with_dictionaries=True))
                    left -= len(tables[-1])
            counts: NDArray[np.int64] = pa.concat_tables(tables).column("count").to_numpy()
            if counts.dtype != np.int64 or left:
                found = f"{counts.dtype} [{len(counts)}]"
                raise ValueError(f"found {found}, expected int64 [{self.vocab_size}]")
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise CorpusError(f"{path} is damaged ({error}); pack the corpus again") from error
        return counts

    def _require_range(self, start: int, stop: int, windows: int) -> None:
        """Validate that [start, stop) is a range of `windows` windows."""
        if not 0 <= start <= stop <= windows:
            raise InvalidArgumentError(
                f"{self.folder} does not have the windows {start}:{stop}; give a range within "
                f"0:{windows}"
            )

    def _read(self, stream: _Stream, start: int, stop: int, windows: int) -> list[Window]:
        self._require_range(start, stop, windows)
        length = self.packing.window_length
        tokens = stream.read(start * length, stop * length)
        if len(tokens.ids) and not (
            0 <= int(tokens.ids.min()) <= int(tokens.ids.max()) < self.vocab_size
        ):
            raise CorpusError(
                f"{self.folder} is damaged: it has a token outside its vocabulary of "
                f"{self.vocab_size} ids in windows {start} to {stop - 1}; pack the text again"
            )
        result = []
        for index in range(start, stop):
            own = slice((index - start) * length, (index - start + 1) * length)
            starts = np.flatnonzero(tokens.starts[own]).astype(np.int32)
            mask = learnt = None
            if tokens.learnt is not None:
                learnt = tokens.learnt[own].copy()
                # the last position predicts a token of the next window
                mask = CAUSAL.at_positions(learnt, False)
            before_padding = text_length(self.packing.kind, starts, length)
            ids = tokens.ids[own].copy()
            result.append(Window(index, ids, starts, mask, learnt, before_padding))
        return result


def _reopen(folder: Path, whole: bool) -> PackedCorpus:
    corpus = PackedCorpus.open(folder)
    return corpus.held_out_whole() if whole else corpus


def public_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description from `Source.to_json` without the folders in the source's name."""
    return {**source, "name": label_of(str(source.get("name", "")))}


def text_fingerprint(source: Mapping[str, Any]) -> str:
    """Return the hexadecimal sha256 of a description from `Source.to_json` without the name."""
    return hashlib.sha256(
        canonical_json({key: value for key, value in source.items() if key != "name"})
    ).hexdigest()


def write_index(paths: Paths, parts: int, packing: Packing, vocab_size: int) -> None:
    """Complete a packed corpus of `parts` parts: select the hold-out, write frequencies and index.

    Raises:
        NoWindowsError: the text does not fill the required windows.
        CorpusError: a part or a document table is damaged.
    """
    total, lengths, frequencies = Counts(), list[int](), np.zeros(vocab_size, np.int64)
    for number in range(parts):
        counts, own = read_footer(paths.training / part_name(number), vocab_size)
        total += counts
        lengths.append(counts.tokens)
        frequencies += own
    length, split = packing.window_length, None
    if packing.holdout:
        split = choose_split(paths.holdout, lengths, length, packing.holdout)
    _require_windows(total, packing, split)
    stream = TokenStream(paths.training, lengths)
    index: dict[str, Any] = {"training": lengths, "holdout": []}
    rules: dict[str, Any] = {}
    used = total.tokens // length * length
    documents = characters = held = whole = 0
    if split is None:
        frequencies -= _counted(stream, used, total.tokens, vocab_size)
    else:
        training, holdout = divide(stream, lengths, paths.holdout, split, length)
        used, held = training.tokens // length * length, holdout.tokens
        frequencies = _counted(training, 0, used, vocab_size)
        documents, characters = document_counts(paths.holdout, lengths, split, length)
        whole, index["holdout"] = split.windows * length, split.to_json()
        rules = {"holdout_rule": split.rule, "split_documents": 0}
        if split.rule == "windows":  # at most one document has training and held-out tokens
            between = stream.read(split.training_windows * length, split.first * length + 1)
            rules["split_documents"] = int(not between.starts.any())
    index["summary"] = {
        "documents": total.documents - documents,
        "characters": total.characters - characters,
        "tokens": total.tokens - held,
        "dropped_tokens": total.tokens - held - used,
        "holdout_documents": documents,
        "holdout_characters": characters,
        "holdout_tokens": held,
        "holdout_dropped_tokens": held - whole,
        "blank_documents": total.blank_documents,
        **rules,  # absent in format 1
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"count": frequencies}), sink, write_page_checksum=True)
    write_whole(paths.frequencies, sink.getvalue().to_pybytes())
    write_whole(paths.index, canonical_json(index))


def _counted(stream: _Stream, start: int, stop: int, vocab_size: int) -> NDArray[np.int64]:
    """Return the frequency of each id among the tokens [start, stop) of a stream, int64 [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(start, stop, _BLOCK):
        tokens = stream.read(begin, min(begin + _BLOCK, stop))
        counts += np.bincount(tokens.ids, minlength=vocab_size)
    return counts


class NoWindowsError(CorpusError):
    """Raised if a text does not fill the windows that packing requires."""


def _require_windows(total: Counts, packing: Packing, split: Split | None) -> None:
    length, share = packing.window_length, packing.holdout
    if not total.documents:
        raise NoWindowsError(
            "the corpus contains no text: every document is empty or white space, or has no "
            "completion to train on (with completion-only, if no message has the role "
            "'assistant'), or no file of token ids fills a window; give other text"
        )
    if total.tokens < length:
        raise NoWindowsError(
            f"the text is too short: it has {total.tokens} tokens, but one window needs {length}. "
            "Use more text or a shorter window (--window)."
        )
    if share and split is None:
        raise NoWindowsError(
            f"the text is too short for a hold-out: it has {total.tokens} tokens, but two windows, "
            f"one to train on and one to hold out (holdout={share}), need {2 * length}. Use more "
            f"text, a window of at most {total.tokens // 2} (--window), or no hold-out."
        )


def recorded_vocabulary(folder: Path) -> int | None:
    """Return the vocabulary size in a folder's corpus.json; None without the file or a valid size.

    Raises:
        CorpusError: corpus.json cannot be read.
    """
    made_from = Paths(folder).made_from
    size = read_description(made_from).get("vocab_size") if made_from.exists() else None
    return size if isinstance(size, int) and size > 0 else None


def read_description(made_from: Path) -> dict[str, Any]:
    """Return the description of a packed text, from its `corpus.json`.

    Raises:
        CorpusError: the file cannot be read, or does not describe a text.
    """
    again = f"Delete {made_from.parent} and pack the text again"
    try:
        data = read_regular(made_from, _LARGEST_JSON)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{made_from} cannot be read ({error}). {again}") from error
    return parse_description(data, made_from, again)


def parse_description(data: bytes, where: Path | str, again: str) -> dict[str, Any]:
    """Return the description of a packed text, from the bytes of its `corpus.json`.

    Args:
        data: bytes of the file.
        where: path or URL of the file, for the error message.
        again: advice for a damaged file, for the error message.

    Raises:
        CorpusError: the bytes are not JSON, or do not describe a text.
    """
    try:
        value = parse_json(data, largest=_LARGEST_JSON, most=_MOST_VALUES)
        source = value.get("source") if isinstance(value, dict) else None
        if not (isinstance(source, dict) and isinstance(source.get("fingerprint"), str)):
            raise ValueError(f"found {shown(value)}")
    except ValueError as error:
        raise CorpusError(
            f"{where} is damaged ({error}); expected a JSON object that describes a packed text, "
            f"with a `fingerprint` in `source`. {again}"
        ) from error
    return value  # type: ignore[no-any-return]
