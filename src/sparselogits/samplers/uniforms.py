"""Generate random numbers from a counter, keyed by seed and window index alone.

Batch size, rank, executor and restarts therefore do not change a draw. The generator is Philox 4x64
with ten rounds. The generator's raw 64-bit words are scaled here, because NumPy guarantees the raw
stream across versions, but not the output of distribution methods.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparselogits.errors import InvalidArgumentError

_SAMPLING, _THINNING, _ROUNDING, _CORRUPTION, _HELD_OUT_CORRUPTION, _RETOKENIZING = range(6)
"""Highest word of each stream's counter; the words differ, so the streams never overlap."""


def window_uniforms(seed: int, window_index: int, positions: int, per_position: int) -> Tensor:
    """Return the uniforms that a sampler uses for one window.

    Args:
        seed: random seed of the cache, in [0, 2**64).
        window_index: index of the window in the corpus, in [0, 2**64).
        positions: number P of positions.
        per_position: number U of uniforms per position, which is the sampler's
            `uniforms_per_position`.

    Returns:
        float64 [P, U], multiples of 2**-53 in [0, 1).

    Raises:
        InvalidArgumentError: `seed` or `window_index` is not in [0, 2**64).

    Examples:
        >>> window_uniforms(0, 7, 1024, 1).shape
        torch.Size([1024, 1])
    """
    words = _words(seed, window_index, _SAMPLING, positions * per_position)
    return torch.from_numpy(_unit_interval(words)).view(positions, per_position)


def thinning_starts(
    seed: int, epoch: int, window_index: int, positions: int, stride: int
) -> Tensor:
    """Choose, per position, the subset of the cached rounds that an epoch trains on.

    Over any `stride` consecutive epochs a position uses each subset once, so the average of the
    targets over these epochs is the cached target. The step between consecutive epochs is the next
    number from about 0.618 * stride on that has no factor in common with `stride`, so the average
    over a few epochs is already close to the cached target. The first subset is random.

    Args:
        seed: random seed of the training run, in [0, 2**64).
        epoch: index of the epoch, from 0.
        window_index: index of the window in the corpus, in [0, 2**64).
        positions: number P of positions.
        stride: number of subsets, from `targets.thinning_choices(cached, kept)`.

    Returns:
        The first round of each position's subset, int64 [P] in [0, stride), uniform and independent
        over positions.

    Raises:
        InvalidArgumentError: `stride` is below 1, `epoch` is negative, or `seed` or `window_index`
            is not in [0, 2**64).

    Examples:
        >>> starts = [int(thinning_starts(0, epoch, 7, 1, 4)) for epoch in range(4)]
        >>> sorted(starts)
        [0, 1, 2, 3]
    """
    if stride < 1 or epoch < 0:
        raise InvalidArgumentError(
            f"stride must be at least 1 and epoch at least 0, found {stride} and {epoch}; give "
            "thinning_choices(cached, kept) and an index from 0"
        )
    first = _unit_interval(_words(seed, window_index, _THINNING, positions)) * stride
    step = next(s for s in range(round(stride * 0.618), 2 * stride) if math.gcd(s, stride) == 1)
    return torch.from_numpy((first.astype(np.int64) + epoch * step) % stride)


def rounding_uniforms(seed: int, window_index: int, entries: int) -> NDArray[np.float64]:
    """Return uniforms in [0, 1) for rounding a window's weights, float64 [entries]."""
    return _unit_interval(_words(seed, window_index, _ROUNDING, entries))


def corruption_uniforms(
    seed: int, window_index: int, count: int, *, held_out: bool = False
) -> NDArray[np.float64]:
    """Return uniforms for the corruption of a window's input, float64 [count] in [0, 1).

    Training windows and held-out windows are numbered separately and use separate streams.
    """
    stream = _HELD_OUT_CORRUPTION if held_out else _CORRUPTION
    return _unit_interval(_words(seed, window_index, stream, count))


def retokenizing_uniforms(seed: int, window_index: int, count: int) -> NDArray[np.float64]:
    """Return uniforms in [0, 1) that choose rounds to retokenize a window, float64 [count]."""
    return _unit_interval(_words(seed, window_index, _RETOKENIZING, count))


def _words(seed: int, window_index: int, stream: int, count: int) -> np.ndarray:
    """Return the first `count` raw words of one of a window's streams, uint64 [count]."""
    for name, value in (("seed", seed), ("window_index", window_index)):
        if not 0 <= value < 2**64:
            raise InvalidArgumentError(
                f"{name} must be in [0, 2**64), found {value}; give a number in this range"
            )
    generator = np.random.Philox(
        counter=np.array([0, 0, 0, stream], dtype=np.uint64),
        key=np.array([seed, window_index], dtype=np.uint64),
    )
    return generator.random_raw(count)


def _unit_interval(words: np.ndarray) -> np.ndarray:
    """Convert uint64 words to float64 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
