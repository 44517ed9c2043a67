"""Mix the cached targets of several teachers for one text.

If the target of every teacher m is an unbiased estimate of the teacher's distribution p_m, the
weighted sum of the targets is an unbiased estimate of the mixture sum_m w_m p_m, for any weights
that do not depend on the sampled targets (docs/theory.md, section 8).
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
from sparselogits.data.thinning import require_round_each
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.identity import Identity, canonical_json, differing_fields
from sparselogits.samplers import from_parameters
from sparselogits.store import Cache, WindowRecord
from sparselogits.store.ranges import joined, ranges_in_words, spread
from sparselogits.store.texts import named_texts
from sparselogits.untrusted import shown
from sparselogits.wording import counted

Weights = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Literal["best"]
"""Weights of several teachers: one number per teacher, or one row of such numbers per text or per
window, or "best" for the teacher with the lowest loss in each window."""

_COMPARED_WINDOWS = 8  # windows whose text is compared when a mixture is created
_SHOWN_ROWS = 16  # largest number of rows that an identity contains, instead of their hash
_TOLERANCE = 1e-6  # for the sum of weights


@dataclass(frozen=True)
class Mixture:
    """One or more caches with the same windows, and the weights of their teachers.

    `Mixture.of` creates and validates a mixture.

    Args:
        caches: the caches.
        rows: weights of the teachers, one row per range of windows; None to select in each window
            the teacher with the lowest loss.
        starts: index in the corpus of the first window of each row, ascending; empty without rows.
    """

    caches: tuple[Cache, ...]
    rows: tuple[tuple[float, ...], ...] | None
    starts: tuple[int, ...]

    @classmethod
    def of(cls, caches: Sequence[Cache], weights: Weights | None) -> Mixture:
        """Create a mixture, and validate that the caches can be mixed.

        Args:
            caches: at least one cache, each with at least one window.
            weights: see `Weights`; None for equal weights.

        Raises:
            InvalidArgumentError: the weights are negative, do not sum to 1 or do not match the
                caches; or two caches have the same identity.
            IdentityMismatchError: the caches differ in text, windows, tokenizer, packing,
                temperature or objective, or only some of them are unbiased.
        """
        first = caches[0]
        for index, cache in enumerate(caches[1:], 1):
            _require_same_settings(first, cache)
            _require_same_text(first, cache)  # the text is no part of the identity
            for other in caches[:index]:
                if other.identity.fingerprint == cache.identity.fingerprint:
                    raise InvalidArgumentError(
                        f"the caches at {other.root} and {cache.root} have the same identity and "
                        "contain the same targets; give each cache once. Two caches of one teacher "
                        "can be mixed if they were built with different seeds (--seed)"
                    )
        rows, starts = _weights_of(caches, weights)
        return cls(tuple(caches), rows, starts)

    @property
    def identity(self) -> Identity:
        """Identity of the cache; for a mixture, an identity derived from the caches and weights."""
        if len(self.caches) == 1:
            return self.caches[0].identity
        identities = [cache.identity for cache in self.caches]
        weighted: Any = "best"
        if self.rows is not None:
            weighted = {"rows": self.rows, "starts": self.starts}
            if len(self.rows) > _SHOWN_ROWS:
                weighted = _sha256(weighted)
        names = [str(identity.teacher.get("name")) for identity in identities]
        if self.rows is not None and len(self.rows) == 1:
            names = [f"{w:g} x {name}" for w, name in zip(self.rows[0], names, strict=True)]
        made_from = {"caches": [one.fingerprint for one in identities], "weighted": weighted}
        dtypes = sorted({str(one.teacher.get("dtype")) for one in identities})
        return replace(
            identities[0],
            teacher={
                "name": ", ".join(names),
                "weights": _sha256([one.teacher.get("weights") for one in identities]),
                "dtype": " and ".join(dtypes),
                "mixture": made_from,
            },
            vocab_size=max(one.vocab_size for one in identities),
            token_mask="mixture",
            sampler={"name": "mixture", "samplers": [dict(one.sampler) for one in identities]},
            codec={"name": "mixture"},
        )

    @property
    def unbiased(self) -> bool:
        """Whether the samplers are unbiased, which is the same for all caches."""
        return from_parameters(self.caches[0].identity.sampler).unbiased

    @property
    def rounds(self) -> int | None:
        """Largest number of rounds per position, summed over the teachers of a window.

        None if the targets of a cache were not drawn in rounds.
        """
        per_cache = [from_parameters(cache.identity.sampler).rounds for cache in self.caches]
        known = [rounds for rounds in per_cache if rounds is not None]
        if len(known) < len(per_cache):
            return None
        if self.rows is None:
            return max(known)
        return max(sum(n for n, w in zip(known, row, strict=True) if w > 0) for row in self.rows)

    @property
    def teachers_per_window(self) -> int:
        """Largest number of teachers with a positive weight in a window."""
        if self.rows is None:
            return 1
        return max(sum(w > 0 for w in row) for row in self.rows)

    def read(self, i: int) -> list[tuple[float, WindowRecord]]:
        """Return the i-th window as a (weight, record) pair per teacher with a positive weight.

        Raises:
            CacheCorruptionError: a cache is damaged; the message contains the file.
            IdentityMismatchError: the text of the window differs between the caches.
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
    """Divide a total number of rounds among the teachers of a window.

    A single teacher gets all rounds, at most as many as are cached. Of several teachers each gets
    one round, and each further round is assigned to the teacher for which it most reduces
    sum_m w_m^2 / n_m, the variance of the mixture if the rounds of all teachers have the same
    variance. The resulting numbers n_m are about rounds * w_m, but at most `held`, the numbers of
    cached rounds.

    Raises:
        InvalidArgumentError: there are several teachers, but fewer rounds than teachers.

    Examples:
        >>> divided(12, (0.75, 0.25), (50, 50))
        (9, 3)
        >>> divided(12, (0.75, 0.25), (8, 50))
        (8, 4)
    """
    if len(weights) == 1:
        return (min(rounds, held[0] or rounds),)  # 0: not drawn in rounds, which thinning reports
    require_round_each(rounds, len(weights))
    assigned = [1] * len(weights)
    for _ in range(min(rounds, sum(held)) - len(weights)):
        gains = [
            w * w / (n * (n + 1)) if n < most else -1.0
            for w, n, most in zip(weights, assigned, held, strict=True)
        ]
        assigned[gains.index(max(gains))] += 1
    return tuple(assigned)


