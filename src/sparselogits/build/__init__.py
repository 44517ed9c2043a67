"""Windows of a corpus through a teacher into caches: the plan, the work, and who runs it."""

from sparselogits.build.builder import BuildReport, CacheRequest, build_caches
from sparselogits.build.plan import shard_ranges
from sparselogits.build.text import TextPlace, place_of_text, windows_of_texts
from sparselogits.build.texts_elsewhere import fetch_texts, publish_text

__all__ = [
    "BuildReport",
    "CacheRequest",
    "TextPlace",
    "build_caches",
    "fetch_texts",
    "place_of_text",
    "publish_text",
    "shard_ranges",
    "windows_of_texts",
]
