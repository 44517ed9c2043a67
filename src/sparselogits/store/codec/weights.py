"""Name the columns of each kind of weights, and find the counts that a block need not store.

If the sampler draws N rounds, weights are count / N, and one count per position follows from the
others. If light entries share one weight tau, only heavy entries store a number. A real-valued
weight is stored as a float32 number (column `weights`) or rounded to a level (column `levels`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselogits.samplers.sampler import COUNTS, COUNTS_AND_FLOATS, FLOATS, THRESHOLD
from sparselogits.store.codec.lists import Array, Bool

WEIGHT_COLUMNS: dict[str, dict[str, Any]] = {
    COUNTS: {"counts": np.uint32},
    COUNTS_AND_FLOATS: {"counts": np.uint32, "weights": np.float32},
    FLOATS: {"weights": np.float32},
    THRESHOLD: {"heavy": np.uint32, "weights": np.float32},
}


def weight_columns(weights: str, *, rounded: bool) -> dict[str, Any]:
    """Return the names and dtypes of the columns of a kind of weights, in order."""
    columns = WEIGHT_COLUMNS[weights]
    if not rounded:
        return columns
    others = {name: dtype for name, dtype in columns.items() if name != "weights"}
    return others | {"levels": np.uint32}


def weights_of_counts(counts: Array, rounds: int) -> NDArray[np.float32]:
    """Return count / rounds, float32 [E], rounded once."""
    weights = counts.astype(np.float32)
    weights /= np.float32(rounds)
    return weights


def derived_entries(starts: Array, is_hit: Bool, has_hit: Bool) -> Bool:
    """Return the one entry per position whose count follows from the others, bool [E].

    It is the entry of the position's label if that is in the set, and the first entry if not: the
    likeliest entry, whose count would cost most.

    Args:
        starts: int64 [Q]: the first entry of each position that carries a target.
        is_hit: bool [E]: whether an entry is that of its position's label.
        has_hit: bool [Q]: whether a position has such an entry.
    """
    derived = is_hit.copy()
    derived[starts[~has_hit]] = True
    return derived
