"""Define the bounds of every size and value in a cache, as docs/format.md states them.

Caches are untrusted files. A size is compared with its bound before anything of that size is
allocated, and a value before a student is trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.identity import Identity
from sparselogits.samplers import from_parameters
from sparselogits.samplers.sampler import COUNTS, ROUNDING, THRESHOLD
from sparselogits.untrusted import shown

LARGEST_CACHE_JSON = 1 << 20
"""Largest size of cache.json in bytes."""

LARGEST_VOCABULARY = 1 << 24
LONGEST_WINDOW = 1 << 20
MOST_ROUNDS = (1 << 20) - 1
LEAST_TAU = 2.0**-20

LARGEST_WINDOW = 1 << 24
"""Largest number of entries of a window."""

FREE_ENTRIES = 1 << 20
ENTRIES_PER_BYTE = 16
"""Largest number of entries of windows decoded together: a constant, and more per byte of blocks.

Real targets take 8 bits per entry or more. Constant targets (an untrained teacher, all of whose
tokens are equally likely) take almost none, hence the constant.
"""

LARGEST_LOSS = 1e6


class DamageError(ValueError):
    """Raised for bytes that no writer of shards makes; the message says why, the caller where."""


def entries_bound(block_bytes: int) -> int:
    """Return the largest number of entries that blocks of so many bytes may decode to."""
    return min(LARGEST_WINDOW, FREE_ENTRIES + ENTRIES_PER_BYTE * block_bytes)


def description_bound(file_bytes: int) -> int:
    """Return the largest size in bytes of the JSON in the footer of a file."""
    return (1 << 18) + file_bytes // 8


def footer_bound(groups: int, description: int) -> int:
    """Return the largest size in bytes of a footer: its JSON and the description of row groups."""
    return (1 << 14) + (1 << 11) * groups + description


def mass_bound(sampler: Mapping[str, Any], weights: str, vocab_size: int) -> float:
    """Return the largest sum of the weights of a position, which also bounds a single weight.

    Args:
        sampler: name and parameters of the sampler, from the identity.
        weights: kind of the weights.
        vocab_size: V.
    """
    if weights == COUNTS:
        return 1 + ROUNDING
    if weights == THRESHOLD:
        # heavy entries are probabilities; the others weigh tau, and as many as fit in the rest
        return 2 + ROUNDING
    try:
        return from_parameters(sampler).most_mass(vocab_size)
    except InvalidArgumentError:  # of a package that is not installed here, or damaged
        return float(vocab_size) ** 4


def require_bounds(identity: Identity, where: str) -> None:
    """Validate the sizes that an identity states.

    Args:
        identity: identity of a cache, read from its cache.json or about to be written.
        where: the cache, for messages.

    Raises:
        CacheError: names the field, its value and its bounds.
    """
    codec, sampler = identity.codec, identity.sampler
    for name, value, least, most in (
        ("vocab_size", identity.vocab_size, 1, LARGEST_VOCABULARY),
        ("window_length", identity.window_length, 1, LONGEST_WINDOW),
        ("windows_per_shard", identity.windows_per_shard, 1, 1 << 40),
        ("seed", identity.seed, -(1 << 63), (1 << 64) - 1),
        ("temperature", identity.temperature, 1e-6, 1e6),
        ("codec.rounds", codec.get("rounds", 1), 1, MOST_ROUNDS),
        ("codec.tau", codec.get("tau", 1), LEAST_TAU, 1),
    ):
        whole = name not in ("temperature", "codec.tau")
        if not (_is_number(value) and (isinstance(value, int) or not whole)) or not (
            least <= value <= most
        ):
            raise CacheError(
                f"{where}: {name} is {shown(value)}, where {'a whole' if whole else 'a'} number "
                f"from {least:,} to {most:,} is expected. The cache was not written by this "
                "library, or was damaged: restore cache.json from a copy"
            )
    _require_packing(identity, where)
    for name in ("rounds", "tau"):
        if name in sampler and name in codec and sampler[name] != codec[name]:
            raise CacheError(
                f"{where}: its sampler has {name} {shown(sampler[name])}, its codec "
                f"{shown(codec[name])}; the two are equal in every cache that this library "
                "writes: restore cache.json from a copy"
            )


def _require_packing(identity: Identity, where: str) -> None:
    packing, largest = identity.packing, identity.vocab_size - 1
    sound = {
        "window_length": packing.get("window_length", identity.window_length)
        == identity.window_length,
        "reset_attention": packing.get("reset_attention") in (None, False, True),
    }
    for name in ("separator_id", "bos_id"):
        value = packing.get(name)
        sound[name] = value is None or (type(value) is int and 0 <= value <= largest)
    for name, good in sound.items():
        if not good:
            raise CacheError(
                f"{where}: packing.{name} is {shown(packing[name])}, which does not fit windows of "
                f"{identity.window_length} tokens with ids of 0 to {largest}: restore cache.json "
                "from a copy"
            )


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
    )
