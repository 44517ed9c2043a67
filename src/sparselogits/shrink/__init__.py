"""Create students from a teacher by removing blocks, channels and heads (structured pruning)."""

from sparselogits.shrink.plan import ShrinkTarget
from sparselogits.shrink.saving import save
from sparselogits.shrink.scores import layer_influence, layer_losses, width_scores
from sparselogits.shrink.shrink import Shrunk, shrink

__all__ = [
    "ShrinkTarget",
    "Shrunk",
    "layer_influence",
    "layer_losses",
    "save",
    "shrink",
    "width_scores",
]