def _weights_of(
    caches: Sequence[Cache], weights: Weights | None
) -> tuple[tuple[tuple[float, ...], ...] | None, tuple[int, ...]]:
    """Return the rows of weights (None for "best"), and the first window of each row."""
    count = len(caches)
    if weights is None:
        return ((1 / count,) * count,), (0,)
    if isinstance(weights, str):
        if weights != "best":
            raise InvalidArgumentError(
                f"unknown weights {shown(weights)}; give one number per cache, one row of numbers "
                'per text or per window, or "best" for the teacher with the lowest loss per window'
            )
        return None, ()
    try:
        table = np.array(weights, np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"weights are {shown(weights)}; give one number per cache, or rows of equal length"
        ) from error
    if table.ndim not in (1, 2) or table.shape[-1] != count:
        raise InvalidArgumentError(
            f"weights have the shape {table.shape}, but there are {count} caches; give one weight "
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
    """Return the first window of each row of weights, which belongs to one text or one window."""
    texts = named_texts(cache.storage)
    if rows == len(texts):
        return (0, *(text.first_window for text in texts[1:]))
    if rows == len(cache):
        return tuple(i for start, stop in cache.ranges for i in range(start, stop))
    raise InvalidArgumentError(
        f"weights have {counted(rows, 'row')}; give {counted(len(texts), 'row')}, one per text of "
        f"the cache at {cache.root} in the order in which the texts were added, or "
        f"{counted(len(cache), 'row')}, one per window"
    )


def _require_same_settings(one: Cache, other: Cache) -> None:
    """Validate that two caches agree in all that a mixture requires, except windows and text.

    Compared are window length, packing, temperature, objective, tokenizer, and whether the samplers
    are unbiased. Raises IdentityMismatchError.
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
    here, there = (_recorded_tokenizer(cache) for cache in (one, other))
    if there["ids"] and here["ids"] == there["ids"] and here["added"] == there["added"]:
        return  # thousands of added tokens are recorded as a hash, which cannot be compared below
    require_tokenizer(
        TokenizerFingerprint(
            other.identity.tokenizer,
            there["ids"],
            there["added"] if isinstance(there["added"], dict) else {},
            there["roles"],
        ),
        one.identity.tokenizer,
        one.recorded_tokenizer(),
        whose=f"the tokenizer of the cache at {other.root}",
        origin=f"the cache at {one.root}",
    )


def _recorded_tokenizer(cache: Cache) -> dict[str, Any]:
    """Return the tokenizer in a cache's provenance; unexpected `ids` and `roles` become empty."""
    provenance = cache.recorded_tokenizer()
    recorded = provenance if isinstance(provenance, dict) else {}
    ids, roles = recorded.get("ids"), recorded.get("roles")
    return {
        "ids": ids if isinstance(ids, str) else "",
        "added": recorded.get("added"),
        "roles": roles if isinstance(roles, dict) else {},
    }


def _require_same_text(one: Cache, other: Cache) -> None:
    """Validate that two caches have the same windows, and the same text in up to eight of them.

    The other windows are compared when they are read.
    """
    here, there = joined(one.ranges), joined(other.ranges)
    if here != there:
        raise IdentityMismatchError(
            f"these caches cannot be mixed: {one.root} has the windows {ranges_in_words(here)}, "
            f"but {other.root} has {ranges_in_words(there)}. Build both caches from the same text; "
            "if windows are missing, `sparselogits cache` resumes a build"
        )
    for i in spread(len(one), _COMPARED_WINDOWS):
        _require_same_window(one, one.read(i), other, other.read(i))


def _require_same_window(one: Cache, here: WindowRecord, other: Cache, there: WindowRecord) -> None:
    """Validate that two caches have the same text in a window. Raises IdentityMismatchError."""
    for what, a, b in (
        ("text", here.tokens, there.tokens),
        ("documents", here.document_starts, there.document_starts),
        ("loss mask", here.present(), there.present()),
    ):
        if not np.array_equal(a, b):
            raise IdentityMismatchError(
                f"these caches cannot be mixed: window {here.window_index} differs in its {what} "
                f"between {one.root} and {other.root}. Build both caches from the same text"
            )


def _sha256(value: object) -> str:
    """Return the sha256, in hex, of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
