"""Compute the loss of a student against a cached (sparse) or an online (dense) teacher."""

from sparselogits.losses.call import LossParts
from sparselogits.losses.criterion import Criterion, MissingMass, require_rule_for
from sparselogits.losses.dense import DIVERGENCES, Divergence, TeacherHead, linear_dense_kd
from sparselogits.losses.functional import (
    SparseKDLoss,
    linear_sparse_cross_entropy,
    sparse_cross_entropy,
)
from sparselogits.losses.parallel import (
    sequence_parallel_sparse_cross_entropy,
    vocabulary_parallel_sparse_cross_entropy,
)

__all__ = [
    "DIVERGENCES",
    "Criterion",
    "Divergence",
    "LossParts",
    "MissingMass",
    "SparseKDLoss",
    "TeacherHead",
    "linear_dense_kd",
    "linear_sparse_cross_entropy",
    "require_rule_for",
    "sequence_parallel_sparse_cross_entropy",
    "sparse_cross_entropy",
    "vocabulary_parallel_sparse_cross_entropy",
]
