"""What a student learnt, and what it is taught: held-out figures, gradients beside full KD's."""

from sparselogits.evaluate.calibration import Bin, Calibration, Reliability
from sparselogits.evaluate.compared import Target, standard_targets
from sparselogits.evaluate.drafting import Drafting, draft_from_prefixes
from sparselogits.evaluate.gradients import GradientFidelity, measure_gradients
from sparselogits.evaluate.heldout import FIGURES, HeldOut, evaluate, statistic_of
from sparselogits.evaluate.intervals import (
    Estimate,
    SeedEstimate,
    bootstrap_interval,
    over_seeds,
    paired_interval,
    t_interval,
)

__all__ = [
    "FIGURES",
    "Bin",
    "Calibration",
    "Drafting",
    "Estimate",
    "GradientFidelity",
    "HeldOut",
    "Reliability",
    "SeedEstimate",
    "Target",
    "bootstrap_interval",
    "draft_from_prefixes",
    "evaluate",
    "measure_gradients",
    "over_seeds",
    "paired_interval",
    "standard_targets",
    "statistic_of",
    "t_interval",
]
