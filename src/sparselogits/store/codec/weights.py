"""Define the columns for each kind of weights, and select the counts that are not stored.

If the sampler draws N rounds, weights are count / N, and one count per position follows from the
others. If light entries share the weight tau, only the weights of heavy entries are stored. A
real-valued weight is stored as float32 (column `weights`) or as the index of a level (`levels`).
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
"""Names and dtypes of the columns for exact weights, by kind of weights."""


def weight_columns(weights: str, *, rounded: bool) -> dict[str, Any]:
    """Return the names and dtypes of the columns for a kind of weights, in order.

    Args:
        weights: kind of the weights, a key of `WEIGHT_COLUMNS`.
        rounded: whether real-valued weights are rounded to levels.
    """
    columns = WEIGHT_COLUMNS[weights]
    if not rounded:
        return columns
    others = {name: dtype for name, dtype in columns.items() if name != "weights"}
    return others | {"levels": np.uint32}


def weights_of_counts(counts: Array, rounds: int) -> NDArray[np.float32]:
    """Convert counts to the weights count / rounds, float32 [E]."""
    weights = counts.astype(np.float32)
    weights /= np.float32(rounds)
    return weights


def derived_entries(starts: Array, is_hit: Bool, has_hit: Bool) -> Bool:
    """Return a mask of the entries whose counts are not stored, bool [E].

    One count per position follows from the others. It is the count of the label's entry if there is
    one, because that count is usually large, and otherwise the count of the first entry.

    Args:
        starts: int64 [Q], index of the first entry of each position with a target.
        is_hit: bool [E], whether the entry's id is the position's label.
        has_hit: bool [Q], whether the label of the position has an entry.
    """
    derived = is_hit.copy()
    derived[starts[~has_hit]] = True
    return derived
