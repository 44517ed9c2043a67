"""Mix the cached targets of several teachers that read one text.

At every position, target m is an unbiased estimate of the distribution p_m of teacher m, so their
weighted sum is an unbiased estimate of the mixture sum_m w_m p_m, whatever the weights of a window
depend on besides the draws (docs/theory.md, section 8).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from sparselogits.corpus import require_tokenizer
from sparselogits.corpus.tokenizer_identity import TokenizerFingerprint
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.identity import Identity, canonical_json, differing_fields
from sparselogits.samplers import from_parameters
from sparselogits.store import Cache, WindowRecord
from sparselogits.store.ranges import joined, ranges_in_words, spread
from sparselogits.store.texts import named_texts
from sparselogits.untrusted import shown

Weights = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Literal["best"]
"""Weights of several teachers.

A number per teacher; a row of such numbers per text of the caches, or per window; or "best", which
takes in each window the teacher with the lowest loss there.
"""
_COMPARED_WINDOWS = 8
_SHOWN_ROWS = 16
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Mixture:
    """The caches that a dataset reads, at least one, and the weights of their teachers.

    `Mixture.of` makes one. Every cache holds the same windows.

    Args:
        caches: the caches.
        rows: weights of the teachers, a row per run of windows; None to take in each window the
            teacher with the lowest loss there.
        starts: number of the first window of each row, ascending.
    """

    caches: tuple[Cache, ...]
    rows: tuple[tuple[float, ...], ...] | None
    starts: tuple[int, ...]

    @classmethod
    def of(cls, caches: Sequence[Cache], weights: Weights | None) -> Mixture:
        """Make a mixture, and validate that it has a meaning.

        Args:
            caches: the caches, which have windows.
            weights: see `Weights`; None for equal weights.

        Raises:
            InvalidArgumentError: weights are not shares of a whole, are of another number than the
                caches, or a cache is named twice.
            IdentityMismatchError: the caches differ in text, tokenizer, packing or temperature, or
                only some of them are unbiased.
        """
        first = caches[0]
        for place, cache in enumerate(caches[1:], 1):
            for other in caches[:place]:
                if other.identity.fingerprint == cache.identity.fingerprint:
                    raise InvalidArgumentError(
                        f"the caches at {other.root} and {cache.root} hold the same targets (one "
                        "fingerprint); name each cache once. Two draws of one teacher can be mixed "
                        "if they were cached with different seeds (--seed)"
                    )
            _require_same_settings(first, cache)
            _require_same_text(first, cache)
        rows, starts = _weights_of(caches, weights)
        return cls(tuple(caches), rows, starts)

    @property
    def identity(self) -> Identity:
        """Identity of the cache, or of the mixture: its fingerprint covers caches and weights."""
        if len(self.caches) == 1:
            return self.caches[0].identity
        made_of = [cache.identity for cache in self.caches]
        weighted: Any = "best"
        if self.rows is not None:
            weighted = {"rows": self.rows, "starts": self.starts}
            if len(self.rows) > _SHOWN_ROWS:
                weighted = _sha256(weighted)
        names = [one.teacher_in_words() for one in made_of]
        if self.rows is not None and len(self.rows) == 1:
            names = [f"{w:g} x {name}" for w, name in zip(self.rows[0], names, strict=True)]
        made_from = {"caches": [one.fingerprint for one in made_of], "weighted": weighted}
        dtypes = sorted({str(one.teacher.get("dtype")) for one in made_of})
        return replace(
            made_of[0],
            teacher={
                "name": ", ".join(names),
                "weights": _sha256([one.teacher.get("weights") for one in made_of]),
                "dtype": " and ".join(dtypes),
                "mixture": made_from,
            },
            vocab_size=max(one.vocab_size for one in made_of),
            token_mask="mixture",
            sampler={"name": "mixture", "samplers": [dict(one.sampler) for one in made_of]},
            codec={"name": "mixture"},
        )

    @property
    def unbiased(self) -> bool:
        """Whether the targets are unbiased; all caches agree on it."""
        return from_parameters(self.caches[0].identity.sampler).unbiased

    @property
    def rounds(self) -> int | None:
        """Most rounds that a window has, over its teachers; None if a cache is not in rounds."""
        held = [from_parameters(cache.identity.sampler).rounds for cache in self.caches]
        known = [rounds for rounds in held if rounds is not None]
        if len(known) < len(held):
            return None
        if self.rows is None:
            return max(known)
        return max(sum(n for n, w in zip(known, row, strict=True) if w > 0) for row in self.rows)

    @property
    def teachers_per_window(self) -> int:
        """Most teachers that a window mixes."""
        if self.rows is None:
            return 1
        return max(sum(w > 0 for w in row) for row in self.rows)

    def read(self, i: int) -> list[tuple[float, WindowRecord]]:
        """Return the records of the i-th window that have a weight, each with its weight.

        Raises:
            CacheCorruptionError: a cache is damaged; names the file.
            IdentityMismatchError: the caches hold different text in this window.
        """
        first = self.caches[0].read(i)
        records = [first]
        for cache in self.caches[1:]:
            records.append(cache.read(i))
            _require_same_window(self.caches[0], first, cache, records[-1])
        if self.rows is None:
            return [(1.0, min(records, key=lambda record: record.teacher_loss))]
        row = self.rows[bisect_right(self.starts, first.window_index) - 1]
        return [(w, record) for w, record in zip(row, records, strict=True) if w > 0]


@lru_cache(maxsize=1024)
def divided(rounds: int, weights: tuple[float, ...], held: tuple[int, ...]) -> tuple[int, ...]:
    """Divide a number of rounds over the teachers of a window.

    Every teacher gets one, and each further round goes where it reduces sum_m w_m^2 / n_m most,
    which is the mixture's variance if all teachers' rounds vary alike: about n_m = rounds * w_m.
    A teacher gives at most what it has.

    Args:
        rounds: rounds per position in all.
        weights: weights of the teachers, all positive.
        held: cached rounds of each teacher.

    Raises:
        InvalidArgumentError: there are fewer rounds than teachers.

    Examples:
        >>> divided(12, (0.75, 0.25), (50, 50))
        (9, 3)
        >>> divided(12, (0.75, 0.25), (8, 50))
        (8, 4)
    """
    if len(weights) == 1:
        return (rounds,)
    if rounds < len(weights):
        raise InvalidArgumentError(
            f"rounds={rounds}: a window mixes {len(weights)} teachers, and each of them needs a "
            f"round; keep at least {len(weights)} rounds"
        )
    given = [1] * len(weights)
    for _ in range(min(rounds, sum(held)) - len(weights)):
        gains = [
            w * w / (n * (n + 1)) if n < most else -1.0
            for w, n, most in zip(weights, given, held, strict=True)
        ]
        given[gains.index(max(gains))] += 1
    return tuple(given)


def _weights_of(
    caches: Sequence[Cache], weights: Weights | None
) -> tuple[tuple[tuple[float, ...], ...] | None, tuple[int, ...]]:
    """Return rows of weights and the first window of each; no rows for "best"."""
    count = len(caches)
    if weights is None:
        return ((1 / count,) * count,), (0,)
    if isinstance(weights, str):
        if weights != "best":
            raise InvalidArgumentError(
                f"unknown weights {shown(weights)}; give a number per cache, a row of numbers per "
                'text or per window, or "best" for the teacher with the lowest loss per window'
            )
        return None, ()
    try:
        table = np.array(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"weights are {shown(weights)}; expected a number per cache, or rows of equal length"
        ) from error
    if table.ndim not in (1, 2) or table.shape[-1] != count:
        raise InvalidArgumentError(
            f"weights have the shape {table.shape}, and there are {count} caches; give a weight "
            "per cache, or rows of such weights"
        )
    rows = np.atleast_2d(table)
    sums = rows.sum(1)
    good = (np.isfinite(rows) & (rows >= 0)).all(1) & (abs(sums - 1) <= _TOLERANCE)
    if not good.all():
        found = rows[int((~good).argmax())].tolist()
        raise InvalidArgumentError(
            f"weights must be non-negative numbers whose sum is 1, found {shown(found)} with the "
            f"sum {math.fsum(found):g}; divide them by their sum"
        )
    exact = tuple(tuple(row) for row in (rows / sums[:, None]).tolist())
    return exact, _starts(caches[0], len(rows)) if table.ndim == 2 else (0,)


def _starts(cache: Cache, rows: int) -> tuple[int, ...]:
    """Return the first window of each row: of each text if there are as many, or every window."""
    texts = named_texts(cache.storage)
    if rows == len(texts):
        return (0, *(text.first_window for text in texts[1:]))
    if rows == len(cache):
        return tuple(i for start, stop in cache.ranges for i in range(start, stop))
    raise InvalidArgumentError(
        f"weights have {rows} rows; expected {len(texts)}, a row per text of the cache at "
        f"{cache.root} in the order in which they were added, or {len(cache)}, a row per window"
    )


def _require_same_settings(one: Cache, other: Cache) -> None:
    """Validate that two caches agree in everything that a mixture needs.

    Raises:
        IdentityMismatchError: names the fields in which they differ.
    """
    names = ("window_length", "packing", "temperature", "objective")
    here, there = (
        {name: getattr(cache.identity, name) for name in names}
        | {"unbiased": from_parameters(cache.identity.sampler).unbiased}
        for cache in (one, other)
    )
    found = "; ".join(
        f"{name} is {shown(a)} in {one.root} and {shown(b)} in {other.root}"
        for name, a, b in differing_fields(here, there)
    )
    if found:
        raise IdentityMismatchError(
            f"these caches cannot be mixed: {found}. Build one of them again with the settings of "
            "the other"
        )
    mine, theirs = (_recorded(cache) for cache in (one, other))
    if theirs["ids"] and mine["ids"] == theirs["ids"] and mine["added"] == theirs["added"]:
        return  # thousands of added tokens are recorded as a hash
    require_tokenizer(
        TokenizerFingerprint(
            other.identity.tokenizer,
            theirs["ids"],
            theirs["added"] if isinstance(theirs["added"], dict) else {},
            theirs["roles"],
        ),
        one.identity.tokenizer,
        one.recorded_tokenizer(),
        whose=f"the tokenizer of the cache at {other.root}",
        origin=f"the cache at {one.root}",
    )


def _recorded(cache: Cache) -> dict[str, Any]:
    """Return what a cache records of its tokenizer; the values come from a file and may be any."""
    found = cache.recorded_tokenizer()
    told = found if isinstance(found, dict) else {}
    ids, roles = told.get("ids"), told.get("roles")
    return {
        "ids": ids if isinstance(ids, str) else "",
        "added": told.get("added"),
        "roles": roles if isinstance(roles, dict) else {},
    }


def _require_same_text(one: Cache, other: Cache) -> None:
    """Validate that two caches hold the same windows, and the same text in some of them.

    The other windows are compared when they are read.
    """
    here, there = joined(one.ranges), joined(other.ranges)
    if here != there:
        raise IdentityMismatchError(
            f"these caches cannot be mixed: {one.root} holds the windows "
            f"{ranges_in_words(here)}, and {other.root} {ranges_in_words(there)}. Finish both with "
            "the same text (`sparselogits cache` resumes)"
        )
    for i in spread(len(one), _COMPARED_WINDOWS):
        _require_same_window(one, one.read(i), other, other.read(i))


def _require_same_window(one: Cache, here: WindowRecord, other: Cache, there: WindowRecord) -> None:
    what = "text"
    if np.array_equal(here.tokens, there.tokens):
        what = "documents"
        if np.array_equal(here.document_starts, there.document_starts):
            what = "loss mask"
            if np.array_equal(here.present(), there.present()):
                return
    raise IdentityMismatchError(
        f"these caches cannot be mixed: window {here.window_index} has a different {what} in "
        f"{one.root} and {other.root}. Build both caches from the same text"
    )


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()
