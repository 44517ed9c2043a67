"""Reading a cache for training: dataset, resumable order, collator."""

from sparselogits.data.collator import collate
from sparselogits.data.dataset import CacheDataset, TextDataset, rounds_for_entries
from sparselogits.data.order import WindowOrder, WindowRequest, WindowSampler
from sparselogits.data.thinning import Pace, Schedule, Stage

__all__ = [
    "CacheDataset",
    "Pace",
    "Schedule",
    "Stage",
    "TextDataset",
    "WindowOrder",
    "WindowRequest",
    "WindowSampler",
    "collate",
    "rounds_for_entries",
]
