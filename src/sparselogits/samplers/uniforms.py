"""Generate the random numbers of a cache from a counter, keyed by seed and window index alone.

So batch size, rank, executor and restart cannot change a draw. The stream is Philox 4x64 with ten
rounds, read as raw 64-bit words and scaled here: NumPy guarantees the bit stream of a bit generator
for all versions, and not that of a distribution's method.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparselogits.errors import InvalidArgumentError

# highest word of the counter, so that the streams never overlap
_SAMPLING, _THINNING, _ROUNDING, _CORRUPTION, _HELD_OUT_CORRUPTION = range(5)
"""Highest word of the counter, so that the streams never overlap."""


def window_uniforms(seed: int, window_index: int, positions: int, per_position: int) -> Tensor:
    """Return the uniforms that a sampler consumes for one window.

    Args:
        seed: seed of the cache, in [0, 2**64).
        window_index: index of the window within the cache.
        positions: P, positions of the window.
        per_position: U, the sampler's `uniforms_per_position`.

    Returns:
        float64 [P, U], multiples of 2**-53 in [0, 1).

    Raises:
        InvalidArgumentError: seed or window_index outside the 64 bits of a Philox key.
    """
    words = _words(seed, window_index, _SAMPLING, positions * per_position)
    return torch.from_numpy(_unit_interval(words)).view(positions, per_position)


def thinning_starts(
    seed: int, epoch: int, window_index: int, positions: int, stride: int
) -> Tensor:
    """Choose, per position, one of `stride` subsets of the cached rounds to keep in an epoch.

    Over any `stride` consecutive epochs a position uses each subset once, so the average over
    these epochs is exactly the cached target. Consecutive epochs are about 0.618 of the cycle
    apart, so that the average over few epochs is already close. The start of the cycle is random.

    Args:
        seed: seed of the training run, in [0, 2**64).
        epoch: number of the epoch, from 0.
        window_index: index of the window within the cache.
        positions: P, positions of the window.
        stride: number of starts; `targets.thinning_choices(cached, kept)`.

    Returns:
        int64 [P] in [0, stride), uniform and independent over positions.

    Raises:
        InvalidArgumentError: for a stride below one, a negative epoch or a key outside 64 bits.
    """
    if stride < 1 or epoch < 0:
        raise InvalidArgumentError(
            f"stride must be at least 1 and epoch at least 0, found {stride} and {epoch}"
        )
    first = _unit_interval(_words(seed, window_index, _THINNING, positions)) * stride
    step = next(s for s in range(round(stride * 0.618), 2 * stride) if math.gcd(s, stride) == 1)
    return torch.from_numpy((first.astype(np.int64) + epoch * step) % stride)


def rounding_uniforms(seed: int, window_index: int, entries: int) -> NDArray[np.float64]:
    """Return the uniforms by which a cache rounds the weights of one window, float64 [E] in [0, 1).

    Args:
        seed: seed of the cache, in [0, 2**64).
        window_index: index of the window within the cache.
        entries: E, entries of the window.

    Raises:
        InvalidArgumentError: seed or window_index outside the 64 bits of a Philox key.
    """
    return _unit_interval(_words(seed, window_index, _ROUNDING, entries))


def corruption_uniforms(
    seed: int, window_index: int, count: int, *, held_out: bool = False
) -> NDArray[np.float64]:
    """Return the uniforms by which the input of one window is corrupted, float64 [count] in [0, 1).

    Args:
        seed: seed of the corruption, in [0, 2**64).
        window_index: index of the window.
        count: number of uniforms.
        held_out: whether the window is one of the held-out windows, which have their own numbers.

    Raises:
        InvalidArgumentError: seed or window_index outside the 64 bits of a Philox key.
    """
    stream = _HELD_OUT_CORRUPTION if held_out else _CORRUPTION
    return _unit_interval(_words(seed, window_index, stream, count))


def _words(seed: int, window_index: int, stream: int, count: int) -> np.ndarray:
    for name, value in (("seed", seed), ("window_index", window_index)):
        if not 0 <= value < 2**64:
            raise InvalidArgumentError(f"{name} must lie in [0, 2**64), found {value}")
    generator = np.random.Philox(
        counter=np.array([0, 0, 0, stream], dtype=np.uint64),
        key=np.array([seed, window_index], dtype=np.uint64),
    )
    return generator.random_raw(count)


def _unit_interval(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
