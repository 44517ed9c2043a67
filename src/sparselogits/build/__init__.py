"""Windows of a corpus through a teacher into caches: the plan, the work, and who runs it."""

from sparselogits.build.builder import BuildReport, CacheRequest, build_caches
from sparselogits.build.corpus_copy import fetch_corpus, publish_corpus
from sparselogits.build.plan import shard_ranges

__all__ = [
    "BuildReport",
    "CacheRequest",
    "build_caches",
    "fetch_corpus",
    "publish_corpus",
    "shard_ranges",
]
