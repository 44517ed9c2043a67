"""Reading a cache for training: dataset, resumable order, collator."""

from sparselogits.data.collator import collate
from sparselogits.data.dataset import CacheDataset, TextDataset
from sparselogits.data.order import WindowOrder, WindowRequest, WindowSampler

__all__ = [
    "CacheDataset",
    "TextDataset",
    "WindowOrder",
    "WindowRequest",
    "WindowSampler",
    "collate",
]
