"""Provide datasets, a resumable order and a collator for training from caches."""

from sparselogits.data.collator import collate
from sparselogits.data.dataset import CacheDataset, TextDataset, rounds_for_entries
from sparselogits.data.decoding import decode
from sparselogits.data.draft import DraftVocabulary, teacher_mass
from sparselogits.data.mixture import Mixture, Weights
from sparselogits.data.order import WindowOrder, WindowRequest, WindowSampler
from sparselogits.data.rows import TokenisedRows, as_windows
from sparselogits.data.thinning import Pace, Schedule, Stage

__all__ = [
    "CacheDataset",
    "DraftVocabulary",
    "Mixture",
    "Pace",
    "Schedule",
    "Stage",
    "TextDataset",
    "TokenisedRows",
    "Weights",
    "WindowOrder",
    "WindowRequest",
    "WindowSampler",
    "as_windows",
    "collate",
    "decode",
    "rounds_for_entries",
    "teacher_mass",
]
