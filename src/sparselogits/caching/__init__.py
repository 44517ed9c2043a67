"""Build caches from a teacher, import them from collected logprobs, and retokenize them."""

from sparselogits.caching.builder import (
    BuildReport,
    CacheRequest,
    begin_job,
    build_caches,
    check_request,
)
from sparselogits.caching.collected import ImportReport, import_collected
from sparselogits.caching.job import Job
from sparselogits.caching.plan import Share, shard_ranges
from sparselogits.caching.remote_texts import fetch_texts, publish_text
from sparselogits.caching.retokenized import RetokenizeReport, retokenize
from sparselogits.caching.text import (
    TextPlace,
    names_of_texts,
    opened_texts,
    place_of_text,
    text_of_windows,
    windows_of_texts,
)

__all__ = [
    "BuildReport",
    "CacheRequest",
    "ImportReport",
    "Job",
    "RetokenizeReport",
    "Share",
    "TextPlace",
    "begin_job",
    "build_caches",
    "check_request",
    "fetch_texts",
    "import_collected",
    "names_of_texts",
    "opened_texts",
    "place_of_text",
    "publish_text",
    "retokenize",
    "shard_ranges",
    "text_of_windows",
    "windows_of_texts",
]
