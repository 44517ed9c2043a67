"""Round real-valued weights to the levels of a fixed table, so that a weight takes 8 to 10 bits.

Levels are logarithmic, with 32 levels per octave; between 1/2 and 1 they are logarithmic in the
distance to 1. If one token has almost all mass, the mass of the other tokens (the ghost token of
the loss) then has a small relative error. docs/format.md defines the table.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import InvalidTargetsError
from sparselogits.store.bounds import DamageError
from sparselogits.store.codec.columns import Array

STOCHASTIC, NEAREST = "stochastic", "nearest"
"""Names of the rounding modes in a cache's identity."""

PER_OCTAVE = 32
"""Number of levels per factor of two of a weight or, from 1/2 to 1, of the distance to 1."""

LARGEST_STEP = 2 ** (1 / PER_OCTAVE) - 1
"""Largest relative distance of consecutive levels from 2^-126 on, up to float32 rounding."""

_LEAST, _MOST, _NEAREST_TO_ONE = -126, 97, -16  # exponents of two; V^4 is 2^96 at most


@cache
def levels() -> NDArray[np.float32]:
    """Return the read-only table of levels, float32, ascending from 0 to 2^97."""
    low = np.exp2(np.arange(_LEAST * PER_OCTAVE, -PER_OCTAVE) / PER_OCTAVE)
    middle = 1 - np.exp2(np.arange(-PER_OCTAVE, _NEAREST_TO_ONE * PER_OCTAVE - 1, -1) / PER_OCTAVE)
    high = np.exp2(np.arange(_MOST * PER_OCTAVE + 1) / PER_OCTAVE)
    table = np.concatenate([[0.0], low, middle, high]).astype(np.float32)
    table.flags.writeable = False
    return table


def rounded(
    weights: NDArray[np.float32], uniforms: NDArray[np.float64] | None
) -> NDArray[np.float32]:
    """Round weights to levels; weights that are levels do not change.

    Args:
        weights: float32 [E].
        uniforms: float64 [E] in [0, 1), for stochastic rounding: a weight w between the levels a <
            b is rounded to b with probability (w - a) / (b - a), so the expectation of the result
            is w. None rounds to the nearest level; ties go to the lower level.

    Raises:
        InvalidTargetsError: a weight is negative, above 2^97 or NaN.
    """
    table = levels()
    if len(weights) and not 0 <= float(weights.min()) <= float(weights.max()) <= table[-1]:
        raise InvalidTargetsError(
            f"weights are between {weights.min():g} and {weights.max():g}; a cache with rounded "
            f"weights stores 0 to {table[-1]:g}. Store exact weights, or correct the sampler"
        )
    below = np.searchsorted(table[:-1], weights, side="right") - 1
    a, b = table[below].astype(np.float64), table[below + 1].astype(np.float64)
    share = (weights - a) / (b - a)
    above = share > 0.5 if uniforms is None else uniforms < share
    return table[below + above]


def indices_of(weights: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return the indices of weights, float32 [E], in the table of levels.

    Raises:
        InvalidTargetsError: a weight is not a level.
    """
    table = levels()
    indices = np.minimum(np.searchsorted(table, weights), len(table) - 1)
    if not np.array_equal(table[indices], weights):
        other = weights[table[indices] != weights][0]
        raise InvalidTargetsError(
            f"a weight is {other:g}, which is not a level of the cache's codec; round the targets "
            "with `TargetCodec.rounded` first, as `Cache.commit` does"
        )
    return indices.astype(np.uint32)


def levels_at(indices: Array) -> NDArray[np.float32]:
    """Return the levels at the given indices of the table, float32 [E].

    Raises:
        DamageError: an index is out of range.
    """
    table = levels()
    if len(indices) and int(indices.max()) >= len(table):
        raise DamageError(f"found level {indices.max()}, expected a level below {len(table)}")
    return table.take(indices)
