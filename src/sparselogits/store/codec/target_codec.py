"""Define how the targets of a cache are coded, and encode them: one block of bytes per window.

docs/format.md specifies the bytes. Ids and counts come back bit for bit, and so do weights that are
levels (levels.py) or, in a cache with exact weights, any float32 weights. The ids come first
(lists.py), then the weights, entry by entry (weights.py); a library codes each column (columns.py).
decoder.py reads blocks back.
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
from sparselogits.objectives import Causal
from sparselogits.samplers.sampler import COUNTS, COUNTS_AND_FLOATS, THRESHOLD, Sampler
from sparselogits.samplers.uniforms import rounding_uniforms
from sparselogits.store.bounds import (
    LARGEST_WINDOW,
    MOST_ROUNDS,
    entries_bound,
    mass_bound,
)
from sparselogits.store.codec import lists
from sparselogits.store.codec.columns import encode_column
from sparselogits.store.codec.levels import (
    LARGEST_STEP,
    NEAREST,
    STOCHASTIC,
    indices_of,
    rounded,
)
from sparselogits.store.codec.lists import Array, Bool
from sparselogits.store.codec.weights import (
    WEIGHT_COLUMNS,
    derived_entries,
    weight_columns,
    weights_of_counts,
)
from sparselogits.targets import SparseTargets
from sparselogits.untrusted import shown

NAME = "inverted-lists"
EXACT, ROUNDED = 1, 2
"""Versions of the codec: with exact weights, and with weights rounded to levels."""


def codec_for(sampler: Sampler, *, exact_weights: bool = False) -> dict[str, Any]:
    """Return the codec of a sampler's targets, as written to the identity.

    Args:
        sampler: the sampler.
        exact_weights: whether real-valued weights are stored as float32 numbers, and not rounded to
            levels: stochastically if the sampler is unbiased, else to the nearest. Weights that
            are count / rounds are exact in any case.

    Raises:
        CacheError: more rounds than the format can hold.
    """
    stored = sampler.stores
    if stored.rounds is not None and stored.rounds > MOST_ROUNDS:
        raise CacheError(
            f"the sampler draws {stored.rounds} rounds per position, and a cache can store at most "
            f"{MOST_ROUNDS}; choose fewer rounds"
        )
    told = {"weights": stored.weights, "rounds": stored.rounds, "tau": stored.tau}
    made: dict[str, Any] = {"name": NAME, "version": EXACT}
    made |= {k: v for k, v in told.items() if v is not None}
    if exact_weights or stored.weights == COUNTS:
        return made
    return made | {"version": ROUNDED, "rounding": STOCHASTIC if sampler.unbiased else NEAREST}


@dataclass(frozen=True, eq=False)
class TargetWindow:
    """A window as the encoder takes it.

    Args:
        targets: targets of L positions.
        tokens: int32 [L].
        present: bool [L], True where the position carries a target.
    """

    targets: SparseTargets
    tokens: Array
    present: Bool


@dataclass(frozen=True)
class TargetCodec:
    """The codec of one cache.

    Args:
        weights: kind of the weights, one of the four of weights.py.
        vocab_size: V; ids are below it.
        rounds: rounds per position that carries a target; None if the sampler draws none.
        tau: the weight that light entries share; None for other kinds of weights.
        most_mass: largest sum of the weights of a position.
        rounding: how real-valued weights are rounded to levels, stochastic or nearest; None if they
            are exact.
    """

    weights: str
    vocab_size: int
    rounds: int | None = None
    tau: float | None = None
    most_mass: float = math.inf
    rounding: str | None = None

    @classmethod
    def from_identity(
        cls, codec: Mapping[str, Any], vocab_size: int, sampler: Mapping[str, Any] | None = None
    ) -> TargetCodec:
        """Make the codec that an identity names.

        Args:
            codec: name and parameters of the codec.
            vocab_size: V.
            sampler: name and parameters of the sampler, which bound the weights.

        Raises:
            CacheError: this library does not know the codec.
        """
        keys = ("weights", "rounds", "tau", "rounding")
        weights, rounds, tau, rounding = (codec.get(key) for key in keys)
        version = codec.get("version")
        known = codec.get("name") == NAME and version in (EXACT, ROUNDED)
        if not known or not isinstance(weights, str) or weights not in WEIGHT_COLUMNS:
            raise CacheError(
                f"this library reads targets coded by {NAME} {EXACT} and {ROUNDED}, the cache "
                f"names {shown(dict(codec))}; install the version of sparselogits that wrote it"
            )
        roundings = (STOCHASTIC, NEAREST) if version == ROUNDED else (None,)
        if rounding not in roundings or (version == ROUNDED and weights == COUNTS):
            raise CacheError(
                f"the codec {NAME} {ROUNDED} has weights other than {COUNTS} and a rounding, "
                f"{STOCHASTIC} or {NEAREST}; {NAME} {EXACT} has no rounding. The cache names "
                f"{shown(dict(codec))}; restore cache.json from a copy"
            )
        has_rounds, has_tau = weights in (COUNTS, COUNTS_AND_FLOATS), weights == THRESHOLD
        if (rounds is not None, tau is not None) != (has_rounds, has_tau):
            raise CacheError(
                f"the codec of weights {weights!r} has {'' if has_rounds else 'no '}rounds and "
                f"{'' if has_tau else 'no '}tau, the cache names {shown(dict(codec))}; restore "
                "cache.json from a copy"
            )
        most_mass = mass_bound(sampler or {}, weights, vocab_size)
        if rounding is not None:
            most_mass *= 1 + LARGEST_STEP
        return cls(weights, vocab_size, rounds, tau, most_mass, rounding)

    @classmethod
    def of(cls, identity: Identity) -> TargetCodec:
        """Make the codec of a cache from its identity. Raises CacheError."""
        return cls.from_identity(identity.codec, identity.vocab_size, identity.sampler)

    def labels(self, tokens: Array) -> NDArray[np.int64]:
        """Return the token that each position predicts, int64 [..., L]; -1 where there is none.

        Args:
            tokens: int32 [..., L].
        """
        return Causal().at_positions(tokens.astype(np.int64), -1)

    @property
    def columns(self) -> dict[str, Any]:
        """Names and dtypes of the columns of a block, in order."""
        return dict.fromkeys(lists.COLUMNS, np.uint32) | weight_columns(
            self.weights, rounded=self.rounding is not None
        )

    @property
    def light_weight(self) -> np.float32:
        """The weight that light entries share: tau in float32."""
        assert self.tau is not None
        return np.float32(self.tau)

    @property
    def least_weight(self) -> float:
        """Smallest weight: tau, or a level next to tau, for heavy entries; else 0."""
        if self.weights != THRESHOLD:
            return 0.0
        tau = float(self.light_weight)
        return tau if self.rounding is None else tau / (1 + LARGEST_STEP) * (1 - 2**-22)

    def rounded(self, targets: SparseTargets, seed: int, window_index: int) -> SparseTargets:
        """Return a window's targets with the weights that the cache stores.

        Stochastic rounding keeps the expectation of every weight. Its uniforms depend on seed,
        window and entry alone, so that a resumed build makes the same bytes. Weights that are
        levels stay as they are.

        Args:
            targets: targets of the window.
            seed: seed of the cache.
            window_index: index of the window within the cache.

        Raises:
            InvalidTargetsError: a weight is negative or not finite.
        """
        if self.rounding is None:
            return targets
        weights, uniforms = targets.weights.numpy(), None
        if self.rounding == STOCHASTIC:
            uniforms = rounding_uniforms(seed % 2**64, window_index, len(weights))
        made = rounded(weights, uniforms)
        if self.weights == THRESHOLD:  # light entries share a weight that need not be a level
            made = np.where(weights == self.light_weight, weights, made)
        return replace(targets, weights=torch.from_numpy(made), check=False)

    def encode(self, windows: Sequence[TargetWindow]) -> tuple[dict[str, Any], list[bytes]]:
        """Encode the windows of a shard.

        Returns:
            The coding tables that the windows share, and one block per window.

        Raises:
            InvalidTargetsError: targets that this codec cannot return as they are.
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
                    f"{window.targets.entries} entries of a window take {len(block)} bytes, of "
                    f"which a reader accepts {entries_bound(len(block))} entries at most. Use "
                    "shorter windows or a smaller budget"
                )
        return {name: column.tables for name, column in columns.items()}, blocks

    def _split(self, window: TargetWindow) -> dict[str, Array]:
        """Return the numbers of a window by column."""
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
            kept = ~derived_entries(starts, is_hit, has_hit[window.present])
            columns["counts"] = targets.counts.numpy()[kept].astype(np.uint32) - np.uint32(1)
        if self.weights == THRESHOLD:
            heavy = weights != self.light_weight
            columns |= {"heavy": heavy.astype(np.uint32), "weights": weights[heavy]}
        if self.rounding is not None:
            columns["levels"] = indices_of(columns.pop("weights"))
        return columns

    def _require_codable(self, targets: SparseTargets, present: NDArray[np.bool_]) -> None:
        lengths = targets.entries_per_position.numpy()
        if targets.vocab_size != self.vocab_size or targets.rounds != self.rounds:
            raise InvalidTargetsError(
                f"the targets have {targets.vocab_size} ids and {_rounds(targets.rounds)}; the "
                f"cache was begun with {self.vocab_size} ids and {_rounds(self.rounds)}. Give the "
                "teacher's vocabulary, and a sampler whose `stores` says what it draws"
            )
        if len(targets.weights) and self.weights != COUNTS:
            mass = float(targets.mass().max())
            if not mass <= self.most_mass:
                raise InvalidTargetsError(
                    f"the weights of a position sum to {mass:g}, expected {self.most_mass:g} at "
                    "most with this sampler"
                )
        if targets.entries > LARGEST_WINDOW:
            raise InvalidTargetsError(
                f"{targets.entries} entries in a window, more than {LARGEST_WINDOW}: use shorter "
                "windows or a smaller budget"
            )
        if bool(lengths[~present].any()):
            position = int(np.flatnonzero((lengths > 0) & ~present)[0])
            raise InvalidTargetsError(f"position {position} is masked out but owns entries")
        if self.rounds is not None and not bool(lengths[present].all()):
            position = int(np.flatnonzero((lengths == 0) & present)[0])
            raise InvalidTargetsError(f"position {position} carries a target but owns no entries")
        if self.weights == COUNTS and targets.counts is not None:
            expected = weights_of_counts(targets.counts.numpy(), self.rounds or 1)
            if not np.array_equal(expected, targets.weights.numpy()):
                raise InvalidTargetsError("weights are not count / rounds, in float32")


def _rounds(rounds: int | None) -> str:
    return "no rounds" if rounds is None else f"{rounds} rounds per position"
