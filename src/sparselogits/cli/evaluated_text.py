"""Open the text for `sparselogits eval`: the held-out text of a cache, or another text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparselogits.cli.options import optional_tokenizer
from sparselogits.console import messages, stage
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError, TeacherError

if TYPE_CHECKING:
    from sparselogits.data import DraftVocabulary, TextDataset
    from sparselogits.store import Cache

DEFAULT_WINDOW = 1024
"""Tokens per window if neither an option nor a cache gives the window length."""


@dataclass(frozen=True)
class OtherText:
    """Text of `--data`, and values of the options by which it is read and packed.

    If `window`, `separator_id` or `reset_attention` is None, the setting of the cache is used.
    Without a cache, the defaults are `DEFAULT_WINDOW`, the tokenizer's separator, and no reset.
    """

    data: str
    window: int | None = None
    text_field: str = "text"
    split: str = "train"
    completion_only: bool = False
    reset_attention: bool | None = None
    separator_id: int | None = None
    tokenized_by: str | None = None
    join_rows: bool = False


@contextmanager
def text_to_evaluate(
    student: str,
    cache: Cache | None,
    packed: Path | None,
    other: OtherText | None,
    *,
    tokenizer: Any,
    limit: int | None,
    draft: DraftVocabulary | None = None,
) -> Iterator[TextDataset]:
    """Yield the windows to evaluate on.

    Args:
        student: name of the student.
        cache: cache whose packing settings and objective are used; None for the defaults.
        packed: folder of packed text whose held-out windows are used if `other` is None.
        other: text to pack into a temporary folder; None to use `packed`.
        tokenizer: tokenizer for `other`, and for a cache of a masked language model.
        limit: maximum number of windows; None for all.
        draft: draft vocabulary of the student; None for all ids.

    Raises:
        InvalidArgumentError: `packed` has no held-out windows, or the student is a masked language
            model and no cache is given.
    """
    from sparselogits.corpus import PackedCorpus, open_source, pack
    from sparselogits.corruption import Corruption
    from sparselogits.data import TextDataset
    from sparselogits.teacher.loading import names_masked_model
    from sparselogits.teacher.vocabulary import vocabulary_size

    corruption = None
    if cache is not None:
        corruption = Corruption.of_identity(cache.identity, tokenizer)
    elif names_masked_model(student):
        raise InvalidArgumentError(
            f"{student} is a masked language model, which is evaluated at masked tokens; a cache "
            "defines which tokens are masked, but none is given. Name a cache of the student's "
            "teacher with --cache"
        )
    if other is None:
        assert packed is not None
        corpus = PackedCorpus.open(packed)
        windows = TextDataset(corpus, limit=limit, corruption=corruption, draft=draft)
        if len(windows) == 0:
            raise InvalidArgumentError(
                f"{packed} has no held-out windows: the cache was built without --holdout. Name "
                "another text (--data FILE), or build a cache with --holdout 0.05"
            )
        yield windows
        return
    source = open_source(
        other.data,
        text_field=other.text_field,
        split=other.split,
        completion_only=other.completion_only,
        tokenized_by=optional_tokenizer(other.tokenized_by),
        join_rows=other.join_rows,
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
        whole = corpus.held_out_whole()
        yield TextDataset(whole, limit=limit, corruption=corruption, draft=draft)


def _packing(other: OtherText, cache: Cache | None, tokenizer: Any) -> Any:
    """Return the packing for a text; options take precedence over the settings of the cache."""
    from sparselogits.corpus import packing_for

    of_cache = {} if cache is None else dict(cache.identity.packing)
    window = cache.identity.window_length if cache is not None else DEFAULT_WINDOW
    separator, reset = other.separator_id, other.reset_attention
    return packing_for(
        tokenizer,
        window_length=window if other.window is None else other.window,
        separator_id=of_cache.get("separator_id") if separator is None else separator,
        reset_attention=bool(of_cache.get("reset_attention")) if reset is None else reset,
        kind=of_cache.get("kind", "joined"),
    )


def tokenizer_of(names: list[str], student: str, *, purpose: str) -> Any:
    """Load the first readable tokenizer, and check that it agrees with the student's tokenizer.

    Args:
        names: models or runs to load the tokenizer from, in order of preference.
        student: name of the student.
        purpose: option or kind of model that needs the tokenizer, for the error message.

    Raises:
        TeacherError: no tokenizer is readable.
        IdentityMismatchError: a token has another id in the student's tokenizer.
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
            f"{purpose} needs a tokenizer, but {names[0]} has no readable one; name a model that "
            "has one with --teacher or --tokenizer"
        ) from reason
    try:
        of_student = load_tokenizer(student).get_vocab()
    except TeacherError:
        return found  # a student saved without a tokenizer uses that of its training text
    differing = [t for t, i in found.get_vocab().items() if of_student.get(t, i) != i]
    if differing:
        raise IdentityMismatchError(
            f"the tokenizer of the student {student} differs from the named one: {len(differing)} "
            f"tokens have other ids, for example {differing[0]!r}. Name the tokenizer that the "
            "student was trained with (--tokenizer)"
        )
    return found
