"""A packed corpus on disk: any range of windows, by number.

See `packer` for the folder's layout. Reading keeps a few row groups of tokens in memory whatever
the size of the corpus, and opening reads two small JSON files.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sparselogits.corpus.streams import (
    Counts,
    TokenStream,
    part_name,
    read_footer,
    write_atomically,
)
from sparselogits.corpus.windows import Packing, Window
from sparselogits.errors import CorpusError, InvalidArgumentError
from sparselogits.identity import canonical_json

FORMAT = 1


@dataclass(frozen=True)
class Paths:
    """Where things stand in the folder of a packed corpus."""

    folder: Path

    @property
    def made_from(self) -> Path:
        """What it is packed from."""
        return self.folder / "corpus.json"

    @property
    def index(self) -> Path:
        """Its lengths; there once it is complete."""
        return self.folder / "index.json"

    @property
    def training(self) -> Path:
        """Parts of the stream of training documents."""
        return self.folder / "training"

    @property
    def holdout(self) -> Path:
        """Parts of the stream of documents kept aside."""
        return self.folder / "holdout"

    @property
    def frequencies(self) -> Path:
        """How often each id occurs in the training windows."""
        return self.folder / "frequencies.parquet"

    @property
    def names(self) -> set[str]:
        """All that a packed corpus's folder holds."""
        files = (self.made_from, self.index, self.training, self.holdout, self.frequencies)
        return {file.name for file in files}

    def remove(self) -> None:
        """Remove a packed corpus, and its folder if nothing else is in it."""
        for stream in (self.training, self.holdout):
            shutil.rmtree(stream, ignore_errors=True)
        for file in (self.index, self.frequencies, self.made_from):
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


@dataclass(frozen=True)
class CorpusSummary:
    """What became of the text.

    Tokens count separators and beginning-of-text tokens, and include the dropped ones.
    """

    documents: int
    characters: int
    tokens: int
    dropped_tokens: int
    """Of the last partial training window."""
    holdout_documents: int
    holdout_characters: int
    holdout_tokens: int
    holdout_dropped_tokens: int
    """Of the last partial hold-out window."""
    blank_documents: int
    """Left out, because they hold no text."""

    def to_json(self) -> dict[str, int]:
        """Plain JSON values."""
        return asdict(self)


