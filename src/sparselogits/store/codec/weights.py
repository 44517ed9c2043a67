"""Which weights targets carry, and what a block need not say about them.

Where the sampler draws N rounds, weights are count / N, and one count a position follows from the
others; where weights are a threshold's, tail entries weigh tau and only heavy ones carry a number.
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


def weights_of_counts(counts: Array, rounds: int) -> NDArray[np.float32]:
    """float32 [E]: count / rounds, rounded once."""
    weights = counts.astype(np.float32)
    weights /= np.float32(rounds)
    return weights


def derived_entries(starts: Array, is_hit: Bool, has_hit: Bool) -> Bool:
    """bool [E]: the one entry of each carrying position whose count follows from the others.

    It is the true next token's where that is in the set, and the first one's elsewhere: the
    likeliest entry, whose count would cost most.

    Args:
        starts: int64 [Q]: the first entries of the carrying positions.
        is_hit: bool [E]: whether an entry is the true next token's.
        has_hit: bool [Q]: whether a position has such an entry.
    """
    derived = is_hit.copy()
    derived[starts[~has_hit]] = True
    return derived
