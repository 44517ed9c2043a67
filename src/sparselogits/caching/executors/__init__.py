"""Run a build in several processes: ranks that divide it, or actors of a Ray cluster.

Every executor computes the same ranges by `Job.compute`, with a thread count that it sets and the
batch size of the job, so all executors write the same bytes for the same ranges.
"""

from sparselogits.caching.executors.on_ray import Workers, build_caches_on_ray, connect
from sparselogits.caching.executors.ranks import Rank, rank_from_environment, wait_for_first_rank

__all__ = [
    "Rank",
    "Workers",
    "build_caches_on_ray",
    "connect",
    "rank_from_environment",
    "wait_for_first_rank",
]
