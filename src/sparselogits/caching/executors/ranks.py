"""Divide a build among ranks of torchrun or Slurm, without communication.

A rank derives its share from the environment alone, so the tasks of a Slurm array need not run at
the same time, or at all: the next run builds what a task did not finish. The first rank packs the
text, resolves the budget and creates the caches; the others poll the folder until it has done so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparselogits.caching.plan import Share
from sparselogits.errors import CacheError, InvalidArgumentError

WAIT_SECONDS = 6 * 3600.0
"""Longest wait for the first rank: for packing a large text, or until it is scheduled."""

LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Rank:
    """The position of this process among those that divide a build.

    Args:
        share: share of the work.
        local: number of the process on this machine, from 0, which selects the device.
        local_count: number of processes on this machine, as far as the launcher tells.
    """

    share: Share
    local: int
    local_count: int


def rank_from_environment(environment: Mapping[str, str]) -> Rank:
    """Return the rank of this process under torchrun or srun, within the tasks of a Slurm array.

    It reads `RANK` and `WORLD_SIZE` (torchrun, with `LOCAL_RANK`, `LOCAL_WORLD_SIZE`), else
    `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS` (srun; a batch script's own process has no step, and
    its `SLURM_NTASKS` counts tasks that were not started), and `SLURM_ARRAY_TASK_ID` with its
    `COUNT`, `MIN` and `STEP`.

    Raises:
        InvalidArgumentError: the variables of a launcher are missing or inconsistent.
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
            "--executor torchrun finds no ranks in the environment; start the command as 'torchrun "
            "--nproc-per-node 8 -m sparselogits cache ... --executor torchrun', by srun, or in a "
            "Slurm array (docs/scaling.md)"
        )
    inner, outer = inner or Share(0, 1), outer or Share(0, 1)
    share = Share(outer.index * inner.count + inner.index, outer.count * inner.count)
    for part in (inner, outer):
        if not 0 <= part.index < part.count:
            raise InvalidArgumentError(
                f"the environment gives this process the number {part.index} (from 0) of "
                f"{part.count}; the tasks of an array must have no gaps, as in --array=0-15. "
                "Submit all of them again: existing shards are not built twice"
            )
    return Rank(share, *(local or (0, 1)))


def wait_for_first_rank(
    begun: Callable[[], bool], *, seconds: float = WAIT_SECONDS, every: float = LOOK_SECONDS
) -> None:
    """Return once the first rank has packed the text and begun the caches.

    Args:
        begun: returns whether the first rank has done so.
        seconds: longest time to wait.
        every: seconds between two calls of `begun`.

    Raises:
        CacheError: the first rank has not done so in that time.
    """
    end = time.monotonic() + seconds
    while not begun():
        if time.monotonic() > end:
            raise CacheError(
                f"the first rank has not begun the cache within {seconds / 3600:g} hours; read its "
                "output, then start all ranks again"
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
    """Return the largest number in `SLURM_STEP_TASKS_PER_NODE`, such as '4(x2),3'."""
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
