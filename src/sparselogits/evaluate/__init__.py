"""What a student learnt: held-out loss, divergence from the teacher, agreement."""

from sparselogits.evaluate.heldout import HeldOut, evaluate

__all__ = ["HeldOut", "evaluate"]
