"""Train students from a cache, from labels alone, or with the teacher online."""

from sparselogits.process_group import leave_process_group
from sparselogits.train.averaging import average_checkpoints
from sparselogits.train.recipe import Recipe, load_recipe
from sparselogits.train.run import PlannedRun, RunResult, run, save_untrained
from sparselogits.train.trainer import SparseKDTrainer

__all__ = [
    "PlannedRun",
    "Recipe",
    "RunResult",
    "SparseKDTrainer",
    "average_checkpoints",
    "leave_process_group",
    "load_recipe",
    "run",
    "save_untrained",
]
