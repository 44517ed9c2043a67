"""Pack a source into windows on disk: in parallel, resumable, the same bytes every time.

    OUT/
      corpus.json                     what the corpus is made from; written first
      training/part-00000000.parquet  the token stream of all documents, in parts
      holdout/part-00000000.parquet   with a hold-out: keys and lengths of a part's documents
      frequencies.parquet             how often each id occurs in the training windows
      index.json                      lengths, totals, what is held out; written last

The source is divided into portions of about `PART_BYTES`, and each portion becomes one part of
the stream. Portions depend on the source alone and not on one another, so the bytes on disk depend
neither on the number of processes nor on how often the work was interrupted: a part that is
finished is never made again, and an interruption costs at most one portion per process. Memory is
bounded by the batch of text being tokenised and one row group of tokens. A packed corpus takes
about two bytes per token.
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
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from sparselogits.corpus.claims import claimed
from sparselogits.corpus.holdout import writing_table
from sparselogits.corpus.packed import (
    NoWindowsError,
    PackedCorpus,
    Paths,
    format_of,
    public_source,
    write_index,
)
from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.source import Portion, Source
from sparselogits.corpus.streams import PartWriter, part_name, writing_part
from sparselogits.corpus.tokenizer_identity import tokenizer_fingerprint
from sparselogits.corpus.tokenizing import Encoded, Encoder
from sparselogits.corpus.windows import Packing
from sparselogits.errors import CorpusError, InvalidArgumentError
from sparselogits.files import clean_leftovers, disk_errors
from sparselogits.progress import Progress

PART_BYTES = 32 << 20
"""Bytes of text that become one part; an interruption costs at most one part, about ten seconds."""
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
    """Pack `source` into `out`, or continue an interrupted call.

    A complete corpus that was made from the same inputs is opened and returned at once.

    Args:
        source: text from `open_source`.
        tokenizer: transformers tokenizer of the teacher; its chat template renders messages. Of
            token ids it must be the one that made them.
        packing: how documents become windows, usually from `packing_for`.
        out: folder for the packed corpus alone.
        vocab_size: number of ids that the teacher knows; larger ids are refused.
        progress: called repeatedly with the bytes of text done and their total.
        processes: number of processes that tokenise at once. With one, the tokenizer uses its own
            threads.
        part_bytes: bytes of text that become one part.

    Raises:
        CorpusError: the text cannot be read, is empty, or does not fill a window; an id lies
            outside the vocabulary; or the folder holds something else.
        IdentityMismatchError: `out` was packed from other text, or with other settings; names the
            fields. Or the token ids of the source were made by another tokenizer.
        StorageError: the folder cannot be written; finished parts are kept.
    """
    _check_ids(packing, vocab_size)
    if processes < 1 or part_bytes < 1:
        raise InvalidArgumentError(
            f"found processes={processes} and part_bytes={part_bytes}; give at least 1 for each"
        )
    paths = Paths(Path(out))
    source = source.read_by(tokenizer).cut_by(packing, vocab_size)
    made_from = {
        "format": format_of(packing),
        "source": public_source(source.to_json()),
        "tokenizer": str(tokenizer_fingerprint(tokenizer)),
        "vocab_size": vocab_size,
        "packing": packing.to_json(),
        "part_bytes": part_bytes,
    }
    with disk_errors(paths.folder), claimed(paths, made_from) as claim:
        for folder in (paths.folder, paths.training, paths.holdout):
            clean_leftovers(folder)
        if not paths.index.exists():
            work = _Work(source, Encoder(tokenizer), packing, paths, vocab_size)
            portions = source.portions(part_bytes)
            _make_parts(work, portions, processes, progress)
            try:
                write_index(paths, len(portions), packing, vocab_size)
            except NoWindowsError:  # the folder would refuse better settings
                claim.abandon()
                raise
    return PackedCorpus.open(paths.folder)


def _check_ids(packing: Packing, vocab_size: int) -> None:
    for name in ("separator_id", "bos_id"):
        value = getattr(packing, name)
        if value is not None and value >= vocab_size:
            raise CorpusError(
                f"{name}={value} lies outside the teacher's vocabulary of {vocab_size} ids: the "
                "tokenizer does not belong to this teacher, or the id is wrong"
            )


@dataclass(frozen=True)
class _Work:
    """Everything that a process needs to pack a portion."""

    source: Source
    encoder: Encoder
    packing: Packing
    paths: Paths
    vocab_size: int


def _pack_portion(
    work: _Work, portion: Portion, number: int, advance: Callable[[int], None]
) -> None:
    """Write the part that a portion becomes, and the table of its documents if some are held out.

    The part is committed last: once it exists, both do.
    """
    name = part_name(number)
    with ExitStack() as stack:
        part = writing_part(work.paths.training / name, work.vocab_size, masked=work.source.masked)
        writer, table = stack.enter_context(part), None
        if work.packing.holdout:
            table = stack.enter_context(writing_table(work.paths.holdout / name))
        left = sum(span.size for span in portion)
        for batch in _batches(work.source.pieces(portion)):
            for piece, encoded in zip(batch, work.encoder.encode(batch), strict=True):
                if piece.blank:
                    writer.counts.blank_documents += 1
                    continue
                tokens = _append(writer, piece, encoded, work.packing)
                if table is not None:
                    table.add(piece, tokens)
            done = min(left, sum(piece.size for piece in batch))
            left -= done
            advance(done)
        advance(left)


def _append(writer: PartWriter, piece: Piece, encoded: Encoded, packing: Packing) -> int:
    """Write the tokens of a piece and return their number."""
    writer.counts.characters += piece.stop - piece.start
    ids, learnt = encoded
    tokens = len(ids)
    if piece.tokens is not None:  # complete: it has its own separators
        if piece.opens:
            writer.begin_document()
        writer.append(ids, learnt=learnt, starts=piece.tokens.starts)
        return tokens
    if piece.opens:
        writer.begin_document()
        # rendered text, and text that begins with the token, does not get it twice
        begun = piece.rendered or (len(ids) > 0 and ids[0] == packing.bos_id)
        if packing.bos_id is not None and not begun:
            writer.append(np.array([packing.bos_id]), learnt=False)
            tokens += 1
    writer.append(ids, learnt=learnt)
    if piece.closes and not (len(ids) > 0 and ids[-1] == packing.separator_id):
        # learnt as the token before it is; a question without an answer has none
        end = learnt if isinstance(learnt, bool) else bool(len(learnt) and learnt[-1])
        writer.append(np.array([packing.separator_id]), learnt=end)
        tokens += 1
    return tokens


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
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


def _make_parts(
    work: _Work,
    portions: Sequence[Portion],
    processes: int,
    progress: Progress | None,
) -> None:
    """Make the parts that do not exist yet."""
    sizes = [sum(span.size for span in portion) for portion in portions]
    todo = [n for n in range(len(portions)) if not (work.paths.training / part_name(n)).exists()]
    done, total = sum(sizes) - sum(sizes[n] for n in todo), sum(sizes)

    def report(now: int) -> None:
        if progress is not None:
            progress(done + now, total)

    report(0)
    if processes == 1 or len(todo) < 2:
        made = 0

        def advance(size: int) -> None:
            nonlocal made
            made += size
            report(made)

        for number in todo:
            _pack_portion(work, portions[number], number, advance)
    else:
        _in_processes(work, portions, todo, min(processes, len(todo)), report)


def _in_processes(
    work: _Work,
    portions: Sequence[Portion],
    todo: Sequence[int],
    processes: int,
    report: Callable[[int], None],
) -> None:
    # spawned, not forked: the tokenizer and torch have threads, which do not survive a fork
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
            "a packing process was killed, perhaps for lack of memory. Finished parts are kept: "
            "run it again to go on, with fewer processes if memory is short. (If it fails at "
            "once: a script that packs with processes > 1 must do so under "
            "`if __name__ == '__main__':`.)"
        ) from error
    finally:
        stop.set()  # so that after an error or Ctrl-C no worker finishes its part first
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Ends a worker's part after the parent has failed."""


_worker: tuple[_Work, Any, Any]


def _start_worker(work: _Work, counter: Any, stop: Any) -> None:
    global _worker
    _worker = work, counter, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a killed parent cannot tell its workers


def _work(portion: Portion, number: int) -> None:
    work, counter, stop = _worker

    def advance(size: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with counter.get_lock():
            counter.value += size

    _pack_portion(work, portion, number, advance)
