"""Run a build in several processes: ranks of torchrun or Slurm, or actors of a Ray cluster.

All executors compute the same ranges by `Job.compute` with the job's batch size, so with equal
devices, library versions and numbers of threads they write the same bytes.
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
