"""The cache on disk: a codec, a shard file, a directory, and the tools that keep it sound."""

from sparselogits.store.cache import Cache
from sparselogits.store.codec import codec_for
from sparselogits.store.copy_folder import CopyFolder
from sparselogits.store.export import export
from sparselogits.store.merge import MergeReport, merge
from sparselogits.store.place import Place
from sparselogits.store.push import push
from sparselogits.store.records import CacheStatistics, WindowRecord
from sparselogits.store.repair import RepairReport, repair
from sparselogits.store.sample import CacheSample, Histogram, sample_cache
from sparselogits.store.verify import ShardReport, VerifyReport, verify

__all__ = [
    "Cache",
    "CacheSample",
    "CacheStatistics",
    "CopyFolder",
    "Histogram",
    "MergeReport",
    "Place",
    "RepairReport",
    "ShardReport",
    "VerifyReport",
    "WindowRecord",
    "codec_for",
    "export",
    "merge",
    "push",
    "repair",
    "sample_cache",
    "verify",
]
