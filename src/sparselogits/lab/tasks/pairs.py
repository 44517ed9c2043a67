"""Generate English minimal pairs by a small grammar, as BLiMP does (Warstadt et al. 2020).

The two sentences of a pair differ in one word, which makes one of them ungrammatical. Singular and
plural alternate in each phenomenon, so a model that always prefers one form of a word is right in
about half of the pairs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from sparselogits.errors import TaskError

MOST = 3000
"""Largest number of pairs; each phenomenon has more than a third as many distinct pairs."""

_Words = tuple[tuple[str, str], ...]
"""Pairs of the singular and the plural form of a word."""

_NOUNS: _Words = (
    *(("man", "men"), ("woman", "women"), ("child", "children"), ("boy", "boys")),
    *(("girl", "girls"), ("friend", "friends"), ("doctor", "doctors"), ("sister", "sisters")),
    *(("brother", "brothers"), ("king", "kings"), ("soldier", "soldiers"), ("lady", "ladies")),
    *(("servant", "servants"), ("stranger", "strangers"), ("teacher", "teachers")),
    *(("writer", "writers"), ("dog", "dogs"), ("horse", "horses"), ("bird", "birds")),
)
_PLACES: _Words = (
    *(("house", "houses"), ("table", "tables"), ("window", "windows"), ("tree", "trees")),
    *(("door", "doors"), ("river", "rivers"), ("ship", "ships"), ("garden", "gardens")),
)
_THINGS: _Words = (
    *(("book", "books"), ("letter", "letters"), ("picture", "pictures"), ("room", "rooms")),
    *(("question", "questions"), ("story", "stories"), ("song", "songs"), ("word", "words")),
)
_VERBS: _Words = (
    *(("was", "were"), ("is", "are"), ("has been", "have been"), ("seems", "seem")),
    *(("looks", "look"), ("remains", "remain")),
)
_STATES = ("old", "happy", "young", "quiet", "ready", "very tired", "afraid", "alone")
_DETERMINERS: _Words = (("this", "these"), ("that", "those"))
_SUBJECTS = ("he", "she", "they", "the man", "the woman", "the children")
_SAW = ("saw", "liked", "remembered", "found", "wanted")
_BESIDE = ("near", "behind", "beside")


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in one word.

    Args:
        phenomenon: name of the grammatical phenomenon.
        good: the grammatical sentence.
        bad: the ungrammatical sentence.
    """

    phenomenon: str
    good: str
    bad: str


def minimal_pairs(count: int, *, seed: int = 0) -> list[Pair]:
    """Generate distinct pairs, cycling through the phenomena and through singular and plural.

    The phenomena are `subject_verb` (The boys are / is quiet.), `subject_verb_attractor` (The boys
    near the tree are / is quiet.) and `determiner_noun` (She saw these / this boys.).

    Args:
        count: number of pairs, at most `MOST`.
        seed: random seed for the words.

    Raises:
        TaskError: If `count` is out of range.
    """
    if not 0 <= count <= MOST:
        raise TaskError(
            f"count={count}: the task agreement has at most {MOST} pairs; give 0 to {MOST}"
        )
    rng = random.Random(f"pairs {seed}")
    turns = itertools.cycle(itertools.product(_PHENOMENA, (0, 1)))
    found: dict[str, Pair] = {}
    while len(found) < count:
        generate, number = next(turns)
        pair = generate(rng, number)
        while pair.good in found:
            pair = generate(rng, number)
        found[pair.good] = pair
    return list(found.values())


def _subject_verb(rng: random.Random, number: int) -> Pair:
    noun = rng.choice(_NOUNS)[number]
    return _verb_pair("subject_verb", f"The {noun}", rng, number)


def _attractor(rng: random.Random, number: int) -> Pair:
    noun, other = rng.choice(_NOUNS)[number], rng.choice(_PLACES)[1 - number]
    subject = f"The {noun} {rng.choice(_BESIDE)} the {other}"
    return _verb_pair("subject_verb_attractor", subject, rng, number)


def _verb_pair(phenomenon: str, subject: str, rng: random.Random, number: int) -> Pair:
    verb, state = rng.choice(_VERBS), rng.choice(_STATES)
    good, bad = (f"{subject} {verb[form]} {state}." for form in (number, 1 - number))
    return Pair(phenomenon, good, bad)


def _determiner_noun(rng: random.Random, number: int) -> Pair:
    determiner, noun = rng.choice(_DETERMINERS), rng.choice(_NOUNS + _THINGS)[number]
    who, saw = rng.choice(_SUBJECTS).capitalize(), rng.choice(_SAW)
    good, bad = (f"{who} {saw} {determiner[form]} {noun}." for form in (number, 1 - number))
    return Pair("determiner_noun", good, bad)


_PHENOMENA: tuple[Callable[[random.Random, int], Pair], ...] = (
    _subject_verb,
    _attractor,
    _determiner_noun,
)
