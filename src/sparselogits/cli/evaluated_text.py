"""The text that `sparselogits eval` measures on: a cache's held-out text, or any other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselogits.console import messages, stage
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError, TeacherError

if TYPE_CHECKING:
    from sparselogits.data import TextDataset
    from sparselogits.store import Cache

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class OtherText:
    """Text that is named by `--data`, and how it is read.

    Args:
        data: as `corpus.open_source` takes it.
        text_field: field or column of the text.
        split: split of a dataset.
        completion_only: only the completions are measured.
        window: tokens per window; None for the cache's, or `DEFAULT_WINDOW`.
        reset_attention: documents of one window do not see each other; None for the cache's way.
        separator_id: token between documents; None for the cache's, or the tokenizer's.
    """

    data: str
    text_field: str = "text"
    split: str = "train"
    completion_only: bool = False
    window: int | None = None
    reset_attention: bool | None = None
    separator_id: int | None = None


@contextmanager
def text_to_evaluate(
    student: str,
    cache: Cache | None,
    packed: Path | None,
    other: OtherText | None,
    *,
    tokenizer: Any,
    limit: int | None,
) -> Iterator[TextDataset]:
    """Give the windows to measure on.

    Args:
        student: name of the student, for the size of its vocabulary.
        cache: the cache that says how text is packed, if there is one.
        packed: a folder of packed text whose held-out windows are read.
        other: text to pack now, into a folder that is removed at the end; None for `packed`.
        tokenizer: needed for `other`.
        limit: largest number of windows.

    Raises:
        InvalidArgumentError: nothing is held out.
        CorpusError: the text cannot be read, or does not fill a window.
    """
    from sparselogits.corpus import PackedCorpus, open_source, pack
    from sparselogits.data import TextDataset
    from sparselogits.teacher.vocabulary import vocabulary_size

    if other is None:
        assert packed is not None
        windows = TextDataset(PackedCorpus.open(packed), limit=limit)
        if len(windows) == 0:
            raise InvalidArgumentError(
                f"{packed} holds no held-out windows: the cache was built without --holdout. Name "
                "other text to evaluate on (--data FILE), or build a cache with --holdout 0.05"
            )
        yield windows
        return
    source = open_source(
        other.data,
        text_field=other.text_field,
        split=other.split,
        completion_only=other.completion_only,
    )
    messages.print(source.in_words())
    vocab_size = vocabulary_size(student) or max(tokenizer.get_vocab().values()) + 1
    if cache is not None:
        vocab_size = max(vocab_size, cache.identity.vocab_size)
    with tempfile.TemporaryDirectory(prefix="sparselogits-eval-") as folder:
        with stage("packing text", "MB", per_unit=1e-6) as update:
            corpus = pack(
                source,
                tokenizer,
                _packing(other, cache, tokenizer),
                Path(folder) / "corpus",
                vocab_size=vocab_size,
                progress=update,
            )
        messages.print(corpus.in_words())
        yield TextDataset(corpus.held_out_whole(), limit=limit)


def _packing(other: OtherText, cache: Cache | None, tokenizer: Any) -> Any:
    from sparselogits.corpus import packing_for

    there = {} if cache is None else dict(cache.identity.packing)
    window = cache.identity.window_length if cache is not None else DEFAULT_WINDOW
    separator, reset = other.separator_id, other.reset_attention
    return packing_for(
        tokenizer,
        window_length=window if other.window is None else other.window,
        separator_id=there.get("separator_id") if separator is None else separator,
        reset_attention=bool(there.get("reset_attention")) if reset is None else reset,
    )


def tokenizer_of(names: list[str], student: str, *, purpose: str) -> Any:
    """Load the first tokenizer that can be read; it must be the student's, where that has one.

    Args:
        names: models or runs, the preferred one first.
        student: the student's name.
        purpose: what the tokenizer is needed for, for the error.

    Raises:
        TeacherError: none of them has a tokenizer that can be read.
        IdentityMismatchError: the student's own tokenizer gives other ids.
    """
    from sparselogits.teacher.loading import load_tokenizer

    found, reason = None, None
    for name in names:
        try:
            found = load_tokenizer(name)
            break
        except TeacherError as error:
            reason = reason or error
    if found is None:
        raise TeacherError(
            f"{purpose} needs the tokenizer, and {names[0]} has none that can be read; name the "
            "teacher's folder with --teacher or --tokenizer"
        ) from reason
    try:
        own = load_tokenizer(student)
    except TeacherError:
        return found  # a student without a tokenizer speaks the one it was trained with
    theirs = own.get_vocab()
    differing = [t for t, i in found.get_vocab().items() if theirs.get(t, i) != i]
    if differing:
        raise IdentityMismatchError(
            f"the student {student} has another tokenizer than the one named: {len(differing)} "
            f"tokens have other ids, {differing[0]!r} among them. Name the tokenizer that the "
            "student was trained with (--tokenizer)"
        )
    return found