class PackedCorpus:
    """Windows of tokens on disk; made by `pack`, opened by `PackedCorpus.open`.

    Safe to share between threads, and to pickle: a copy opens the files anew.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], index: dict[str, Any]) -> None:
        self.folder = folder
        self.packing = Packing(**made_from["packing"])
        self.source_name: str = made_from["source"]["name"]
        self.source_fingerprint: str = made_from["source"]["fingerprint"]
        self.tokenizer_fingerprint: str = made_from["tokenizer"]
        self.vocab_size: int = made_from["vocab_size"]
        self.summary = CorpusSummary(**index["summary"])
        paths = Paths(folder)
        self._training = TokenStream(paths.training, index["training"])
        self._holdout = TokenStream(paths.holdout, index["holdout"])

    @classmethod
    def open(cls, path: Path | str) -> PackedCorpus:
        """Open a complete packed corpus.

        Raises:
            CorpusError: nothing there, not finished, or made by another version.
        """
        paths = Paths(Path(path))
        if not paths.made_from.exists():
            raise CorpusError(f"{path} holds no packed corpus; pack one there first")
        made_from = read_json(paths.made_from)
        if made_from.get("format") != FORMAT:
            raise CorpusError(
                f"the packed corpus at {path} has format {made_from.get('format')!r}, this "
                f"library reads {FORMAT}; pack it again"
            )
        if not paths.index.exists():
            raise CorpusError(
                f"the packed corpus at {path} is not finished; pack it again to go on"
            )
        return cls(paths.folder, made_from, read_json(paths.index))

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedCorpus.open, (self.folder,)

    @property
    def windows(self) -> int:
        """Number of training windows."""
        return self._training.tokens // self.packing.window_length

    @property
    def holdout_windows(self) -> int:
        """Number of windows kept aside."""
        return self._holdout.tokens // self.packing.window_length

    def read(self, start: int, stop: int) -> list[Window]:
        """The training windows [start, stop).

        Raises:
            InvalidArgumentError: a range that is not within [0, windows].
            CorpusError: for a damaged file.
        """
        return self._read(self._training, start, stop, self.windows)

    def read_holdout(self, start: int, stop: int) -> list[Window]:
        """The hold-out windows [start, stop); see `read`."""
        return self._read(self._holdout, start, stop, self.holdout_windows)

    @cached_property
    def token_frequencies(self) -> NDArray[np.int64]:
        """int64 [V]: how often each id occurs in the training windows.

        Raises:
            CorpusError: for a damaged file.
        """
        path = Paths(self.folder).frequencies
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            counts: NDArray[np.int64] = table.column("count").to_numpy()
        except (OSError, pa.ArrowException, KeyError) as error:
            raise CorpusError(f"{path} is damaged ({error}); pack the corpus again") from error
        return counts

    def _read(self, stream: TokenStream, start: int, stop: int, windows: int) -> list[Window]:
        if not 0 <= start <= stop <= windows:
            raise InvalidArgumentError(
                f"windows {start}:{stop} asked for, but {self.folder} has windows 0:{windows}"
            )
        length = self.packing.window_length
        tokens = stream.read(start * length, stop * length)
        result = []
        for index in range(start, stop):
            own = slice((index - start) * length, (index - start + 1) * length)
            starts = np.flatnonzero(tokens.starts[own]).astype(np.int32)
            mask = None
            if tokens.learnt is not None:
                # position j predicts token j + 1; what the last one predicts is not in the window
                mask = np.append(tokens.learnt[own][1:], False)
            result.append(Window(index, tokens.ids[own].copy(), starts, mask))
        return result


def write_index(paths: Paths, parts: int, packing: Packing, vocab_size: int) -> None:
    """Add up what the parts hold, and complete the corpus.

    Raises:
        CorpusError: when a stream does not fill one window, or a part is damaged.
    """
    training, lengths, frequencies = _totals(paths.training, parts, vocab_size)
    kept_aside = parts if packing.holdout else 0
    holdout, holdout_lengths, _ = _totals(paths.holdout, kept_aside, vocab_size)
    try:
        _require_windows(training, holdout, packing)
    except CorpusError:
        # nothing here is worth keeping, and it would stand in the way of better settings
        paths.remove()
        raise
    dropped = training.tokens % packing.window_length
    if dropped:
        stream = TokenStream(paths.training, lengths)
        tail = stream.read(training.tokens - dropped, training.tokens)
        frequencies -= np.bincount(tail.ids, minlength=vocab_size)
    summary = CorpusSummary(
        documents=training.documents,
        characters=training.characters,
        tokens=training.tokens,
        dropped_tokens=dropped,
        holdout_documents=holdout.documents,
        holdout_characters=holdout.characters,
        holdout_tokens=holdout.tokens,
        holdout_dropped_tokens=holdout.tokens % packing.window_length,
        blank_documents=training.blank_documents + holdout.blank_documents,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"count": frequencies}), sink, write_page_checksum=True)
    write_atomically(paths.frequencies, sink.getvalue().to_pybytes())
    index = {"summary": summary.to_json(), "training": lengths, "holdout": holdout_lengths}
    write_atomically(paths.index, canonical_json(index))


def _totals(
    folder: Path, parts: int, vocab_size: int
) -> tuple[Counts, list[int], NDArray[np.int64]]:
    total, lengths, frequencies = Counts(), [], np.zeros(vocab_size, np.int64)
    for number in range(parts):
        counts, own = read_footer(folder / part_name(number), vocab_size)
        total += counts
        lengths.append(counts.tokens)
        frequencies += own
    return total, lengths, frequencies


def _require_windows(training: Counts, holdout: Counts, packing: Packing) -> None:
    length, share = packing.window_length, packing.holdout
    documents = training.documents + holdout.documents
    if not documents:
        raise CorpusError(
            "the corpus holds no text: every document is empty or white space; name other text"
        )
    kept = f", after keeping {holdout.documents} of {documents} documents aside" if share else ""
    if training.tokens < length:
        raise CorpusError(
            f"the text is too short: {training.tokens} tokens{kept}, and one window needs "
            f"{length}. Use more text or a shorter window (--window)."
        )
    if share and holdout.tokens < length:
        raise CorpusError(
            f"the hold-out is too short: holdout={share} kept {holdout.documents} of {documents} "
            f"documents aside, {holdout.tokens} tokens, and one window needs {length}. Raise the "
            "share, use a shorter window, or divide the text into more documents: whole documents "
            "are kept aside, and a text file is one document unless lines of <|endoftext|> "
            "divide it."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a packed corpus.

    Raises:
        CorpusError: when it cannot be read.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); pack the corpus again") from error
    return value
