"""Run a build on a Ray cluster: each actor holds a teacher and computes one range at a time.

This process keeps the list of ranges, and an idle actor receives the next one. Actors for which the
cluster has no room wait until machines join. An actor that dies is replaced, and another actor
computes its range.
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
from sparselogits.caching.writer import commit_missing
from sparselogits.errors import CacheError, MissingDependencyError, StorageError
from sparselogits.progress import Progress
from sparselogits.store.ranges import Range
from sparselogits.teacher import Engine

TRIES = 3
"""Number of times that actors may die with the same range, or before any range is done, until the
build fails."""

READY = None
"""Marks, in place of a range, the call in which an actor loads the teacher."""


@dataclass(frozen=True)
class Workers:
    """The actors of a build.

    Args:
        count: largest number of actors; fewer run while the cluster has no room.
        threads: number of torch threads per actor; equal numbers give equal bytes.
        gpus: number of GPUs per actor, possibly a fraction; with 0 each actor takes `threads` CPUs.
    """

    count: int
    threads: int
    gpus: float = 0.0


class RangeWorker:
    """An actor: it holds a teacher and computes ranges."""

    def __init__(self, load: Callable[[], Engine], job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self._load, self._job = load, job

    def ready(self) -> None:
        """Load the teacher; Ray would pass on exceptions of the constructor as text only."""
        self._engine = self._load()

    def build(self, span: Range) -> None:
        """Compute a range and commit it to every cache that lacks it."""
        made, provenance = self._job.compute(self._engine, span)
        commit_missing(self._job.caches, span, made, provenance)


def build_caches_on_ray(
    load: Callable[[], Engine],
    job: Job,
    ranges: Sequence[Range],
    workers: Workers,
    *,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the missing ranges on the Ray cluster of `RAY_ADDRESS`, or on this machine.

    Args:
        load: loads the teacher; called in each actor. It is pickled like the job, and their folders
            must exist on every machine.
        job: the build, from `begin_job`.
        ranges: ranges to build.
        workers: number and resources of the actors.
        progress: called after every range with windows done and their total.

    Raises:
        MissingDependencyError: Ray is not installed.
        CacheError: actors died `TRIES` times with one range, or while loading the teacher.
        SparseLogitsError: a range failed in an actor.
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
    """The actors of a build, the range of each, and the remaining ranges."""

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
        """Stop all actors; a shard that is being written is whole or absent."""
        for actor, _ in self._doing.values():
            self._ray.kill(actor)

    def _engage(self) -> None:
        actor = self._actor.remote(*self._arguments)
        self._doing[actor.ready.remote()] = actor, READY

    def _succeeded(self, call: Any, span: Range | None) -> bool:
        """Return False where the actor died, or storage failed, and the range should be retried."""
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
                doing = (
                    "loading the teacher"
                    if span is READY
                    else f"computing windows {span[0]}:{span[1]}"
                )
                raise CacheError(
                    f"{TRIES} workers died while {doing}, most likely for lack of memory; the last "
                    f"one: {error}. Finished shards are kept: give each worker more memory, or use "
                    "fewer workers, and start the same command again"
                ) from error
            return False
        if span is not READY:
            self._deaths.clear()
        return True

    def _is_last_try(self, span: Range | None) -> bool:
        self._deaths[span] += 1
        return self._deaths[span] >= TRIES


def connect() -> Any:
    """Return the ray module, connected to the cluster of `RAY_ADDRESS` or to a new local one.

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
