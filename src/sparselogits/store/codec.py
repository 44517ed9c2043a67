"""The coding of targets: a window's ids and weights as one block of bytes.

Written out in docs/format.md. Lossless: ids, counts and float32 weights come back bit for bit.
The ids come first (store/lists.py), then the weights, entry by entry. What a block need not say is
left out: where the sampler draws N rounds the weights are count / N, and one count a position
follows from the others; where weights are a threshold's, tail entries weigh tau and only heavy
ones carry a number.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparselogits.errors import CacheError, InvalidTargetsError
from sparselogits.samplers.protocol import Sampler
from sparselogits.store import lists
from sparselogits.store.columns import ColumnDecoder, ColumnError, encode_column
from sparselogits.store.lists import LARGEST_WINDOW, ListsError, Sets
from sparselogits.targets import SparseTargets

Array = NDArray[Any]
Bool = NDArray[np.bool_]
Tables = Mapping[str, Sequence[tuple[int, bytes]]]

NAME = "inverted-lists"
VERSION = 1

COUNTS, COUNTS_AND_FLOATS, FLOATS, THRESHOLD = "counts", "counts+float32", "float32", "threshold"
_WEIGHT_COLUMNS: dict[str, dict[str, Any]] = {
    COUNTS: {"counts": np.uint32},
    COUNTS_AND_FLOATS: {"counts": np.uint32, "weights": np.float32},
    FLOATS: {"weights": np.float32},
    THRESHOLD: {"heavy": np.uint32, "weights": np.float32},
}


class BlockError(ValueError):
    """A block that does not decode to sound targets; says what is wrong, not where."""


def codec_for(sampler: Sampler) -> dict[str, Any]:
    """The codec of a sampler's targets, as it stands in the identity.

    Raises:
        CacheError: more rounds than the format can carry.
    """
    parameters = sampler.parameters()
    codec: dict[str, Any] = {"name": NAME, "version": VERSION}
    if sampler.rounds is None:
        tau = parameters.get("tau") if sampler.name == "threshold" else None
        return codec | ({"weights": FLOATS} if tau is None else {"weights": THRESHOLD, "tau": tau})
    if sampler.rounds >= 1 << 20:
        raise CacheError(f"{sampler.rounds} rounds a position; the cache carries fewer than 2^20")
    plain = sampler.name in ("systematic", "multinomial") and (
        parameters.get("proposal_exponent", 1.0) == 1.0
    )
    return codec | {"weights": COUNTS if plain else COUNTS_AND_FLOATS, "rounds": sampler.rounds}


@dataclass(frozen=True, eq=False)
class Window:
    """What the coding of a window's targets depends on.

    Args:
        targets: of L positions.
        tokens: int32 [L].
        present: bool [L]: positions that carry a target.
    """

    targets: SparseTargets
    tokens: Array
    present: Bool


@dataclass(frozen=True)
class TargetCodec:
    """The codec of one cache.

    Args:
        weights: which of the four kinds of weights the targets carry.
        vocab_size: ids lie below it.
        rounds: of every position that carries a target, where the sampler draws rounds.
        tau: of a threshold sampler.
    """

    weights: str
    vocab_size: int
    rounds: int | None = None
    tau: float | None = None

    @classmethod
    def from_identity(cls, codec: Mapping[str, Any], vocab_size: int) -> TargetCodec:
        """The codec an identity names.

        Raises:
            CacheError: one that this library does not know.
        """
        if (codec.get("name"), codec.get("version")) != (NAME, VERSION) or codec.get(
            "weights"
        ) not in _WEIGHT_COLUMNS:
            raise CacheError(
                f"this library reads targets coded by {NAME} {VERSION}, the cache names "
                f"{dict(codec)!r}; install the version of sparselogits that wrote it"
            )
        return cls(codec["weights"], vocab_size, codec.get("rounds"), codec.get("tau"))

    @property
    def columns(self) -> dict[str, Any]:
        """Names and dtypes of a block's columns, in order."""
        return dict.fromkeys(lists.COLUMNS, np.uint32) | _WEIGHT_COLUMNS[self.weights]

    def encode(self, windows: Sequence[Window]) -> tuple[dict[str, Any], list[bytes]]:
        """Code the windows of a shard.

        Returns:
            The coding tables they share, and a block for each.

        Raises:
            InvalidTargetsError: targets this codec cannot give back as they are.
        """
        split = [self._split(window) for window in windows]
        columns = {name: encode_column([arrays[name] for arrays in split]) for name in self.columns}
        blocks = [
            struct.pack("<I", len(arrays["ids"]))
            + b"".join(column.pages[index] for column in columns.values())
            for index, arrays in enumerate(split)
        ]
        return {name: column.tables for name, column in columns.items()}, blocks

    def decoder(self, tables: Tables) -> BlockDecoder:
        """A decoder of blocks coded under these tables. Raises BlockError."""
        return BlockDecoder(self, tables)

    def _split(self, window: Window) -> dict[str, Array]:
        """A window's numbers by column."""
        targets = window.targets
        self._require_codable(targets, window.present)
        lengths = targets.entries_per_position.numpy()
        ids, weights = targets.ids.numpy(), targets.weights.numpy()
        columns = lists.split(ids, lengths, window.tokens, window.present)
        columns["weights"] = weights
        if targets.counts is not None:
            owner = np.repeat(np.arange(len(lengths)), lengths)
            hits = np.flatnonzero(ids == lists.next_tokens(window.tokens)[owner])
            kept = np.ones(len(ids), np.bool_)
            kept[_derived(lengths, window.present, owner[hits], hits)] = False
            columns["counts"] = targets.counts.numpy()[kept].astype(np.uint32) - np.uint32(1)
        if self.weights == THRESHOLD:
            heavy = weights != np.float32(self.tau or 0.0)
            columns |= {"heavy": heavy.astype(np.uint32), "weights": weights[heavy]}
        return columns

    def _require_codable(self, targets: SparseTargets, present: NDArray[np.bool_]) -> None:
        lengths = targets.entries_per_position.numpy()
        if targets.vocab_size != self.vocab_size or targets.rounds != self.rounds:
            raise InvalidTargetsError(
                f"targets over {targets.vocab_size} ids in {targets.rounds} rounds; the cache "
                f"holds {self.vocab_size} ids and {self.rounds} rounds"
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


class BlockDecoder:
    """Decodes the blocks of one shard."""

    def __init__(self, codec: TargetCodec, tables: Tables) -> None:
        self.codec = codec
        names = codec.columns
        if set(tables) != set(names):
            raise BlockError(f"coding tables for {sorted(tables)}, expected {sorted(names)}")
        try:
            self._columns = {n: ColumnDecoder(dtype, tables[n]) for n, dtype in names.items()}
        except ColumnError as error:
            raise BlockError(str(error)) from error

    def decode(self, window: int, block: bytes, tokens: Array, present: Bool) -> SparseTargets:
        """The targets of one window.

        Args:
            window: its place in the shard, from 0.
            block: as `TargetCodec.encode` made it.
            tokens: int32 [L].
            present: bool [L]: positions that carry a target.

        Raises:
            BlockError: a block that is damaged, whatever its bytes are.
        """
        reader = _Reader(self._columns, self.codec.columns, window, block)
        try:
            listed = reader.number()
            if listed > self.codec.vocab_size:
                raise BlockError(f"{listed} lists over a vocabulary of {self.codec.vocab_size}")
            limit = min(LARGEST_WINDOW, int(present.sum()) * (self.codec.rounds or LARGEST_WINDOW))
            sets = lists.join(reader.column, listed, tokens, present, self.codec.vocab_size, limit)
            targets = self._weigh(sets, present, reader)
        except (ColumnError, ListsError) as error:
            raise BlockError(str(error)) from error
        reader.require_end()
        return targets

    def _weigh(self, sets: Sets, present: Bool, reader: _Reader) -> SparseTargets:
        codec, entries = self.codec, len(sets.ids)
        offsets = np.zeros(len(present) + 1, np.int64)
        np.cumsum(sets.lengths, out=offsets[1:])
        counts = None
        if codec.rounds is not None:
            counts = _read_counts(sets, offsets, present, codec.rounds, reader)
        if codec.weights == COUNTS:
            assert counts is not None
            weights = weights_of_counts(counts, codec.rounds or 1)
        elif codec.weights == THRESHOLD:
            heavy = reader.column("heavy", entries) != 0
            weights = np.full(entries, codec.tau, np.float32)
            weights[heavy] = reader.column("weights", int(heavy.sum()))
        else:
            weights = reader.column("weights", entries)
        if codec.weights != COUNTS and not bool((np.isfinite(weights) & (weights >= 0)).all()):
            raise BlockError("a weight is negative or not finite")
        return SparseTargets(
            torch.from_numpy(sets.ids),
            torch.from_numpy(weights),
            torch.from_numpy(offsets),
            codec.vocab_size,
            counts=None if counts is None else torch.from_numpy(counts),
            rounds=codec.rounds,
            check=False,
        )


class _Reader:
    """The columns of one block, one after another."""

    def __init__(
        self,
        columns: Mapping[str, ColumnDecoder],
        dtypes: Mapping[str, Any],
        window: int,
        block: bytes,
    ) -> None:
        self._columns, self._dtypes, self._window = columns, dtypes, window
        self._block, self._at = block, 4

    def number(self) -> int:
        """The block's first word: how many lists there are."""
        if len(self._block) < 4:
            raise BlockError(f"a block of {len(self._block)} bytes is shorter than its header")
        return int.from_bytes(self._block[:4], "little")

    def column(self, name: str, length: int) -> Array:
        """The next column's numbers."""
        out = np.empty(length, self._dtypes[name])
        self._at += self._columns[name].decode_into(out, self._window, self._block[self._at :])
        return out

    def require_end(self) -> None:
        if self._at != len(self._block):
            raise BlockError(f"{len(self._block)} bytes, of which {self._at} are used")


def weights_of_counts(counts: Array, rounds: int) -> NDArray[np.float32]:
    """float32 [E]: count / rounds, rounded once."""
    return counts.astype(np.float32) / np.float32(rounds)


def _derived(lengths: Array, present: Bool, hit_positions: Array, hits: Array) -> Array:
    """int64 [Q]: the entry of each position whose count follows from the others.

    It is the true next token's where that is in the set, and the first one's elsewhere: the
    likeliest entry, whose count would cost most.
    """
    derived = np.cumsum(lengths)
    derived -= lengths
    derived[hit_positions] = hits
    return derived if bool(present.all()) else derived[present]


def _read_counts(
    sets: Sets, offsets: Array, present: Bool, rounds: int, reader: _Reader
) -> NDArray[np.int32]:
    """int32 [E]. Raises BlockError unless every position's counts are positive and sum to N."""
    entries, lengths = len(sets.ids), sets.lengths[present]
    if not bool(lengths.all()):
        raise BlockError("a position that carries a target has no entries")
    derived = _derived(sets.lengths, present, sets.hit_positions, sets.hits)
    kept = np.ones(entries, np.bool_)
    kept[derived] = False
    told = reader.column("counts", entries - len(derived))
    if len(told) and int(told.max()) >= rounds:
        raise BlockError(f"a count of {int(told.max()) + 1} in {rounds} rounds")
    counts = np.zeros(entries, np.int32)
    counts[kept] = told + np.uint32(1)
    starts = offsets[:-1] if len(lengths) == len(present) else offsets[:-1][present]
    told_sums = (
        np.add.reduceat(counts, starts, dtype=np.int64) if entries else np.zeros(0, np.int64)
    )
    rest = rounds - told_sums
    if bool((rest < 1).any()):
        raise BlockError(f"counts of a position exceed its {rounds} rounds")
    counts[derived] = rest
    return counts


__all__ = ["BlockDecoder", "BlockError", "TargetCodec", "Window", "codec_for"]
