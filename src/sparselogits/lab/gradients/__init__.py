"""Compare the gradients of sparse targets with those of full distillation."""

from sparselogits.lab.gradients.compared import Target, standard_targets
from sparselogits.lab.gradients.measure import GradientFidelity, measure_gradients

__all__ = ["GradientFidelity", "Target", "measure_gradients", "standard_targets"]
