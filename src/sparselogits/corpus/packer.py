"""Pack a source into windows on disk: in parallel, resumable, the same bytes every time.

    OUT/
      corpus.json                     what it is made from; written first
      training/part-00000000.parquet  the token stream of all documents, in parts
      holdout/part-00000000.parquet   with a hold-out: keys and lengths of a part's documents
      frequencies.parquet             how often each id occurs in the training windows
      index.json                      lengths, totals, what is held out; written last

The source is divided into portions of about `PART_BYTES`, and each portion becomes one part of
the stream. Portions depend on the source alone, so the bytes on disk do not depend on the number
of processes, nor on how often the work was interrupted: what was not finished is done again, at
most one portion a process. Memory is bounded by the batch of text being tokenised and one row
group of tokens. A packed corpus takes about two bytes a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparselogits.corpus.claims import claimed
from sparselogits.corpus.packed import (
    NoWindowsError,
    PackedCorpus,
    Paths,
    format_of,
    public_source,
    write_index,
)
from sparselogits.corpus.portions import Job, Progress, make_parts
from sparselogits.corpus.source import Source
from sparselogits.corpus.tokenizer_identity import tokenizer_fingerprint
from sparselogits.corpus.tokenizing import Encoder
from sparselogits.corpus.windows import Packing
from sparselogits.errors import CorpusError, InvalidArgumentError
from sparselogits.files import clean_leftovers, disk_errors

PART_BYTES = 32 << 20
"""Text that becomes one part: what an interruption costs a process, ten seconds or so."""


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
    """Pack `source` into `out`, or go on where an earlier call was interrupted.

    A complete corpus made from the same things is opened and returned at once.

    Args:
        source: from `open_source`.
        tokenizer: the teacher's, a transformers tokenizer; its chat template reads messages.
        packing: usually from `packing_for`.
        out: a folder of its own.
        vocab_size: ids the teacher knows; larger ones are refused.
        progress: called now and then with the bytes of text done, and in all.
        processes: that tokenise at once. With one, the tokenizer uses its own threads.
        part_bytes: text that becomes one part.

    Raises:
        CorpusError: text that cannot be read, is empty, or does not fill a window; ids outside
            the vocabulary; a folder that holds something else.
        IdentityMismatchError: `out` was packed from other text, or otherwise; names the fields.
        StorageError: the folder cannot be written; finished parts are kept.
    """
    _check_ids(packing, vocab_size)
    if processes < 1 or part_bytes < 1:
        raise InvalidArgumentError(f"processes={processes}, part_bytes={part_bytes}: at least 1")
    paths, source = Paths(Path(out)), source.read_by(tokenizer)
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
            job = Job(source, Encoder(tokenizer), packing, paths, vocab_size)
            portions = source.portions(part_bytes)
            make_parts(job, portions, processes, progress)
            try:
                write_index(paths, len(portions), packing, vocab_size)
            except NoWindowsError:  # it would stand in the way of better settings
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
