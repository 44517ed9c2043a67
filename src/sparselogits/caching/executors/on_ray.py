"""A build on a Ray cluster: actors that hold a teacher each, one range at a time.

This process keeps the list of ranges and says which are done; an actor gets a range when it is
free. Actors beyond what the cluster has room for wait until machines join, and then take part; one
that dies loses the range in its hands, which another takes, and is replaced.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparselogits.caching.builder import BuildReport
from sparselogits.caching.job import Job
from sparselogits.caching.plan import windows_in
from sparselogits.errors import CacheError, MissingDependencyError, StorageError
from sparselogits.progress import Progress
from sparselogits.store.ranges import Range
from sparselogits.teacher import Engine

TRIES = 3
"""Times that a range may take its actor down with it, and that actors may die one after another
before any range is done, until the build gives up."""

READY = None
"""Stands for a range where an actor's call says that its teacher is loaded."""


@dataclass(frozen=True)
class Workers:
    """The actors of a build.

    Args:
        count: as many at most; fewer while the cluster has no room for more.
        threads: of torch in each; the same number gives the same bytes as another executor.
        gpus: of each, fractions included; 0 for the CPU, and then each takes `threads` CPUs.
    """

    count: int
    threads: int
    gpus: float = 0.0


class RangeWorker:
    """What runs in an actor: a teacher, and ranges through it."""

    def __init__(self, load: Callable[[], Engine], job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self._load, self._job = load, job

    def ready(self) -> None:
        """Load the teacher. Not in the constructor, whose exceptions Ray passes on as text."""
        self._engine = self._load()

    def build(self, span: Range) -> None:
        """Compute a range, and commit it to every cache that lacks it."""
        made, provenance = self._job.compute(self._engine, span)
        for cache, records in zip(self._job.caches, made, strict=True):
            if not cache.holds(span):
                cache.commit(records, provenance)


def build_caches_on_ray(
    load: Callable[[], Engine],
    job: Job,
    ranges: Sequence[Range],
    workers: Workers,
    *,
    progress: Progress | None = None,
) -> BuildReport:
    """Build what is missing of the ranges on the Ray cluster of `RAY_ADDRESS`, or on this machine.

    Args:
        load: makes a teacher; called in each actor. It and the job are pickled, and the folders
            they name must be those of every machine.
        job: the build, begun (`begin_job`).
        ranges: the work.
        workers: how many actors, and what each needs.
        progress: called after every range.

    Raises:
        MissingDependencyError: Ray is not installed.
        CacheError: a range or the loading of the teacher killed its actor `TRIES` times.
        SparseLogitsError: whatever a range raised, as here.
    """
    ray = connect()
    missing = job.missing(ranges)
    found = windows_in(ranges) - windows_in(missing)
    if missing:
        crew = _Crew(ray, load, job, workers)
        try:
            crew.run(missing, found, windows_in(ranges), progress)
        finally:
            crew.dismiss()
    return BuildReport(job.caches, windows_in(missing), found)


class _Crew:
    """The actors, what each is doing, and what is left."""

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
        waiting = deque(missing)
        for _ in range(min(self._workers.count, len(missing))):
            self._engage()
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
                    self._engage()
            elif waiting:
                span = waiting.popleft()
                self._doing[actor.build.remote(span)] = actor, span
            else:
                self._ray.kill(actor)
        if progress is not None:
            progress(done, total)

    def dismiss(self) -> None:
        """End all actors; a shard on its way is whole or absent."""
        for actor, _ in self._doing.values():
            self._ray.kill(actor)

    def _engage(self) -> None:
        actor = self._actor.remote(*self._arguments)
        self._doing[actor.ready.remote()] = actor, READY

    def _succeeded(self, call: Any, span: Range | None) -> bool:
        """False where the actor died, or storage failed, and another try is due."""
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
                doing = "loading the teacher" if span is READY else f"windows {span[0]}:{span[1]}"
                raise CacheError(
                    f"{TRIES} workers died while at {doing}, most likely for want of memory; the "
                    f"last one: {error}. What is finished is kept"
                ) from error
            return False
        if span is not READY:
            self._deaths.clear()
        return True

    def _is_last_try(self, span: Range | None) -> bool:
        self._deaths[span] += 1
        return self._deaths[span] >= TRIES


def connect() -> Any:
    """The ray module, connected to the cluster of `RAY_ADDRESS`, or to one it starts here.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "--executor ray needs Ray: pip install 'sparselogits[ray]'"
        ) from error
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(log_to_driver=False, logging_level="warning")
    return ray
