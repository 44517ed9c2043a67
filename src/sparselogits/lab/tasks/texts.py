"""Select passages of held-out text, and create the questions of two tasks from the passages.

Only held-out windows are used, because students are trained on the others. A window is divided
where documents start, and decoded. The first and the last word of each part are dropped, because a
window may begin or end within a word. Passages have the same number of words and do not overlap.
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
"""Number of words per passage; three quarters of the mean number per window if that is less."""
ENDINGS = 4
"""Number of endings per question, one of which is true."""
_FEWEST_WORDS = 4  # the last quarter of a passage has at least one word
_WINDOWS_PER_ITEM = 2  # limits how many windows of a large hold-out are decoded
_REPLACEMENT = "\ufffd"  # decoding an incomplete character gives this one
_LAST_WORD = re.compile(r"([^\W\d_]{3,})\W*")


@dataclass(frozen=True)
class Passage:
    """Consecutive words of one document.

    Args:
        window: index of the held-out window.
        text: text from the first to the last word.
        words: range (start, stop) of each word in the text, in characters.
    """

    window: int
    text: str
    words: tuple[tuple[int, int], ...]


def passages(corpus: PackedCorpus, tokenizer: Any, count: int) -> list[Passage]:
    """Return passages that do not overlap, spread over the held-out windows.

    Args:
        corpus: corpus with held-out windows.
        tokenizer: transformers tokenizer that the corpus was packed with.
        count: largest number of passages.

    Raises:
        TaskError: If `count` is less than 1, there are no held-out windows, or they have too few
            words on average.
    """
    if count < 1:
        raise TaskError(f"found count={count}; expected at least 1 passage; give a larger number")
    available = corpus.holdout_windows
    if not available:
        raise TaskError(
            f"the corpus at {corpus.folder} has no held-out text, and a score on text that a "
            "student was trained on is meaningless; pack the text with --holdout"
        )
    chosen = spread(available, _WINDOWS_PER_ITEM * count)
    parts = [
        (index, text)
        for index in chosen
        for text in _document_texts(corpus.read_holdout(index, index + 1)[0], corpus, tokenizer)
    ]
    words = sum(len(_words(text)) for _, text in parts)
    mean = words / len(chosen)
    length = min(PASSAGE_WORDS, round(0.75 * mean))
    if length < _FEWEST_WORDS:
        raise TaskError(
            f"held-out windows of {corpus.packing.window_length} tokens contain {mean:.1f} words "
            "on average, too few for a passage; pack longer windows (--window)"
        )
    found = [passage for index, text in parts for passage in _divide(index, text, length)]
    return [found[i] for i in spread(len(found), count)]


def continuations(found: Sequence[Passage], *, seed: int = 0) -> list[dict[str, Any]]:
    """Create a question per passage: which of four endings continues the beginning.

    The true ending is the last quarter (rounded down) of the passage's words; the other three are
    the last quarters of passages of other windows.

    Args:
        found: result of `passages`.
        seed: random seed for the choice of the other endings and the order of the four.

    Returns:
        Rows with `prefix`, `endings` (four) and `label` (index of the true ending).

    Raises:
        TaskError: If, for a passage, the passages of other windows have fewer than three different
            endings that are not the true one.
    """
    rng = random.Random(f"continuation {seed}")
    divided = [_prefix_and_ending(passage) for passage in found]
    rows = []
    for passage, (prefix, ending) in zip(found, divided, strict=True):
        others = {
            other_ending
            for other, (_, other_ending) in zip(found, divided, strict=True)
            if other.window != passage.window and other_ending != ending
        }
        if len(others) < ENDINGS - 1:
            raise TaskError(
                f"the held-out text has {len(found)} passages, but an item needs the endings of "
                "three passages of other windows; hold out more text (--holdout)"
            )
        endings = [ending, *rng.sample(sorted(others), ENDINGS - 1)]
        rng.shuffle(endings)
        rows.append({"prefix": prefix, "endings": endings, "label": endings.index(ending)})
    return rows


def last_words(found: Sequence[Passage]) -> list[dict[str, Any]]:
    """Create a question per passage: predict the last word of three letters or more.

    The word may only have letters and, after these, punctuation, which is removed. A passage
    without such a word in its second half is skipped.

    Args:
        found: result of `passages`.

    Returns:
        Rows with `passage` (the text before the word) and `word`.

    Raises:
        TaskError: If all passages are skipped.
    """
    rows = []
    for passage in found:
        for start, stop in reversed(passage.words[len(passage.words) // 2 :]):
            word = _LAST_WORD.fullmatch(passage.text[start:stop])
            if word is not None:
                rows.append({"passage": passage.text[:start].rstrip(), "word": word[1]})
                break
    if not rows:
        raise TaskError(
            f"none of {len(found)} held-out passages has a word of three letters or more in its "
            "second half; use the task last_word with prose, or leave it out"
        )
    return rows


def _document_texts(window: Window, corpus: PackedCorpus, tokenizer: Any) -> Iterator[str]:
    """Yield the text, possibly empty, of each document in a window, without special tokens."""
    packing = corpus.packing
    marks = (packing.separator_id, packing.bos_id, packing.padding_id)
    separators = [mark for mark in marks if mark is not None]
    for tokens in np.split(window.tokens, window.document_starts):
        text_tokens = tokens[~np.isin(tokens, separators)]
        yield tokenizer.decode(
            text_tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _words(text: str) -> list[tuple[int, int]]:
    """Return the ranges of all words but the first and the last, in characters."""
    return [match.span() for match in re.finditer(r"\S+", text)][1:-1]


def _divide(window: int, text: str, length: int) -> Iterator[Passage]:
    """Yield consecutive passages of `length` words of a document's text.

    Passages with incompletely decoded characters are left out, and so are words after the last
    passage.
    """
    words = _words(text)
    for first in range(0, len(words) - length + 1, length):
        chosen = words[first : first + length]
        start, stop = chosen[0][0], chosen[-1][1]
        if _REPLACEMENT not in text[start:stop]:
            spans = tuple((a - start, b - start) for a, b in chosen)
            yield Passage(window, text[start:stop], spans)


def _prefix_and_ending(passage: Passage) -> tuple[str, str]:
    start = passage.words[-(len(passage.words) // ENDINGS)][0]
    return passage.text[:start].rstrip(), passage.text[start:]
