"""Measure the bias of retokenized targets, by brute force on vocabularies of a few tokens.

    python experiments/pushforward_bias.py --out experiments/results/pushforward_bias.json

A teacher is a random Markov chain over six byte strings; its student has another vocabulary
of such strings. Texts are drawn from the teacher. At each boundary that both tokenisations share,
the distribution of the student's next token is computed by enumerating the teacher's continuations,
and compared with the expectation of the cached target: with every drawn token mapped by itself
(followed 0), and with the draws of the text's own token continued (followed 1, 2 and 3). Writes the
means of each pair and over all positions; docs/theory.md, section 10, has the latter. Takes less
than a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sparselogits.caching.pushforward import Aligned, Retokenizer  # noqa: E402
from sparselogits.corpus.token_bytes import TokenBytes  # noqa: E402

AHEAD = 4  # teacher tokens by which continuations are enumerated
FOLLOWED = (0, 1, 2, 3)
LETTERS = "ab "


def tokenizer_of(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with these tokens, whose ids are their places.

    Every token of more than one character must be the concatenation of two earlier ones.
    """
    mark = str.maketrans({" ": "\u0120"})
    names = [token.translate(mark) for token in tokens]
    merges = []
    for place, name in enumerate(names):
        if len(name) > 1:
            cut = next(i for i in range(1, len(name)) if {name[:i], name[i:]} <= set(names[:place]))
            merges.append((name[:cut], name[cut:]))
    backend = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def first_token(student: TokenBytes, data: bytes) -> int:
    """Return the first token of the student's tokenisation of a text."""
    return int(student.encode([data.decode()], [False])[0].ids[0])


class Chain:
    """Teacher whose next token depends only on the last one, with exact probabilities.

    Args:
        tokens: tokens of the teacher.
        seed: random seed of the transition probabilities.
    """

    def __init__(self, tokens: Sequence[str], seed: int) -> None:
        self.tokens = [token.encode() for token in tokens]
        weights = np.random.default_rng(seed).integers(0, 9, (len(tokens), len(tokens))) ** 2 + 1
        self._table = [[Fraction(int(w), int(row.sum())) for w in row] for row in weights]

    def after(self, token: int) -> list[Fraction]:
        """Return the probabilities of the tokens that follow a token."""
        return self._table[token]

    def text(self, length: int, seed: int) -> list[int]:
        """Draw a text."""
        generator, drawn = np.random.default_rng(seed), [0]
        while len(drawn) < length:
            p = [float(own) for own in self.after(drawn[-1])]
            drawn.append(int(generator.choice(len(p), p=p)))
        return drawn


Image = dict[int, float]


def _add(image: Image, token: int, probability: float) -> None:
    image[token] = image.get(token, 0.0) + probability


def followed_image(
    chain: Chain, convert: Retokenizer, aligned: Aligned, text: Sequence[int], place: int
) -> Image:
    """Return the expectation of the mapped target, from its definition in docs/theory.md."""
    image: Image = {}
    at, label = int(aligned.source[place]), int(aligned.tokens[place + 1])
    prefix, reached = b"", 1.0
    for level in range(convert.followed + 1):
        true = text[at + 1]
        for token, p in enumerate(chain.after(text[at])):
            if token != true:
                data = prefix + chain.tokens[token]
                _add(image, first_token(convert.student, data), reached * float(p))
        reached *= float(chain.after(text[at])[true])
        prefix += chain.tokens[true]
        at += 1
        settled = aligned.ends[at] > aligned.closed[place] or at + 1 >= len(text)
        if level == convert.followed or settled:
            alone = convert.followed == 0
            _add(image, first_token(convert.student, prefix) if alone else label, reached)
            break
    return image


def full_image(
    chain: Chain, convert: Retokenizer, aligned: Aligned, text: Sequence[int], place: int
) -> Image:
    """Return the distribution of the student's first token over the teacher's continuations."""
    image: Image = {}

    def visit(last: int, data: bytes, probability: float, left: int) -> None:
        if not left:
            _add(image, first_token(convert.student, data), probability)
            return
        for token, p in enumerate(chain.after(last)):
            visit(token, data + chain.tokens[token], probability * float(p), left - 1)

    visit(text[int(aligned.source[place])], b"", 1.0, AHEAD)
    return image


def bounds(
    chain: Chain, convert: Retokenizer, aligned: Aligned, text: Sequence[int], place: int
) -> float:
    """Return the probability that the image of a draw is not the student's token of its text."""
    at, label = int(aligned.source[place]), int(aligned.tokens[place + 1])
    total = 0.0

    def changed(last: int, data: bytes, image: int, left: int) -> float:
        """Return the probability that the first token of the continued text is not `image`."""
        if not left:
            return float(first_token(convert.student, data) != image)
        return sum(
            float(p) * changed(token, data + chain.tokens[token], image, left - 1)
            for token, p in enumerate(chain.after(last))
        )

    prefix, reached = b"", 1.0
    for level in range(convert.followed + 1):
        true = text[at + 1]
        left = AHEAD - level - 1
        for token, p in enumerate(chain.after(text[at])):
            if token != true:
                data = prefix + chain.tokens[token]
                image = first_token(convert.student, data)
                total += reached * float(p) * changed(token, data, image, left)
        reached *= float(chain.after(text[at])[true])
        prefix += chain.tokens[true]
        at += 1
        settled = aligned.ends[at] > aligned.closed[place] or at + 1 >= len(text)
        if level == convert.followed or settled or not left:
            image = first_token(convert.student, prefix) if convert.followed == 0 else label
            return total + reached * changed(true, prefix, image, left)
    return total


