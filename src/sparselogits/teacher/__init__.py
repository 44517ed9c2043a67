"""Run a teacher over windows, and yield its logits for a slice of positions at a time."""

from sparselogits.teacher.conformance import check_engine
from sparselogits.teacher.engine import Engine, LogitsSlice
from sparselogits.teacher.loading import load_teacher
from sparselogits.teacher.mixture import MixtureTeacher
from sparselogits.teacher.module_engine import ModuleTeacher
from sparselogits.teacher.transformers_engine import TransformersTeacher
from sparselogits.teacher.vllm_engine import VllmTeacher, load_vllm_teacher

__all__ = [
    "Engine",
    "LogitsSlice",
    "MixtureTeacher",
    "ModuleTeacher",
    "TransformersTeacher",
    "VllmTeacher",
    "check_engine",
    "load_teacher",
    "load_vllm_teacher",
]
