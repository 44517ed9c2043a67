"""Define the codec of a cache's targets, and encode targets as one block of bytes per window.

docs/format.md specifies the bytes. The codec is lossless for ids and counts, for weights that are
levels (levels.py) and, in caches with exact weights, for any valid float32 weights. A block
contains the columns of the ids (lists.py) and of the weights, each encoded by pcodec (columns.py).
decoder.py decodes blocks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparselogits.errors import CacheError, InvalidTargetsError
from sparselogits.identity import Identity
from sparselogits.objectives import CAUSAL, TokenObjective
from sparselogits.samplers.sampler import (
    COUNTS,
    COUNTS_AND_FLOATS,
    FLOATS,
    THRESHOLD,
    Sampler,
)
from sparselogits.samplers.uniforms import rounding_uniforms
from sparselogits.store.bounds import (
    LARGEST_WINDOW,
    MOST_ROUNDS,
    entries_bound,
    mass_bound,
)
from sparselogits.store.codec import lists
from sparselogits.store.codec.columns import Array, Bool, encode_column
from sparselogits.store.codec.levels import (
    LARGEST_STEP,
    NEAREST,
    STOCHASTIC,
    indices_of,
    rounded,
)
from sparselogits.targets import SparseTargets
from sparselogits.untrusted import shown

NAME = "inverted-lists"
"""Name of the codec in a cache's identity."""

EXACT, ROUNDED = 1, 2
"""Versions of the codec: exact weights, and weights rounded to levels."""

WEIGHT_COLUMNS: dict[str, dict[str, Any]] = {
    COUNTS: {"counts": np.uint32},
    COUNTS_AND_FLOATS: {"counts": np.uint32, "weights": np.float32},
    FLOATS: {"weights": np.float32},
    THRESHOLD: {"heavy": np.uint32, "weights": np.float32},
}
"""Names and dtypes of the columns for exact weights, by kind of weights.

With "counts", weights are count / rounds. One count per position is not stored, because it follows
from the others. With "threshold", light entries share the weight tau, and only the weights of heavy
entries are stored. If weights are rounded, the column `levels` with the indices of levels replaces
`weights`.
"""


def codec_for(sampler: Sampler, *, exact_weights: bool = False) -> dict[str, Any]:
    """Return the codec for a sampler's targets, in the form in which a cache's identity records it.

    Args:
        sampler: the sampler.
        exact_weights: whether to store real-valued weights as float32 rather than rounded to levels
            (stochastically for an unbiased sampler, to the nearest level for a biased one). Weights
            of the form count / rounds are always exact.

    Raises:
        CacheError: the sampler draws more rounds than the format supports.

    Examples:
        >>> from sparselogits.samplers import Systematic
        >>> codec_for(Systematic(50))
        {'name': 'inverted-lists', 'version': 1, 'weights': 'counts', 'rounds': 50}
    """
    stored = sampler.stores
    if stored.rounds is not None and stored.rounds > MOST_ROUNDS:
        raise CacheError(
            f"the sampler draws {stored.rounds} rounds per position, but a cache stores at most "
            f"{MOST_ROUNDS}; choose fewer rounds"
        )
    parameters = {"weights": stored.weights, "rounds": stored.rounds, "tau": stored.tau}
    codec: dict[str, Any] = {"name": NAME, "version": EXACT}
    codec |= {k: v for k, v in parameters.items() if v is not None}
    if exact_weights or stored.weights == COUNTS:
        return codec
    return codec | {"version": ROUNDED, "rounding": STOCHASTIC if sampler.unbiased else NEAREST}


@dataclass(frozen=True, eq=False)
class TargetWindow:
    """Targets of the L positions of a window, to be encoded, with the window's tokens."""

    targets: SparseTargets
    tokens: Array  # int32 [L]
    present: Bool  # [L], whether each position has a target