@dataclass(frozen=True)
class Measured:
    """Means over the shared boundaries of a text.

    Args:
        followed: number of tokens of the text by which draws are continued.
        positions: number of positions.
        bias: total variation between the expectation of the target and the true distribution.
        bound: bound on it, the probability that a draw's image is not the token of its text.
        mean_bytes: expected length of the target's token in bytes.
        true_bytes: expected length of the student's token under the true distribution.
    """

    followed: int
    positions: int
    bias: float
    bound: float
    mean_bytes: float
    true_bytes: float


@dataclass(frozen=True, eq=False)
class Pair:
    """Teacher, student and a text of the teacher.

    Args:
        chain: the teacher.
        teacher: tokens of the teacher.
        student: tokens of the student.
        text: tokens of the text.
    """

    chain: Chain
    teacher: TokenBytes
    student: TokenBytes
    text: list[int]

    @cached_property
    def converts(self) -> dict[int, Retokenizer]:
        """Conversions by the number of tokens that are followed."""
        return {n: Retokenizer(self.teacher, self.student, {}, followed=n) for n in FOLLOWED}

    @cached_property
    def _full(self) -> dict[int, Image]:
        return {}

    def measured(self, followed: int) -> Measured:
        """Measure the mapped targets at the shared boundaries of the first half of the text."""
        convert = self.converts[followed]
        aligned = convert.align(self.text, [])
        usable = np.flatnonzero((aligned.source >= 0) & (aligned.source < len(self.text) // 2))
        sums = np.zeros(4)
        for place in usable.tolist():
            given = self.chain, convert, aligned, self.text, place
            if place not in self._full:
                self._full[place] = full_image(*given)
            full, made = self._full[place], followed_image(*given)
            distance = sum(abs(full.get(i, 0) - made.get(i, 0)) for i in full.keys() | made) / 2
            lengths = [
                sum(p * len(self.student.bytes_of[i]) for i, p in image.items())
                for image in (made, full)
            ]
            sums += [float(own) for own in (distance, bounds(*given), *lengths)]
        means = (sums / max(1, len(usable))).tolist()
        return Measured(followed, len(usable), *means)


def vocabulary(size: int, generator: np.random.Generator) -> list[str]:
    """Return a random vocabulary: the letters, and concatenations of two earlier tokens."""
    tokens = list(LETTERS)
    while len(tokens) < size:
        one, two = (tokens[i] for i in generator.integers(0, len(tokens), 2))
        inside = " " in (one + two)[1:]  # tokens do not cross a space, as in real tokenizers
        if not inside and one + two not in tokens and len(one + two) <= 4:
            tokens.append(one + two)
    return tokens


def pairs(count: int, length: int = 16) -> list[Pair]:
    """Return pairs of a teacher and a student, with a text each."""
    found = []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        theirs, ours = vocabulary(6, generator), vocabulary(8, generator)
        chain = Chain(theirs, seed)
        texts = chain.text(length, seed)
        found.append(
            Pair(chain, TokenBytes(tokenizer_of(theirs)), TokenBytes(tokenizer_of(ours)), texts)
        )
    return found


def means(rows: Sequence[dict[str, Any]], followed: int) -> dict[str, float]:
    """Return the means over the positions of all pairs.

    Args:
        rows: values of `Measured` per pair and number of tokens that are followed.
        followed: number of tokens that are followed.
    """
    own = [row for row in rows if row["followed"] == followed and row["positions"]]
    count = sum(row["positions"] for row in own)
    names = ("bias", "bound", "mean_bytes", "true_bytes")
    return {name: sum(row[name] * row["positions"] for row in own) / count for name in names}


def rows_of(seed: int, pair: Pair) -> list[dict[str, Any]]:
    """Return the values of `Measured` of one pair, a row per number of tokens that are followed."""
    return [{"pair": seed, **asdict(pair.measured(followed))} for followed in FOLLOWED]


def main() -> None:
    """Measure twenty pairs, and write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file for the results; printed if absent")
    out = parser.parse_args().out
    rows = [row for seed, pair in enumerate(pairs(count=20)) for row in rows_of(seed, pair)]
    results = {
        "ahead": AHEAD,
        "means": {str(followed): means(rows, followed) for followed in FOLLOWED},
        "rows": rows,
    }
    text = json.dumps(results, indent=1) + "\n"
    print(text) if out is None else out.write_text(text)


if __name__ == "__main__":
    main()
