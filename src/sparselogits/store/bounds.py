"""Define the bounds of sizes and values in a cache, as specified in docs/format.md.

Caches are untrusted files. Sizes are therefore validated before memory is allocated for them, and
values before a student is trained on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.identity import LARGEST_VOCABULARY, Identity
from sparselogits.samplers import from_parameters
from sparselogits.samplers.sampler import COUNTS, ROUNDING, THRESHOLD
from sparselogits.untrusted import shown

LARGEST_CACHE_JSON = 1 << 20
"""Largest allowed size of cache.json in bytes."""

LONGEST_WINDOW = 1 << 20
"""Largest allowed number of tokens per window."""

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-6, 1e6
"""Range of the divisor of the teacher's logits."""

MOST_ROUNDS = (1 << 20) - 1
"""Largest allowed number of rounds per position."""

LEAST_TAU = 2.0**-20
"""Smallest allowed tau for threshold sampling."""

LARGEST_WINDOW = 1 << 24
"""Largest allowed number of entries per window."""

FREE_ENTRIES = 1 << 20
"""Number of entries that windows decoded together may have, however small their blocks are.

Equal targets at all positions, as those of an untrained teacher, take almost no bits.
"""

ENTRIES_PER_BYTE = 16
"""Number of entries that are allowed per byte of blocks, in addition to FREE_ENTRIES.

Typical targets have one entry per byte.
"""

LARGEST_LOSS = 1e6
"""Largest allowed mean loss of the teacher on a window, in nats."""


class DamageError(ValueError):
    """Raised for bytes that no valid shard of the cache contains; callers add the file and row."""


def entries_bound(block_bytes: int) -> int:
    """Return the largest allowed number of entries in windows that are decoded together.

    `block_bytes` is the total size in bytes of the blocks of these windows.
    """
    return min(LARGEST_WINDOW, FREE_ENTRIES + ENTRIES_PER_BYTE * block_bytes)


def description_bound(file_bytes: int) -> int:
    """Return the largest allowed size in bytes of the JSON description in a shard.

    `file_bytes` is the size of the shard in bytes.
    """
    return (1 << 18) + file_bytes // 8


def footer_bound(groups: int, description: int) -> int:
    """Return the largest allowed size of a footer in bytes.

    `groups` is the number of row groups, and `description` the result of `description_bound`.
    """
    return (1 << 14) + (1 << 11) * groups + description


def mass_bound(sampler: Mapping[str, Any], weights: str, vocab_size: int) -> float:
    """Return the largest valid sum of a position's weights before they are rounded to levels.

    `sampler` is the sampler of a cache's identity, and `weights` the kind of weights of its codec.
    """
    if weights == COUNTS:
        return 1 + ROUNDING
    if weights == THRESHOLD:
        # light entries are drawn systematically: they exceed their total probability by at most tau
        return 2 + ROUNDING
    try:
        return from_parameters(sampler).most_mass(vocab_size)
    except InvalidArgumentError:  # the sampler's package is not installed, or the name is damaged
        return float(vocab_size) ** 4


def require_bounds(identity: Identity, where: str) -> None:
    """Validate the numbers in the identity of a cache, which error messages call `where`.

    Raises:
        CacheError: a field is out of bounds, or contradicts another field.
    """
    codec, sampler = identity.codec, identity.sampler
    for name, value, least, most in (
        ("vocab_size", identity.vocab_size, 1, LARGEST_VOCABULARY),
        ("window_length", identity.window_length, 1, LONGEST_WINDOW),
        ("windows_per_shard", identity.windows_per_shard, 1, 1 << 40),
        ("seed", identity.seed, -(1 << 63), (1 << 64) - 1),
        ("temperature", identity.temperature, LEAST_TEMPERATURE, LARGEST_TEMPERATURE),
        ("codec.rounds", codec.get("rounds", 1), 1, MOST_ROUNDS),
        ("codec.tau", codec.get("tau", 1), LEAST_TAU, 1),
    ):
        whole = name not in ("temperature", "codec.tau")
        kinds = int if whole else (int, float)
        # comparisons with NaN are False
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise CacheError(
                f"{where}: {name} is {shown(value)}, expected {'a whole' if whole else 'a'} number "
                f"from {least:,} to {most:,}. cache.json is damaged or was not written by this "
                "library: restore it from a copy"
            )
    _require_packing(identity, where)
    mask_id = (identity.objective or {}).get("mask_id", 0)
    if mask_id >= identity.vocab_size:
        raise CacheError(
            f"{where}: objective.mask_id is {mask_id}, expected an id below {identity.vocab_size}: "
            "restore cache.json from a copy"
        )
    for name in ("rounds", "tau"):
        if name in sampler and name in codec and sampler[name] != codec[name]:
            raise CacheError(
                f"{where}: the sampler has {name} {shown(sampler[name])} but the codec has "
                f"{shown(codec[name])}; expected equal values. cache.json is damaged or was not "
                "written by this library: restore it from a copy"
            )


def _require_packing(identity: Identity, where: str) -> None:
    """Validate the packing settings in an identity."""
    packing, largest = identity.packing, identity.vocab_size - 1
    sound = {
        "window_length": packing.get("window_length", identity.window_length)
        == identity.window_length,
        "reset_attention": packing.get("reset_attention") in (None, False, True),
    }
    if "kind" in packing or "padding_id" in packing:
        sound["kind"] = packing.get("kind") == "documents"
    for name in ("separator_id", "bos_id", "padding_id"):
        value = packing.get(name)
        sound[name] = value is None or (type(value) is int and 0 <= value <= largest)
    for name, good in sound.items():
        if not good:
            raise CacheError(
                f"{where}: packing.{name} is {shown(packing.get(name))}, which does not fit "
                f"windows of {identity.window_length} tokens with ids of 0 to {largest}: restore "
                "cache.json from a copy"
            )
