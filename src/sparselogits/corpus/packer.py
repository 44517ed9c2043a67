"""Pack a source into windows on disk, in parallel, resumably and deterministically.

    OUT/
      corpus.json                     description of text, tokenizer and packing; written first
      training/part-00000000.parquet  token stream of all documents, in parts
      holdout/part-00000000.parquet   with a hold-out: keys and lengths of a part's documents
      frequencies.parquet             frequency of each id in the training windows
      index.json                      lengths, totals, hold-out; written last

The source is divided into portions of about `PART_BYTES`, and each portion becomes one part of the
stream. Portions depend only on the source and their size, so the bytes on disk depend neither on
the number of processes nor on interruptions: a finished part is not written again, and an
interruption costs at most one portion per process. The memory of a process is about that of one
batch of text and one row group of tokens. A packed corpus occupies about two bytes per token.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from sparselogits.corpus.claims import claimed
from sparselogits.corpus.document_windows import DocumentWindows
from sparselogits.corpus.holdout import writing_table
from sparselogits.corpus.packed import (
    NoWindowsError,
    PackedCorpus,
    Paths,
    public_source,
    write_index,
)
from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.source import Portion, Source
from sparselogits.corpus.streams import PartWriter, part_name, writing_part
from sparselogits.corpus.tokenizer_identity import tokenizer_fingerprint
from sparselogits.corpus.tokenizing import Encoded, Encoder
from sparselogits.corpus.windows import Packing
from sparselogits.errors import CorpusError, require_whole
from sparselogits.files import clean_leftovers, disk_errors
from sparselogits.identity import LARGEST_VOCABULARY
from sparselogits.progress import Progress

PART_BYTES = 32 << 20
"""Default size in bytes of the text in one part; packing a part takes about ten seconds."""

_BATCH_BYTES = 1 << 20


def pack(
    source: Source,
    tokenizer: Any,
    packing: Packing,
    out: Path,
    *,
    vocab_size: int,
    progress: Progress | None = None,
    processes: int = 1,
    part_bytes: int = PART_BYTES,
) -> PackedCorpus:
    """Pack text into windows of tokens in a folder, or resume an interrupted call.

    A complete corpus that was packed from the same inputs is opened, not packed again.

    Args:
        source: text from `open_source`.
        tokenizer: transformers tokenizer of the teacher; its chat template renders messages. Token
            ids in the source must have been computed with it.
        packing: rules that form windows from documents, usually from `packing_for`.
        out: folder for the packed corpus; it must contain nothing else.
        vocab_size: number V of the teacher's logits per position; ids must be smaller.
        progress: function that is called repeatedly with the number of packed bytes of text and the
            total number.
        processes: number of processes that tokenise in parallel; a single process uses the threads
            of the tokenizer.
        part_bytes: size in bytes of the text in one part.

    Returns:
        The complete corpus.

    Raises:
        CorpusError: the text cannot be read, is empty, or does not fill a window (two with a
            hold-out); an id lies outside the vocabulary; the folder contains other files; or a
            packing process was killed.
        IdentityMismatchError: `out` was packed from other text or with other settings (the message
            lists them), or the source's token ids were computed with another tokenizer.
        InvalidArgumentError: `vocab_size`, `processes` or `part_bytes` is not an integer from 1 on,
            or joined rows of ids are to be packed with one document per window.
        StorageError: the folder cannot be written; finished parts remain.

    Example:
        >>> source = open_source("books/")
        >>> packing = packing_for(tokenizer, window_length=1024, holdout=0.01)
        >>> corpus = pack(source, tokenizer, packing, out, vocab_size=128_256)
        >>> corpus.windows
        12034
    """
    vocab_size = require_whole("vocab_size", vocab_size, 1, LARGEST_VOCABULARY)
    processes = require_whole("processes", processes, 1)
    part_bytes = require_whole("part_bytes", part_bytes, 1)
    for name in ("separator_id", "bos_id", "padding_id"):
        value = getattr(packing, name)
        if value is not None and value >= vocab_size:
            advice = "give another id"
            if name == "padding_id":
                advice = "remove the padding token from it, so that the separator pads windows"
            raise CorpusError(
                f"{name}={value} lies outside the teacher's vocabulary of {vocab_size} ids; use "
                f"the teacher's tokenizer, or {advice}"
            )
    paths = Paths(Path(out))
    source = source.read_by(tokenizer, packing, vocab_size)
    description = {
        "format": 2 if packing.holdout else 1,
        "source": public_source(source.to_json()),
        "tokenizer": str(tokenizer_fingerprint(tokenizer)),
        "vocab_size": vocab_size,
        "packing": packing.to_json(),
        "part_bytes": part_bytes,
    }
    with disk_errors(paths.folder), claimed(paths, description) as abandon:
        for folder in (paths.folder, paths.training, paths.holdout):
            clean_leftovers(folder)
        if not paths.index.exists():
            work = _Work(source, Encoder(tokenizer), packing, paths, vocab_size)
            portions = source.portions(part_bytes)
            _write_parts(work, portions, processes, progress)
            try:
                write_index(paths, len(portions), packing, vocab_size)
            except NoWindowsError:  # else the folder could not be packed with other settings
                abandon()
                raise
    return PackedCorpus.open(paths.folder)


@dataclass(frozen=True)
class _Work:
    """Inputs of a process that packs portions of a source."""

    source: Source
    encoder: Encoder
    packing: Packing
    paths: Paths
    vocab_size: int


def _pack_portion(
    work: _Work, portion: Portion, number: int, advance: Callable[[int], None]
) -> None:
    """Pack a portion into its part, and write its document table if the packing has a hold-out.

    The table is committed before the part, so a part that exists has its table.
    """
    name = part_name(number)
    with ExitStack() as stack:
        padded = work.packing.of_documents
        part = writing_part(
            work.paths.training / name, work.vocab_size, masked=padded or work.source.masked
        )
        writer, table = stack.enter_context(part), None
        append: Callable[[Piece, Encoded], int] = partial(_append, writer, packing=work.packing)
        if padded:
            documents = DocumentWindows(writer, work.packing)
            append = documents.append
        if work.packing.holdout:
            table = stack.enter_context(writing_table(work.paths.holdout / name))
        remaining = sum(span.size for span in portion)
        for batch in _batches(work.source.pieces(portion)):
            for piece, encoded in zip(batch, work.encoder.encode(batch), strict=True):
                if piece.blank:
                    writer.counts.blank_documents += 1
                    continue
                tokens = append(piece, encoded)
                if table is not None:
                    table.add(piece, tokens)
            done = min(remaining, sum(piece.size for piece in batch))
            remaining -= done
            advance(done)
        if padded and (tokens := documents.finish()) and table is not None:
            table.extend(tokens)
        advance(remaining)


def _append(writer: PartWriter, piece: Piece, encoded: Encoded, packing: Packing) -> int:
    """Append a piece with its special tokens to a part; return the number of appended tokens."""
    writer.counts.characters += piece.stop - piece.start
    ids, learnt = encoded
    tokens = len(ids)
    if piece.tokens is not None:  # token ids include the separators
        if piece.opens:
            writer.begin_document()
        writer.append(ids, learnt=learnt, starts=piece.tokens.starts)
        return tokens
    if piece.opens:
        writer.begin_document()
        # chat templates write the token themselves, if their text has one
        has_bos = piece.rendered or (len(ids) > 0 and ids[0] == packing.bos_id)
        if packing.bos_id is not None and not has_bos:
            writer.append(np.array([packing.bos_id]), learnt=False)
            tokens += 1
    writer.append(ids, learnt=learnt)
    if piece.closes and not (len(ids) > 0 and ids[-1] == packing.separator_id):
        # the separator carries a target if and only if the token before it does
        last = learnt if isinstance(learnt, bool) else bool(len(learnt) and learnt[-1])
        writer.append(np.array([packing.separator_id]), learnt=last)
        tokens += 1
    return tokens


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield consecutive pieces in batches whose total weight is about `_BATCH_BYTES`."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.weight
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_parts(
    work: _Work, portions: Sequence[Portion], processes: int, progress: Progress | None
) -> None:
    """Write the parts that do not exist yet."""
    sizes = [sum(span.size for span in portion) for portion in portions]
    todo = [n for n in range(len(portions)) if not (work.paths.training / part_name(n)).exists()]
    done, total = sum(sizes) - sum(sizes[n] for n in todo), sum(sizes)

    def report(packed: int) -> None:
        if progress is not None:
            progress(done + packed, total)

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(0)

    report(0)
    if processes > 1 and len(todo) > 1:
        _in_processes(work, portions, todo, min(processes, len(todo)), report)
        return
    for number in todo:
        _pack_portion(work, portions[number], number, advance)


def _in_processes(
    work: _Work,
    portions: Sequence[Portion],
    todo: Sequence[int],
    processes: int,
    report: Callable[[int], None],
) -> None:
    # spawned, since the threads of the tokenizer and of torch do not survive a fork
    context = get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (work, counter, stop))
    try:
        futures = [pool.submit(_work, portions[number], number) for number in todo]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            report(counter.value)
    except BrokenProcessPool as error:
        raise CorpusError(
            "a packing process was killed, perhaps for lack of memory. Finished parts remain; run "
            "the same command again to resume, with fewer processes if memory is short. (A script "
            "that packs with processes > 1 must do so under `if __name__ == '__main__':`.)"
        ) from error
    finally:
        stop.set()  # after an error or Ctrl-C, no worker finishes its part first
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Raised in a worker to abort a part after an error in another worker or an interruption."""


_worker: tuple[_Work, Any, Any]


def _start_worker(work: _Work, counter: Any, stop: Any) -> None:
    global _worker
    _worker = work, counter, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = parent_process()

    def exit_with_parent() -> None:  # because a killed parent cannot stop its workers
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _work(portion: Portion, number: int) -> None:
    work, counter, stop = _worker

    def advance(size: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with counter.get_lock():
            counter.value += size

    _pack_portion(work, portion, number, advance)
