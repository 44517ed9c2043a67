"""Measure students on held-out text: loss, divergence from the teacher, calibration, drafting."""

from sparselogits.evaluate.calibration import Bin, Calibration, Reliability
from sparselogits.evaluate.drafting import Drafting, draft_from_prefixes
from sparselogits.evaluate.heldout import METRICS, HeldOut, evaluate, statistic_of
from sparselogits.evaluate.intervals import (
    Estimate,
    SeedEstimate,
    bootstrap_interval,
    fieller_interval,
    over_seeds,
    paired_interval,
    t_interval,
)

__all__ = [
    "METRICS",
    "Bin",
    "Calibration",
    "Drafting",
    "Estimate",
    "HeldOut",
    "Reliability",
    "SeedEstimate",
    "bootstrap_interval",
    "draft_from_prefixes",
    "evaluate",
    "fieller_interval",
    "over_seeds",
    "paired_interval",
    "statistic_of",
    "t_interval",
]
