"""The work of packing: each portion of a source becomes one part of the token stream.

Portions are independent of one another, so they are done in any order, by one process or several,
and one that is finished is never done again.
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
from typing import Any

import numpy as np

from sparselogits.corpus.holdout import DocumentTable
from sparselogits.corpus.packed import Paths
from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.source import Portion, Source
from sparselogits.corpus.streams import PartWriter, part_name
from sparselogits.corpus.tokenizing import Encoded, Encoder
from sparselogits.corpus.windows import Packing
from sparselogits.errors import CorpusError

_BATCH_BYTES = 1 << 20

Progress = Callable[[int, int | None], None]
"""Called with bytes of the source done and, if known, in all."""


@dataclass(frozen=True)
class Job:
    """Everything a process needs to pack a portion."""

    source: Source
    encoder: Encoder
    packing: Packing
    paths: Paths
    vocab_size: int


def _pack_portion(job: Job, portion: Portion, number: int, advance: Callable[[int], None]) -> None:
    """Write the part that a portion becomes, and the table of its documents if some are held out.

    The part is committed last: once it exists, both do.
    """
    name = part_name(number)
    with ExitStack() as stack:
        writer = stack.enter_context(
            PartWriter(job.paths.training / name, job.vocab_size, masked=job.source.masked)
        )
        table = None
        if job.packing.holdout:
            table = stack.enter_context(DocumentTable(job.paths.holdout / name))
        left = sum(span.size for span in portion)
        for batch in _batches(job.source.pieces(portion)):
            for piece, encoded in zip(batch, job.encoder.encode(batch), strict=True):
                if piece.blank:
                    writer.counts.blank_documents += 1
                    continue
                tokens = _append(writer, piece, encoded, job.packing)
                if table is not None:
                    table.add(piece, tokens)
            done = min(left, sum(piece.size for piece in batch))
            left -= done
            advance(done)
        advance(left)


def _append(writer: PartWriter, piece: Piece, encoded: Encoded, packing: Packing) -> int:
    """Write the tokens of a piece; return how many they are."""
    writer.counts.characters += piece.stop - piece.start
    ids, learnt = encoded
    tokens = len(ids)
    if piece.opens:
        writer.begin_document()
        # text that begins so by itself was written for a model: it is not begun twice
        begun = piece.rendered or (len(ids) > 0 and ids[0] == packing.bos_id)
        if packing.bos_id is not None and not begun:
            writer.append(np.array([packing.bos_id]), learnt=False)
            tokens += 1
    writer.append(ids, learnt=learnt)
    if piece.closes and not (len(ids) > 0 and ids[-1] == packing.separator_id):
        # the end of what is learnt; a question without an answer has none
        end = learnt if isinstance(learnt, bool) else bool(len(learnt) and learnt[-1])
        writer.append(np.array([packing.separator_id]), learnt=end)
        tokens += 1
    return tokens


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def make_parts(
    job: Job, portions: Sequence[Portion], processes: int, progress: Progress | None
) -> None:
    """Make the parts of all portions that are not there yet.

    Raises:
        CorpusError: text that cannot be read, ids outside the vocabulary, or a worker killed.
        OSError: the disk is full, or may not be written to.
    """
    sizes = [sum(span.size for span in portion) for portion in portions]
    todo = [n for n in range(len(portions)) if not (job.paths.training / part_name(n)).exists()]
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
            _pack_portion(job, portions[number], number, advance)
    else:
        _in_processes(job, portions, todo, min(processes, len(todo)), report)


def _in_processes(
    job: Job,
    portions: Sequence[Portion],
    todo: Sequence[int],
    processes: int,
    report: Callable[[int], None],
) -> None:
    # spawned, not forked: the tokenizer and torch have threads, which do not survive a fork
    context = get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (job, counter, stop))
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
            "run it again to go on, with fewer processes if memory is short. (If it happens at "
            "once: a script that packs with processes > 1 must do so under "
            "`if __name__ == '__main__':`.)"
        ) from error
    finally:
        stop.set()  # so that after an error or Ctrl-C no worker finishes its part first
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Ends a worker's part when the parent has given up."""


_worker: tuple[Job, Any, Any]


def _start_worker(job: Job, counter: Any, stop: Any) -> None:
    global _worker
    _worker = job, counter, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a killed parent cannot tell its workers


def _work(portion: Portion, number: int) -> None:
    job, counter, stop = _worker

    def advance(size: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with counter.get_lock():
            counter.value += size

    _pack_portion(job, portion, number, advance)
