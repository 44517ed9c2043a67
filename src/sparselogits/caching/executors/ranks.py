"""Ranks of torchrun or Slurm: each takes its share of the ranges, and they never talk.

A rank knows its share from the environment alone, so the tasks of a Slurm array need not run at
the same time, or at all: what one leaves undone the next run finds missing. The first rank packs
the text, settles the budget and begins the caches; the others watch the folder until it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparselogits.caching.plan import Share
from sparselogits.errors import CacheError, InvalidArgumentError

WAIT_SECONDS = 6 * 3600.0
"""For packing a large text, or for the first task of an array to be scheduled."""

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Rank:
    """This process among those that divide a build.

    Args:
        share: its part of the work.
        local: its number on this machine, from 0: which device it takes.
        local_count: how many there are on this machine, as far as the launcher says.
    """

    share: Share
    local: int
    local_count: int


def rank_from_environment(environment: Mapping[str, str]) -> Rank:
    """Which rank this is: torchrun's or srun's, times the tasks of a Slurm array if it is in one.

    Read are `RANK` and `WORLD_SIZE` (torchrun, with `LOCAL_RANK`, `LOCAL_WORLD_SIZE`), else
    `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS` (srun; a batch script's own process has no step, and
    `SLURM_NTASKS` there counts tasks that nobody started), and `SLURM_ARRAY_TASK_ID` with its
    `COUNT`, `MIN` and `STEP`.

    Raises:
        InvalidArgumentError: neither launcher's variables are there, or they contradict each other.
    """
    inner = local = None
    if "RANK" in environment and "WORLD_SIZE" in environment:
        inner = Share(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"))
        local = (
            _number(environment, "LOCAL_RANK", 0),
            _number(environment, "LOCAL_WORLD_SIZE", 1),
        )
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        inner = Share(
            _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        )
        local = (_number(environment, "SLURM_LOCALID", 0), _tasks_here(environment))
    outer = _array_task(environment)
    if inner is None and outer is None:
        raise InvalidArgumentError(
            "--executor torchrun finds no ranks in the environment; start it as 'torchrun "
            "--nproc-per-node 8 -m sparselogits cache ... --executor torchrun', by srun, or in a "
            "Slurm array (docs/scaling.md)"
        )
    inner, outer = inner or Share(0, 1), outer or Share(0, 1)
    share = Share(outer.index * inner.count + inner.index, outer.count * inner.count)
    for part in (inner, outer):
        if not 0 <= part.index < part.count:
            raise InvalidArgumentError(
                f"the environment calls this process number {part.index} (from 0) of {part.count}; "
                "the tasks of an array must be without gaps, as in --array=0-15. Submit all of "
                "them again: shards that are there are not made twice"
            )
    return Rank(share, *(local or (0, 1)))


def wait_for_first_rank(
    begun: Callable[[], bool], *, seconds: float = WAIT_SECONDS, every: float = LOOK_SECONDS
) -> None:
    """Return once the first rank has packed the text and begun the caches.

    Args:
        begun: looks whether it has.
        seconds: how long to wait at most.
        every: seconds between two looks.

    Raises:
        CacheError: it has not in that time.
    """
    end = time.monotonic() + seconds
    while not begun():
        if time.monotonic() > end:
            raise CacheError(
                f"the first rank has not begun the cache within {seconds / 3600:g} hours; see what "
                "it says, then start all ranks again"
            )
        time.sleep(every)


def _array_task(environment: Mapping[str, str]) -> Share | None:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
    place = _number(environment, "SLURM_ARRAY_TASK_ID") - first
    return Share(place // step, _number(environment, "SLURM_ARRAY_TASK_COUNT"))


def _tasks_here(environment: Mapping[str, str]) -> int:
    """`SLURM_STEP_TASKS_PER_NODE` reads '4(x2),3'; the largest is taken for every machine."""
    groups = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")
    counts = [group.partition("(")[0] for group in groups]
    return max((int(count) for count in counts if count.isdigit()), default=1)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise InvalidArgumentError(
            f"the environment variable {name} is {text!r}, not a number; start the ranks by "
            "torchrun, srun or a Slurm array (docs/scaling.md)"
        )
    return int(text)
