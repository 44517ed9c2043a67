"""Store caches: codec, shards, storages, and tools for existing caches."""

from sparselogits.store.cache import Cache
from sparselogits.store.codec.target_codec import codec_for
from sparselogits.store.records import CacheStatistics, WindowRecord
from sparselogits.store.storage.copy_folder import CopyFolder
from sparselogits.store.storage.location import Location
from sparselogits.store.tools.export import export
from sparselogits.store.tools.merge import MergeReport, merge
from sparselogits.store.tools.push import push
from sparselogits.store.tools.repair import RepairReport, repair
from sparselogits.store.tools.sample import (
    CacheSample,
    Histogram,
    LabelStatistics,
    sample_cache,
    sampled_windows,
    statistics_by_label,
)
from sparselogits.store.tools.verify import ShardReport, VerifyReport, verify

__all__ = [
    "Cache",
    "CacheSample",
    "CacheStatistics",
    "CopyFolder",
    "Histogram",
    "LabelStatistics",
    "Location",
    "MergeReport",
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
    "sampled_windows",
    "statistics_by_label",
    "verify",
]
