"""A model's forward pass over windows, its logits handed over a slice of positions at a time."""

from sparselogits.teacher.engine import Engine, LogitsSlice
from sparselogits.teacher.loading import load_teacher
from sparselogits.teacher.transformers_engine import TransformersTeacher

__all__ = ["Engine", "LogitsSlice", "TransformersTeacher", "load_teacher"]
