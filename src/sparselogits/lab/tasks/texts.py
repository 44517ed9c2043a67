"""Cut passages from held-out text, and make the questions of two tasks from them.

Only held-out windows are read, so no student was trained on them. A window is cut at its document
separators and decoded; the first and the last word of each piece are dropped, because a window's
edge may cut through them. Passages are disjoint, and all of a corpus are equally long.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparselogits.corpus import PackedCorpus
from sparselogits.corpus.windows import Window
from sparselogits.errors import TaskError
from sparselogits.store.ranges import spread

PASSAGE_WORDS = 32
"""Maximum words per passage; in short windows, a passage has three quarters of the words."""
ENDINGS = 4
_FEWEST_WORDS = 4  # so that its last quarter is one
_WINDOWS_AN_ITEM = 2  # read at most, so that a large hold-out is not decoded whole
_LOST = "\ufffd"  # what decoding makes of half a character
_LAST_WORD = re.compile(r"([^\W\d_]{3,})\W*")


@dataclass(frozen=True)
class Passage:
    """A run of words of one document.

    Args:
        window: number of the held-out window.
        text: text from the first to the last word.
        words: (start, stop) of each word in the text, in characters.
    """

    window: int
    text: str
    words: tuple[tuple[int, int], ...]


def passages(corpus: PackedCorpus, tokenizer: Any, count: int) -> list[Passage]:
    """Return disjoint passages, spread evenly over the held-out windows.

    Args:
        corpus: corpus that the students are trained on, with held-out windows.
        tokenizer: tokenizer of the teacher.
        count: largest number of passages.

    Raises:
        TaskError: there are no held-out windows, or they are too short.
    """
    available = corpus.holdout_windows
    if not available:
        raise TaskError(
            f"the corpus at {corpus.folder} has no held-out text, and a score on text that a "
            "student was trained on is meaningless; pack it with --holdout"
        )
    chosen = spread(available, _WINDOWS_AN_ITEM * count)
    pieces = [
        (index, text)
        for index in chosen
        for text in _pieces(corpus.read_holdout(index, index + 1)[0], corpus, tokenizer)
    ]
    words = sum(len(_words(text)) for _, text in pieces)
    mean = words / len(chosen)
    length = min(PASSAGE_WORDS, round(0.75 * mean))
    if length < _FEWEST_WORDS:
        raise TaskError(
            f"held-out windows of {corpus.packing.window_length} tokens hold {mean:.1f} words on "
            "average, too few for a passage; pack longer windows (--window)"
        )
    found = [own for index, text in pieces for own in _cut(index, text, length)]
    return [found[i] for i in spread(len(found), count)]


def continuations(found: Sequence[Passage], *, seed: int = 0) -> list[dict[str, Any]]:
    """Return for each passage its beginning, and four endings of which one is the true one.

    The true ending is the last quarter of the words; the others are the last quarters of passages
    of other windows. The seed determines these and the order of the four.

    Args:
        found: see `passages`.
        seed: random seed for the other endings and the order.

    Returns:
        Rows with `prefix`, `endings` (four) and `label` (index of the true one).

    Raises:
        TaskError: other windows have fewer than three other endings.
    """
    rng = random.Random(f"continuation {seed}")
    halves = [_divided(own) for own in found]
    rows = []
    for own, (prefix, ending) in zip(found, halves, strict=True):
        elsewhere = {
            span
            for other, (_, span) in zip(found, halves, strict=True)
            if other.window != own.window and span != ending
        }
        if len(elsewhere) < ENDINGS - 1:
            raise TaskError(
                f"the held-out text holds {len(found)} passages, too few for a continuation "
                "and three others from other windows; hold out more text (--holdout)"
            )
        endings = [ending, *rng.sample(sorted(elsewhere), ENDINGS - 1)]
        rng.shuffle(endings)
        rows.append({"prefix": prefix, "endings": endings, "label": endings.index(ending)})
    return rows


def last_words(found: Sequence[Passage]) -> list[dict[str, Any]]:
    """Return for each passage its last word of three letters or more, and the text before it.

    Args:
        found: see `passages`.

    Returns:
        Rows with `passage` and `word`. A passage without such a word in its second half is skipped.

    Raises:
        TaskError: no passage has such a word.
    """
    rows = []
    for own in found:
        for start, stop in reversed(own.words[len(own.words) // 2 :]):
            word = _LAST_WORD.fullmatch(own.text[start:stop])
            if word is not None:
                rows.append({"passage": own.text[:start].rstrip(), "word": word[1]})
                break
    if not rows:
        raise TaskError(
            "the held-out text has no words of letters; use the task last_word with prose only"
        )
    return rows


def _pieces(window: Window, corpus: PackedCorpus, tokenizer: Any) -> Iterator[str]:
    """Return the text of each document in a window, without separators."""
    marks = [own for own in (corpus.packing.separator_id, corpus.packing.bos_id) if own is not None]
    for tokens in np.split(window.tokens, window.document_starts):
        kept = tokens[~np.isin(tokens, marks)]
        yield tokenizer.decode(
            kept.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _words(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)][1:-1]


def _cut(window: int, text: str, length: int) -> Iterator[Passage]:
    words = _words(text)
    for first in range(0, len(words) - length + 1, length):
        own = words[first : first + length]
        start, stop = own[0][0], own[-1][1]
        if _LOST not in text[start:stop]:
            spans = tuple((a - start, b - start) for a, b in own)
            yield Passage(window, text[start:stop], spans)


def _divided(own: Passage) -> tuple[str, str]:
    start = own.words[-(len(own.words) // ENDINGS)][0]
    return own.text[:start].rstrip(), own.text[start:]
