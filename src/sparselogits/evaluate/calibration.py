"""Compute the calibration of token predictions, that is, whether confidence equals accuracy.

The confidence at a position is the model's largest probability, and the position is a hit if the
token with that probability is the true token. With n_b of N positions in bin b,

    ECE = sum_b n_b / N |accuracy_b - confidence_b|

(Naeini et al. 2015; Guo et al. 2017, equation 3). Bins have equal width, as in Guo et al., or equal
mass (Nguyen and O'Connor 2015), which also resolves the small confidences of language models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError

BINS = 15
"""Default number of bins, as in Guo et al."""


@dataclass(frozen=True)
class Bin:
    """Bin of positions with similar confidence: one point of a reliability diagram.

    Args:
        low: lower edge of a bin of equal width, smallest confidence in a bin of equal mass.
        high: upper edge of a bin of equal width, largest confidence in a bin of equal mass.
        confidence: mean confidence of the bin's positions.
        accuracy: share of hits among the bin's positions.
        count: number of positions.
    """

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """Calibration computed with bins of equal width or of equal mass.

    Args:
        ece: expected calibration error, in [0, 1].
        bins: bins with at least one position, ascending in confidence.
        gaps: sum of (confidence - hit) over the positions of each window in each bin, float64
            [W, B], where hit is 1 or 0. Resamples of the windows are computed from these sums.
    """

    ece: float
    bins: tuple[Bin, ...]
    gaps: Tensor = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the fields except `gaps` as JSON values."""
        return {"ece": self.ece, "bins": [asdict(each) for each in self.bins]}


@dataclass(frozen=True)
class Calibration:
    """Calibration of token predictions.

    Args:
        confidence: mean confidence over all positions.
        accuracy: share of positions whose most likely token is the true token.
        equal_width: calibration with bins of equal width in confidence.
        equal_mass: calibration with bins of about equally many positions; equal confidences share a
            bin.
    """

    confidence: float
    accuracy: float
    equal_width: Reliability
    equal_mass: Reliability

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy; positive for an overconfident model."""
        return self.confidence - self.accuracy

    def to_json(self) -> dict[str, Any]:
        """Return the fields and `overconfidence` as JSON values."""
        return {
            "confidence": self.confidence,
            "accuracy": self.accuracy,
            "overconfidence": self.overconfidence,
            "equal_width": self.equal_width.to_json(),
            "equal_mass": self.equal_mass.to_json(),
        }


def signed_confidence(largest: Tensor, likeliest: Tensor, labels: Tensor) -> Tensor:
    """Return the confidence per position, negative for a miss, float32 [P] on the CPU.

    Args:
        largest: largest log-probability per position, float [P].
        likeliest: token with the largest log-probability, int64 [P].
        labels: true tokens, int64 [P].
    """
    confidence = largest.exp().float().clamp_(max=1.0)
    return torch.where(likeliest == labels.to(likeliest.device), confidence, -confidence).cpu()


def measure_calibration(windows: Sequence[Tensor], bins: int = BINS) -> Calibration:
    """Compute the calibration over the positions of all windows.

    Args:
        windows: confidences of each window, float32 [P], as `signed_confidence` returns them.
        bins: number of bins B.

    Raises:
        InvalidArgumentError: there are no positions, or fewer than one bin.
    """
    signed = torch.cat([torch.empty(0), *windows])
    if bins < 1 or not len(signed):
        raise InvalidArgumentError(
            f"found {len(signed)} positions and {bins} bins, expected at least one of each; "
            "measure calibration on text with labels"
        )
    confidence, hit = signed.abs().double(), (signed > 0).double()
    window = torch.repeat_interleave(torch.tensor([len(each) for each in windows]))
    # (b / B, (b + 1) / B] as in Guo et al.; confidence 1 belongs to the last bin
    by_width = (confidence * bins).ceil().long().sub(1).clamp_(0, bins - 1)
    # binned by the number of less confident positions, so that equal confidences share a bin
    below = torch.searchsorted(confidence.sort().values, confidence)
    by_mass = below * bins // len(confidence)
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    return Calibration(
        confidence=float(confidence.mean()),
        accuracy=float(hit.mean()),
        equal_width=_reliability(confidence, hit, window, len(windows), by_width, bins, edges),
        equal_mass=_reliability(confidence, hit, window, len(windows), by_mass, bins, None),
    )


def _reliability(
    confidence: Tensor,
    hit: Tensor,
    window: Tensor,
    windows: int,
    bin_index: Tensor,
    bins: int,
    edges: Tensor | None,
) -> Reliability:
    """Compute the calibration from the confidence, hit, window and bin of each position [N].

    `edges` has the edges of the bins, [B + 1]; None for the range of confidences in each bin.
    """
    count = torch.bincount(bin_index, minlength=bins)
    confidences = torch.bincount(bin_index, confidence, minlength=bins)
    hits = torch.bincount(bin_index, hit, minlength=bins)
    gaps = torch.bincount(window * bins + bin_index, confidence - hit, minlength=windows * bins)
    if edges is None:
        ends = torch.zeros(bins, dtype=torch.float64)
        low = ends.scatter_reduce(0, bin_index, confidence, "amin", include_self=False)
        high = ends.scatter_reduce(0, bin_index, confidence, "amax", include_self=False)
    else:
        low, high = edges[:-1], edges[1:]
    found = tuple(
        Bin(float(low[b]), float(high[b]), float(confidences[b] / n), float(hits[b] / n), n)
        for b, n in enumerate(count.tolist())
        if n
    )
    ece = float((confidences - hits).abs().sum() / len(confidence))
    return Reliability(ece, found, gaps.view(windows, bins))
