"""Compute the calibration of next-token predictions: whether confidence equals accuracy.

The confidence at a position is the model's largest probability, and the position is a hit if the
token with that probability is the true next one. Positions are binned by confidence; with N
positions, n_b of them in bin b,

    ECE = sum_b n_b / N |accuracy_b - confidence_b|

(Naeini et al. 2015; Guo et al. 2017, equation 3). Bins have equal width, as in Guo et al., or equal
mass (Nguyen and O'Connor 2015), which also resolve the many positions of small confidence of a
language model. ECE has no sign; `overconfidence`, mean confidence minus accuracy, has one.

Bins of equal mass need all confidences at once. They are stored as one float32 per position and
model, 4 MB per million positions, with the sign for hit or miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Hold positions of similar confidence: one point of a reliability diagram.

    Args:
        low: lower edge for equal width, smallest confidence in the bin for equal mass.
        high: upper edge for equal width, largest confidence in the bin for equal mass.
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
    """Hold the bins of one kind, and their calibration error.

    Args:
        ece: expected calibration error, in [0, 1].
        bins: bins with at least one position, ascending in confidence.
        gaps: float64 [W, B], confidence minus hits summed over each window's positions in each
            bin, for resamples of the windows. Resamples do not change the bins.
    """

    ece: float
    bins: tuple[Bin, ...]
    gaps: Tensor = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without `gaps`."""
        return {"ece": self.ece, "bins": [asdict(own) for own in self.bins]}


@dataclass(frozen=True)
class Calibration:
    """Describe the calibration of next-token predictions.

    Args:
        confidence: mean of the largest probability.
        accuracy: share of positions whose likeliest token is the true one.
        equal_width: bins of equal width in confidence.
        equal_mass: bins of equally many positions; equal confidences share a bin.
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
        """Return plain JSON values."""
        return {
            "confidence": self.confidence,
            "accuracy": self.accuracy,
            "overconfidence": self.overconfidence,
            "equal_width": self.equal_width.to_json(),
            "equal_mass": self.equal_mass.to_json(),
        }


def signed_confidence(largest: Tensor, likeliest: Tensor, labels: Tensor) -> Tensor:
    """Return the confidence, negative where its token is not the label: float32 [P] on the CPU.

    Args:
        largest: float [P], largest log-probability per position.
        likeliest: int64 [P], token with the largest log-probability.
        labels: int64 [P], true next tokens.
    """
    confidence = largest.exp().float().clamp_(max=1.0)
    return torch.where(likeliest == labels.to(likeliest.device), confidence, -confidence).cpu()


def measure_calibration(windows: Sequence[Tensor], bins: int = BINS) -> Calibration:
    """Compute the calibration over the positions of all windows.

    Args:
        windows: float32 [P] per window, see `signed_confidence`.
        bins: number of bins B.

    Raises:
        InvalidArgumentError: If there are no positions, or fewer than one bin.
    """
    signed = torch.cat([torch.empty(0), *windows])
    if bins < 1 or not len(signed):
        raise InvalidArgumentError(
            f"calibration needs at least one position and one bin; got {len(signed)} positions and "
            f"{bins} bins"
        )
    confidence, hit = signed.abs().double(), (signed > 0).double()
    window = torch.repeat_interleave(torch.tensor([len(own) for own in windows]))
    # (b / B, (b + 1) / B] as in Guo et al.; confidence 1 belongs to the last bin
    by_width = (confidence * bins).ceil().long().sub(1).clamp_(0, bins - 1)
    # the number of less confident positions decides, so that equal confidences share a bin
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
    place: Tensor,
    bins: int,
    edges: Tensor | None,
) -> Reliability:
    """Return the bins of confidences and hits, float64 [N], from bin numbers `place`, int64 [N]."""
    count = torch.bincount(place, minlength=bins)
    sure = torch.bincount(place, confidence, minlength=bins)
    right = torch.bincount(place, hit, minlength=bins)
    gaps = torch.bincount(window * bins + place, confidence - hit, minlength=windows * bins)
    if edges is None:
        ends = torch.zeros(bins, dtype=torch.float64)
        low = ends.scatter_reduce(0, place, confidence, "amin", include_self=False)
        high = ends.scatter_reduce(0, place, confidence, "amax", include_self=False)
    else:
        low, high = edges[:-1], edges[1:]
    found = tuple(
        Bin(float(low[b]), float(high[b]), float(sure[b] / n), float(right[b] / n), n)
        for b, n in enumerate(count.tolist())
        if n
    )
    ece = float((sure - right).abs().sum() / len(confidence))
    return Reliability(ece, found, gaps.view(windows, bins))
