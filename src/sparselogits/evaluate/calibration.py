"""Whether a model is as often right as it says: calibration of the next-token prediction.

A position's confidence is the model's largest probability, and it is a hit if the token that has it
is the true next one. Positions are put into bins by confidence; with N positions, n_b of them in
bin b,

    ECE = sum_b n_b / N |accuracy_b - confidence_b|

(Naeini et al. 2015; Guo et al. 2017, equation 3). Two ways to bin: intervals of equal width, as
Guo et al. have it, and bins of equal mass (Nguyen and O'Connor 2015), which also tell apart the
many positions of small confidence that a language model has. ECE has no sign; `overconfidence`,
mean confidence minus accuracy, has.

Bins of equal mass need all confidences at once. They are kept as one float32 a position and model,
4 MB for a million positions, the sign saying hit or miss.
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
    """Positions of similar confidence: one point of a reliability diagram.

    Args:
        low: lower end; of equal width its edge, of equal mass the smallest confidence in it.
        high: upper end, likewise.
        confidence: mean over the bin's positions.
        accuracy: share of hits among them.
        count: how many they are.
    """

    low: float
    high: float
    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """One way to bin.

    Args:
        ece: expected calibration error, in [0, 1].
        bins: those that hold a position, by confidence.
        gaps: float64 [W, B], confidence minus hits summed over each window's positions in each
            bin: what a resample of the windows needs. The bins stay as they are in a resample.
    """

    ece: float
    bins: tuple[Bin, ...]
    gaps: Tensor = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without `gaps`."""
        return {"ece": self.ece, "bins": [asdict(own) for own in self.bins]}


@dataclass(frozen=True)
class Calibration:
    """How confidence and accuracy of the next-token prediction go together.

    Args:
        confidence: mean of the largest probability.
        accuracy: share of positions whose likeliest token is the true one.
        equal_width: bins of equal width in confidence.
        equal_mass: bins of equally many positions; equal confidences are never parted.
    """

    confidence: float
    accuracy: float
    equal_width: Reliability
    equal_mass: Reliability

    @property
    def overconfidence(self) -> float:
        """Mean confidence minus accuracy: above zero for a model that is too sure of itself."""
        return self.confidence - self.accuracy

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "confidence": self.confidence,
            "accuracy": self.accuracy,
            "overconfidence": self.overconfidence,
            "equal_width": self.equal_width.to_json(),
            "equal_mass": self.equal_mass.to_json(),
        }


def signed_confidence(largest: Tensor, likeliest: Tensor, labels: Tensor) -> Tensor:
    """Return float32 [P] on the CPU: the confidence, negative where its token is not the label.

    Args:
        largest: float [P], the largest log-probability per position.
        likeliest: int64 [P], its token.
        labels: int64 [P], the true next tokens.
    """
    confidence = largest.exp().float().clamp_(max=1.0)
    return torch.where(likeliest == labels.to(likeliest.device), confidence, -confidence).cpu()


def measure_calibration(windows: Sequence[Tensor], bins: int = BINS) -> Calibration:
    """Calibration over the positions of all windows.

    Args:
        windows: for each window float32 [P], see `signed_confidence`.
        bins: B, how many.

    Raises:
        InvalidArgumentError: for no positions, or less than one bin.
    """
    signed = torch.cat([torch.empty(0), *windows])
    if bins < 1 or not len(signed):
        raise InvalidArgumentError(
            f"calibration needs a position and a bin at least; got {len(signed)} positions and "
            f"{bins} bins"
        )
    confidence, hit = signed.abs().double(), (signed > 0).double()
    window = torch.repeat_interleave(torch.tensor([len(own) for own in windows]))
    # (b / B, (b + 1) / B] as in Guo et al.; certainty belongs to the last bin
    by_width = (confidence * bins).ceil().long().sub(1).clamp_(0, bins - 1)
    # how many positions are less confident decides, so that equal ones share a bin
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
    """Bins of float64 [N] confidences and hits, each in the bin `place` int64 [N]."""
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
