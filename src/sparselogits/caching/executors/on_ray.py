"""Run a build on a Ray cluster: each actor loads a teacher and computes one range at a time.

The calling process sends the next range to each idle actor. If the cluster lacks resources for some
actors, they start when machines join. If an actor dies, the range is computed again, if necessary
by a new actor; the build fails at failure number `TRIES` on the same range.
"""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparselogits.caching.builder import BuildReport
from sparselogits.caching.job import Job
from sparselogits.caching.plan import windows_in
from sparselogits.caching.writer import commit_missing
from sparselogits.errors import (
    CacheError,
    InvalidArgumentError,
    MissingDependencyError,
    StorageError,
    require_whole,
)
from sparselogits.progress import Progress
from sparselogits.store.ranges import Range
from sparselogits.teacher import Engine

TRIES = 3
"""Number of failures on one range, or while loading, at which the build fails.

Deaths of actors and storage errors are counted, and counting restarts when any range is finished.
"""

READY = None
"""Value in place of a range while an actor loads the teacher."""


@dataclass(frozen=True)
class Workers:
    """Number and resources of the actors of a build.

    Args:
        count: largest number of actors; fewer run if the cluster lacks resources.
        threads: number of torch threads per actor, on which the low-order bits of results depend.
        gpus: number of GPUs per actor, possibly a fraction; with 0 each actor reserves `threads`
            CPUs.

    Raises:
        InvalidArgumentError: `count` or `threads` is below 1, or `gpus` is negative or not finite.
    """

    count: int
    threads: int
    gpus: float = 0.0

    def __post_init__(self) -> None:
        count = require_whole("the number of workers", self.count, 1)
        threads = require_whole("the number of threads per worker", self.threads, 1)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "threads", threads)
        if not 0 <= self.gpus < math.inf:  # a comparison with NaN is False
            raise InvalidArgumentError(
                f"the number of GPUs per worker is {self.gpus}; give a finite number of at least 0 "
                "(--gpus)"
            )


class RangeWorker:
    """Ray actor that calls `load` to load a teacher, and computes ranges of a job."""

    def __init__(self, load: Callable[[], Engine], job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self._load, self._job = load, job

    def ready(self) -> None:
        """Load the teacher; not in `__init__`, because Ray converts exceptions there to text."""
        self._engine = self._load()

    def build(self, span: Range) -> None:
        """Compute a range of windows and write it to each cache that lacks it."""
        records, provenance = self._job.compute(self._engine, span)
        commit_missing(self._job.caches, span, records, provenance)


def build_caches_on_ray(
    load: Callable[[], Engine],
    job: Job,
    ranges: Sequence[Range],
    workers: Workers,
    *,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the missing ranges on the Ray cluster to which `connect` connects.

    Args:
        load: function that loads the teacher in each actor. The function and the job are pickled;
            folders that either refers to must exist on every machine.
        job: the build, from `begin_job`.
        ranges: ranges of windows to build.
        workers: number and resources of the actors.
        progress: called at least after each range, with the numbers of windows done and in total;
            not called if no range is missing.

    Raises:
        MissingDependencyError: Ray is not installed.
        IdentityMismatchError: a cache was built from other text.
        CacheError: an existing shard overlaps a range without being equal to it; or an actor died,
            and this was failure number `TRIES` on the same range or while loading the teacher.
        Exception: an actor raised this error; a StorageError is raised at failure number `TRIES`.
    """
    ray = connect()
    missing = job.missing(ranges)
    found = windows_in(ranges) - windows_in(missing)
    if missing:
        actors = _Actors(ray, load, job, workers)
        try:
            actors.run(missing, found, windows_in(ranges), progress)
        finally:
            actors.stop()
    return BuildReport(job.caches, windows_in(missing), found)


class _Actors:
    """Pool of actors that builds ranges."""

    def __init__(self, ray: Any, load: Callable[[], Engine], job: Job, workers: Workers) -> None:
        self._ray, self._workers = ray, workers
        self._actor = ray.remote(
            num_cpus=1 if workers.gpus else workers.threads, num_gpus=workers.gpus
        )(RangeWorker)
        self._arguments = (ray.put(load), ray.put(job), workers.threads)
        self._doing: dict[Any, tuple[Any, Range | None]] = {}
        self._deaths: Counter[Range | None] = Counter()

    def run(
        self, missing: Sequence[Range], done: int, total: int, progress: Progress | None
    ) -> None:
        """Build all missing ranges; `done` of `total` windows existed before."""
        waiting = deque(missing)
        for _ in range(min(self._workers.count, len(missing))):
            self._start_actor()
        while waiting or any(span is not READY for _, span in self._doing.values()):
            if progress is not None:
                progress(done, total)
            (call,), _ = self._ray.wait(list(self._doing))
            actor, span = self._doing.pop(call)
            if self._succeeded(call, span):
                done += 0 if span is READY else span[1] - span[0]
            else:
                if span is not READY:
                    waiting.appendleft(span)
                actor = None
            if actor is None:
                if len(self._doing) < len(waiting) + 1:
                    self._start_actor()
            elif waiting:
                span = waiting.popleft()
                self._doing[actor.build.remote(span)] = actor, span
            else:
                self._ray.kill(actor)
        if progress is not None:
            progress(done, total)

    def stop(self) -> None:
        """Kill all actors; this leaves no partial shards, because shards are written atomically."""
        for actor, _ in self._doing.values():
            self._ray.kill(actor)

    def _start_actor(self) -> None:
        """Start an actor that loads the teacher."""
        actor = self._actor.remote(*self._arguments)
        self._doing[actor.ready.remote()] = actor, READY

    def _succeeded(self, call: Any, span: Range | None) -> bool:
        """Return whether a call succeeded; the caller must repeat a call that failed.

        Args:
            call: Ray's reference to the result.
            span: range of windows that the call computes, or READY.

        Raises:
            CacheError: the actor died, and this was failure number `TRIES`.
            Exception: the call raised this error; a StorageError is raised at failure number
                `TRIES`.
        """
        errors = self._ray.exceptions
        try:
            self._ray.get(call)
        except errors.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, StorageError) or self._is_last_try(span):
                raise cause from error
            return False
        except errors.RayActorError as error:
            if self._is_last_try(span):
                doing = "loading the teacher"
                if span is not READY:
                    doing = f"computing windows {span[0]}:{span[1]}"
                raise CacheError(
                    f"{TRIES} workers died while {doing}, probably for lack of memory; the last "
                    f"error was: {error}. Give each worker more memory, or use fewer workers, then "
                    "start the same command again; finished shards are kept"
                ) from error
            return False
        if span is not READY:
            self._deaths.clear()
        return True

    def _is_last_try(self, span: Range | None) -> bool:
        """Count a failure on a range, or on READY; return whether the build must fail."""
        self._deaths[span] += 1
        return self._deaths[span] >= TRIES


def connect() -> Any:
    """Connect to a Ray cluster, unless this process is connected already; return the ray module.

    The cluster is that of `RAY_ADDRESS`, otherwise one started on this machine, otherwise a new
    local one.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "--executor ray requires Ray, which is not installed: pip install 'sparselogits[ray]'"
        ) from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(log_to_driver=False, logging_level="warning")
    return ray