@dataclass(frozen=True)
class TargetCodec:
    """Codec that encodes a cache's targets as blocks; `BlockDecoder` decodes them."""

    weights: str  # kind of the weights, a key of `WEIGHT_COLUMNS`
    vocab_size: int
    rounds: int | None = None  # per position with a target; None if the sampler draws none
    tau: float | None = None  # weight that light entries share; None for other kinds of weights
    most_mass: float = math.inf  # largest valid sum of a position's weights
    rounding: str | None = None  # "stochastic" or "nearest"; None if weights are exact
    objective: TokenObjective = CAUSAL  # defines the label of each position

    @classmethod
    def from_identity(
        cls, codec: Mapping[str, Any], vocab_size: int, sampler: Mapping[str, Any] | None = None
    ) -> TargetCodec:
        """Create the codec that an identity describes, with the sampler's bound on the weights.

        Args:
            codec: field `codec` of the identity.
            vocab_size: field `vocab_size` of the identity.
            sampler: field `sampler` of the identity; None for the bound of an unknown sampler.

        Raises:
            CacheError: the codec is unknown, or its parameters contradict each other.
        """
        keys = ("weights", "rounds", "tau", "rounding")
        weights, rounds, tau, rounding = (codec.get(key) for key in keys)
        version = codec.get("version")
        known = codec.get("name") == NAME and version in (EXACT, ROUNDED)
        if not known or not isinstance(weights, str) or weights not in WEIGHT_COLUMNS:
            raise CacheError(
                f"the cache has the codec {shown(dict(codec))}; this library reads {NAME} {EXACT} "
                f"and {ROUNDED}. Install the version of sparselogits that wrote the cache"
            )
        roundings = (STOCHASTIC, NEAREST) if version == ROUNDED else (None,)
        if rounding not in roundings or (version == ROUNDED and weights == COUNTS):
            raise CacheError(
                f"the cache has the codec {shown(dict(codec))}; {NAME} {ROUNDED} has weights other "
                f"than {COUNTS} and the rounding {STOCHASTIC} or {NEAREST}, and {NAME} {EXACT} has "
                "no rounding. Restore cache.json from a copy"
            )
        has_rounds, has_tau = weights in (COUNTS, COUNTS_AND_FLOATS), weights == THRESHOLD
        if (rounds is not None, tau is not None) != (has_rounds, has_tau):
            raise CacheError(
                f"the cache has the codec {shown(dict(codec))}; expected "
                f"{'' if has_rounds else 'no '}rounds and {'' if has_tau else 'no '}tau for the "
                f"weights {weights!r}. Restore cache.json from a copy"
            )
        most_mass = mass_bound(sampler or {}, weights, vocab_size)
        if rounding is not None:
            most_mass *= 1 + LARGEST_STEP
        return cls(weights, vocab_size, rounds, tau, most_mass, rounding)

    @classmethod
    def of(cls, identity: Identity) -> TargetCodec:
        """Create the codec of a cache from its identity; see `from_identity`."""
        codec = cls.from_identity(identity.codec, identity.vocab_size, identity.sampler)
        return replace(codec, objective=identity.predicts)

    def labels(self, tokens: Array) -> NDArray[np.int64]:
        """Return the token that each position predicts, int64 [..., L]; -1 if there is none."""
        return self.objective.at_positions(tokens.astype(np.int64), -1)

    @property
    def columns(self) -> dict[str, Any]:
        """Names and dtypes of the columns of a block, in order."""
        columns = dict.fromkeys(lists.COLUMNS, np.uint32) | WEIGHT_COLUMNS[self.weights]
        if self.rounding is not None:
            del columns["weights"]
            columns["levels"] = np.uint32
        return columns

    @property
    def light_weight(self) -> np.float32:
        """Weight that light entries share: tau in float32."""
        assert self.tau is not None
        return np.float32(self.tau)

    @property
    def least_weight(self) -> float:
        """Smallest valid stored weight.

        The value is tau for a threshold sampler, or just below the level under tau if weights are
        rounded; and 0 for other samplers.
        """
        if self.weights != THRESHOLD:
            return 0.0
        tau = float(self.light_weight)
        return tau if self.rounding is None else tau / (1 + LARGEST_STEP) * (1 - 2**-22)

    def rounded(self, targets: SparseTargets, seed: int, window_index: int) -> SparseTargets:
        """Return a window's targets with weights rounded to levels, unless weights are exact.

        Stochastic rounding preserves the expectation of every weight. The uniforms depend only on
        the cache's seed, the window's index in the corpus and the index of the entry, so that a
        resumed build writes the same bytes.

        Raises:
            InvalidTargetsError: a weight to round is negative, above 2^97 or NaN.
        """
        if self.rounding is None:
            return targets
        weights, uniforms = targets.weights.numpy(), None
        if self.rounding == STOCHASTIC:
            uniforms = rounding_uniforms(seed % 2**64, window_index, len(weights))
        levels = rounded(weights, uniforms)
        if self.weights == THRESHOLD:  # the weight of light entries may not be a level
            levels = np.where(weights == self.light_weight, weights, levels)
        return replace(targets, weights=torch.from_numpy(levels), check=False)

    def encode(self, windows: Sequence[TargetWindow]) -> tuple[dict[str, Any], list[bytes]]:
        """Encode the windows of a shard as coding tables by column, and one block per window.

        Raises:
            InvalidTargetsError: the codec cannot encode the targets without loss, or a window has
                too many entries.
        """
        split = [self._split(window) for window in windows]
        columns = {name: encode_column([arrays[name] for arrays in split]) for name in self.columns}
        blocks = [
            struct.pack("<I", len(arrays["ids"]))
            + b"".join(column.pages[index] for column in columns.values())
            for index, arrays in enumerate(split)
        ]
        for window, block in zip(windows, blocks, strict=True):
            if window.targets.entries > entries_bound(len(block)):
                raise InvalidTargetsError(
                    f"{window.targets.entries} entries of a window are encoded in {len(block)} "
                    f"bytes, but readers accept at most {entries_bound(len(block))} for that size. "
                    "Use shorter windows or a smaller budget"
                )
        return {name: column.tables for name, column in columns.items()}, blocks

    def _split(self, window: TargetWindow) -> dict[str, Array]:
        """Return a window's values by column."""
        targets = window.targets
        self._require_codable(targets, window.present)
        lengths = targets.entries_per_position.numpy()
        ids, weights = targets.ids.numpy(), targets.weights.numpy()
        labels = self.labels(window.tokens)
        columns = lists.split(ids, lengths, window.tokens, labels, window.present)
        columns["weights"] = weights
        if targets.counts is not None:
            owner = np.repeat(np.arange(len(lengths)), lengths)
            is_hit = ids == labels[owner]
            has_hit = np.zeros(len(lengths), np.bool_)
            has_hit[owner[is_hit]] = True
            starts = targets.offsets.numpy()[:-1][window.present]
            stored = ~derived_entries(starts, is_hit, has_hit[window.present])
            columns["counts"] = targets.counts.numpy()[stored].astype(np.uint32) - np.uint32(1)
        if self.weights == THRESHOLD:
            heavy = weights != self.light_weight
            columns |= {"heavy": heavy.astype(np.uint32), "weights": weights[heavy]}
        if self.rounding is not None:
            columns["levels"] = indices_of(columns.pop("weights"))
        return columns

    def _require_codable(self, targets: SparseTargets, present: NDArray[np.bool_]) -> None:
        """Validate that targets can be encoded without loss."""
        lengths = targets.entries_per_position.numpy()
        if targets.vocab_size != self.vocab_size or targets.rounds != self.rounds:
            raise InvalidTargetsError(
                f"targets have a vocabulary of {targets.vocab_size} ids and "
                f"{_rounds(targets.rounds)}, expected {self.vocab_size} ids and "
                f"{_rounds(self.rounds)} as in the cache's identity. Use the teacher's vocabulary "
                "size, and a sampler whose `stores` matches the targets"
            )
        if len(targets.weights) and self.weights != COUNTS:
            mass = float(targets.mass().max())
            if not mass <= self.most_mass:
                raise InvalidTargetsError(
                    f"the weights of a position sum to {mass:g}, expected at most "
                    f"{self.most_mass:g}; correct `most_mass` or the weights of the sampler"
                )
        if targets.entries > LARGEST_WINDOW:
            raise InvalidTargetsError(
                f"a window has {targets.entries} entries, expected at most {LARGEST_WINDOW}; use "
                "shorter windows or a smaller budget"
            )
        if bool(lengths[~present].any()):
            position = int(np.flatnonzero((lengths > 0) & ~present)[0])
            raise InvalidTargetsError(
                f"position {position} is masked but has entries; pass targets without entries at "
                "masked positions"
            )
        if self.rounds is not None and not bool(lengths[present].all()):
            position = int(np.flatnonzero((lengths == 0) & present)[0])
            raise InvalidTargetsError(
                f"position {position} has a target but no entries; mask the position, or correct "
                "the sampler"
            )
        if self.weights == COUNTS and targets.counts is not None:
            expected = weights_of_counts(targets.counts.numpy(), self.rounds or 1)
            if not np.array_equal(expected, targets.weights.numpy()):
                raise InvalidTargetsError(
                    "weights are not equal to count / rounds in float32; correct the sampler, or "
                    "its `stores`"
                )


def weights_of_counts(counts: Array, rounds: int) -> NDArray[np.float32]:
    """Convert counts to the weights count / rounds, float32 [E]."""
    weights = counts.astype(np.float32)
    weights /= np.float32(rounds)
    return weights


def derived_entries(starts: Array, is_hit: Bool, has_hit: Bool) -> Bool:
    """Return a mask of the entries whose counts are not stored, bool [E].

    One count per position follows from the others: the count of the label's entry (`is_hit`) if
    there is one, because that count is usually large, and otherwise that of the first entry.
    `starts` and `has_hit` have one element per position with a target.
    """
    derived = is_hit.copy()
    derived[starts[~has_hit]] = True
    return derived


def _rounds(rounds: int | None) -> str:
    """Return a phrase with the number of rounds, for messages."""
    return "no rounds" if rounds is None else f"{rounds} rounds per position"
