"""What a student learnt, and what it is taught: held-out figures, gradients beside full KD's."""

from sparselogits.evaluate.compared import Target, standard_targets
from sparselogits.evaluate.gradients import GradientFidelity, measure_gradients
from sparselogits.evaluate.heldout import HeldOut, evaluate
from sparselogits.evaluate.intervals import Estimate, t_interval

__all__ = [
    "Estimate",
    "GradientFidelity",
    "HeldOut",
    "Target",
    "evaluate",
    "measure_gradients",
    "standard_targets",
    "t_interval",
]
