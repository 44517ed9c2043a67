"""Determine the executor of `sparselogits cache` and the role of this process in the build."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sparselogits.devices import resolve_device
from sparselogits.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sparselogits.caching import BuildReport, CacheRequest, Share, TextPlace
    from sparselogits.caching.executors import Workers
    from sparselogits.corpus import PackedCorpus


@dataclass(frozen=True)
class BuildRole:
    """Role of this process in a build, with the steps of the build that depend on the role.

    Args:
        device: device on which this process runs the teacher.
        share: share of the window ranges that this process, or its Ray actors, compute.
        workers: number and resources of the Ray actors that compute instead of this process; None
            without Ray.
        rank: rank among the processes that run one teacher by tensor parallelism; None if each
            process runs a complete teacher.
    """

    device: str
    share: Share
    workers: Workers | None = None
    rank: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process packs the text and creates the cache."""
        return self.share.index == 0 and not self.follows

    @property
    def follows(self) -> bool:
        """Whether this process only takes part in forward passes that the first rank starts."""
        return bool(self.rank)

    def follow(self, engine: Any) -> None:
        """Compute this rank's part of each forward pass until the first rank has finished."""
        from sparselogits.process_group import leave_process_group
        from sparselogits.teacher.tensor_parallel import follow

        follow(engine)
        leave_process_group()

    @contextmanager
    def leading(self, engine: Any) -> Iterator[Any]:
        """Yield the engine for the build; on exit, end `follow` on all other ranks."""
        if self.rank is None:
            yield engine
            return
        from sparselogits.process_group import leave_process_group
        from sparselogits.teacher.tensor_parallel import Leader

        with Leader(engine) as leader:
            yield leader
        leave_process_group()

    def wait_for_text(self, find: Callable[[], TextPlace], out: str | None = None) -> TextPlace:
        """Wait for the first rank to pack the text and create the cache; return where the text is.

        Args:
            find: function that returns the location of the packed text.
            out: folder or URL of the cache; None to wait for the text only.
        """
        from sparselogits.caching.executors import wait_for_first_rank
        from sparselogits.corpus.packed import Paths
        from sparselogits.store import Cache

        def is_ready() -> bool:
            return (out is None or Cache.exists(out)) and Paths(find().folder).index.exists()

        wait_for_first_rank(is_ready)
        return find()

    def build(
        self,
        load: Callable[..., Any],
        engine: Any,
        corpus: PackedCorpus,
        requests: Sequence[CacheRequest],
        *,
        only: tuple[int, int] | None,
        progress: Callable[[int, int], None],
        **options: Any,
    ) -> BuildReport:
        """Build the missing shards of caches in this process, or on Ray if the role has `workers`.

        The function `load` loads the teacher on the device given as `device`. The other arguments
        are those of `build_caches`.
        """
        from sparselogits.caching import begin_job, build_caches, shard_ranges
        from sparselogits.caching.executors import build_caches_on_ray

        if self.workers is None:
            some = {"only": only, "share": self.share} | options
            return build_caches(engine, corpus, requests, progress=progress, **some)
        per_shard, first = options["windows_per_shard"], options["first_window"]
        ranges = shard_ranges(corpus.windows, per_shard, only, first_window=first)
        job = begin_job(engine, corpus, requests, **options)
        load = partial(load, device="cuda" if self.workers.gpus else "cpu")
        return build_caches_on_ray(load, job, ranges, self.workers, progress=progress)


def build_role(
    executor: str,
    threads: int | None,
    workers: int | None,
    gpus: float | None,
    device: str,
    *,
    split: bool = False,
) -> BuildRole:
    """Determine the role of this process, and set its number of PyTorch threads.

    The arguments are the values of the options of `sparselogits cache`; `split` states whether
    `--tp-plan` is given, so that the ranks of torchrun run one teacher by tensor parallelism. If
    `threads` is None, the ranks on a machine divide the processor cores, and without ranks the
    number of threads is not changed.

    Raises:
        InvalidArgumentError: an option belongs to another executor, the environment defines no
            ranks, or the device is not available or, with Ray, has a number.
        MissingDependencyError: Ray is not installed.
    """
    import torch

    from sparselogits.caching.executors import Workers, connect, rank_from_environment
    from sparselogits.caching.plan import WHOLE

    if executor != "ray" and (workers is not None or gpus is not None):
        raise InvalidArgumentError(
            "--workers and --gpus are options of --executor ray; add it, or leave them out"
        )
    if split and executor != "local":
        raise InvalidArgumentError(
            f"--tp-plan combines the ranks of torchrun into one worker, but --executor {executor} "
            "expects one teacher per worker; leave --executor out, and divide the text by --windows"
        )
    launched: Mapping[str, str] = os.environ
    if split:  # a Slurm array does not define which processes run one teacher together
        launched = {k: v for k, v in launched.items() if not k.startswith("SLURM_")}
    rank = rank_from_environment(launched) if split or executor == "torchrun" else None
    if threads is None and rank is not None:  # torchrun sets OMP_NUM_THREADS to 1
        threads = max(1, len(os.sched_getaffinity(0)) // rank.local_count)
    if threads is not None:
        torch.set_num_threads(threads)
    if split and rank is not None:  # transformers selects the device of the local rank
        return BuildRole("auto", WHOLE, rank=rank.share.index)
    device = resolve_device(device)
    if rank is not None:
        if device == "cuda":
            device = f"cuda:{rank.local % torch.cuda.device_count()}"
        return BuildRole(device, rank.share)
    if executor == "local":
        return BuildRole(device, WHOLE)
    if ":" in device:
        raise InvalidArgumentError(
            f"--device is {device}, but Ray chooses the GPU of each worker; give cuda or cpu"
        )
    ray = connect()
    if gpus is None:
        gpus = 1.0 if device.startswith("cuda") else 0.0
    threads = torch.get_num_threads()
    if workers is None:
        resources = ray.cluster_resources()
        fit = resources.get("GPU", 0) / gpus if gpus else resources.get("CPU", 0) / threads
        workers = max(1, int(fit))
    return BuildRole(device, WHOLE, Workers(workers, threads, gpus))
