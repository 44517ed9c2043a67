"""Students made from their teacher by removing blocks, channels and heads."""

from sparselogits.shrink.plan import Target
from sparselogits.shrink.saving import save
from sparselogits.shrink.scores import layer_influence, layer_losses, width_scores
from sparselogits.shrink.shrink import Shrunk, shrink

__all__ = ["Shrunk", "Target", "layer_influence", "layer_losses", "save", "shrink", "width_scores"]
