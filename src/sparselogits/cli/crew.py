"""Choose the executor of `sparselogits cache` and the role of this process in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sparselogits.cli.options import device_named
from sparselogits.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sparselogits.caching import BuildReport, CacheRequest, Share, TextPlace
    from sparselogits.caching.executors import Workers
    from sparselogits.corpus import PackedCorpus


@dataclass(frozen=True)
class Crew:
    """Describe the part of this process in a build.

    Args:
        device: device of the teacher.
        share: share of the ranges that this process computes.
        workers: Ray actors that compute instead of this process; None without Ray.
        rank: rank among the processes that run one teacher together; None if each process has a
            teacher.
    """

    device: str
    share: Share
    workers: Workers | None = None
    rank: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process packs the text, creates the cache and prints the result."""
        return self.share.index == 0

    @property
    def follows(self) -> bool:
        """Whether this process only takes part in the forward passes of the first rank."""
        return bool(self.rank)

    def follow(self, engine: Any) -> None:
        """Take part in the passes of the first rank until it is done."""
        from sparselogits.process_group import leave_process_group
        from sparselogits.teacher.tensor_parallel import follow

        follow(engine)
        leave_process_group()

    @contextmanager
    def leading(self, engine: Any) -> Iterator[Any]:
        """Yield the engine for the build, and release the ranks that follow afterwards."""
        if self.rank is None:
            yield engine
            return
        from sparselogits.process_group import leave_process_group
        from sparselogits.teacher.tensor_parallel import Leader

        with Leader(engine) as leader:
            yield leader
        leave_process_group()

    def wait_for_text(self, out: str, find: Callable[[], TextPlace]) -> TextPlace:
        """Wait until the first rank has packed the text and created the cache; return its place."""
        from sparselogits.caching.executors import wait_for_first_rank
        from sparselogits.corpus.packed import Paths
        from sparselogits.store import Cache

        wait_for_first_rank(
            lambda: Cache.exists(out) and Paths(find().folder).index.exists(),
        )
        return find()

    def wait_for_packing(self, find: Callable[[], TextPlace]) -> None:
        """Wait until the first rank has packed the text."""
        from sparselogits.caching.executors import wait_for_first_rank
        from sparselogits.corpus.packed import Paths

        wait_for_first_rank(lambda: Paths(find().folder).index.exists())

    def build(
        self,
        load: Callable[..., Any],
        engine: Any,
        corpus: PackedCorpus,
        requests: Sequence[CacheRequest],
        *,
        only: tuple[int, int] | None,
        windows_per_shard: int,
        first_window: int,
        progress: Callable[[int, int], None],
        **how: Any,
    ) -> BuildReport:
        """Run `build_caches` with this executor; `load` makes a teacher on a given device."""
        from sparselogits.caching import begin_job, build_caches, shard_ranges
        from sparselogits.caching.executors import build_caches_on_ray

        text = {"windows_per_shard": windows_per_shard, "first_window": first_window}
        if self.workers is None:
            return build_caches(
                *(engine, corpus, requests),
                **(text | how),
                only=only,
                share=self.share,
                progress=progress,
            )
        ranges = shard_ranges(corpus.windows, windows_per_shard, only, first_window=first_window)
        job = begin_job(engine, corpus, requests, **(text | how))
        device = "cuda" if self.workers.gpus else "cpu"
        return build_caches_on_ray(
            partial(load, device=device), job, ranges, self.workers, progress=progress
        )


def crew_of(
    executor: str,
    threads: int | None,
    workers: int | None,
    gpus: float | None,
    device: str,
    *,
    split: bool = False,
) -> Crew:
    """Determine the role of this process from options and environment, and set its threads.

    With `split` the ranks of torchrun run one teacher together, and count as one worker.

    Raises:
        InvalidArgumentError: If options belong to another executor, numbers are out of range, or
            the environment has no ranks.
        MissingDependencyError: If Ray is not installed.
    """
    import torch

    from sparselogits.caching.executors import Workers, connect, rank_from_environment
    from sparselogits.caching.plan import WHOLE

    if executor != "ray" and (workers is not None or gpus is not None):
        raise InvalidArgumentError("--workers and --gpus are for --executor ray")
    if (threads or 1) < 1 or (workers or 1) < 1 or (gpus or 0) < 0:
        raise InvalidArgumentError("--threads and --workers must be at least 1, --gpus at least 0")
    if split and executor != "local":
        raise InvalidArgumentError(
            f"--tp-plan makes one worker of the ranks of torchrun; --executor {executor} is for "
            "workers with a teacher each: leave it out, and divide the text by --windows"
        )
    launched: Mapping[str, str] = os.environ
    if split:  # a Slurm array does not say which processes run one teacher together
        launched = {k: v for k, v in launched.items() if not k.startswith("SLURM_")}
    rank = rank_from_environment(launched) if split or executor == "torchrun" else None
    if threads is None and rank is not None:  # torchrun sets one thread
        threads = max(1, len(os.sched_getaffinity(0)) // rank.local_count)
    if threads is not None:
        torch.set_num_threads(threads)
    if split and rank is not None:  # transformers takes the device of the local rank
        return Crew("auto", WHOLE, rank=rank.share.index)
    device = device_named(device)
    if rank is not None:
        if device == "cuda":
            device = f"cuda:{rank.local % torch.cuda.device_count()}"
        return Crew(device, rank.share)
    if executor == "local":
        return Crew(device, WHOLE)
    ray = connect()
    if gpus is None:
        gpus = 1.0 if device.startswith("cuda") else 0.0
    threads = torch.get_num_threads()
    if workers is None:
        room = ray.cluster_resources()
        fit = room.get("GPU", 0) / gpus if gpus else room.get("CPU", 0) / threads
        workers = max(1, int(fit))
    return Crew(device, WHOLE, Workers(workers, threads, gpus))
