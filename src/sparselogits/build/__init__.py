"""Windows of a corpus through a teacher into caches: the plan, the work, and who runs it."""

from sparselogits.build.builder import BuildReport, CacheRequest, build_caches
from sparselogits.build.plan import shard_ranges
from sparselogits.build.text import Place, place_of_text, windows_of_texts

__all__ = [
    "BuildReport",
    "CacheRequest",
    "Place",
    "build_caches",
    "place_of_text",
    "shard_ranges",
    "windows_of_texts",
]
