"""Divide a build among the ranks of torchrun or Slurm, without communication.

A rank derives its share from environment variables, so the tasks of a Slurm array need not run at
the same time, and a later run computes the ranges of tasks that did not finish. The first rank
packs the text, fits the budget and creates the caches; the other ranks wait until packed text and
caches exist.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparselogits.caching.plan import WHOLE, Share
from sparselogits.errors import CacheError, InvalidArgumentError

WAIT_SECONDS = 6 * 3600.0
"""Longest time to wait for the first rank, in seconds."""

POLL_SECONDS = 0.5
"""Interval in seconds at which ranks check whether the first rank has created the caches."""


@dataclass(frozen=True)
class Rank:
    """Rank of this process in a build that several processes divide.

    Args:
        share: share of the build.
        local: index of the process on this machine, from 0, which selects the device.
        local_count: number of processes on this machine (under srun, the largest number on any
            machine of the step); 1 if the launcher does not set it.
    """

    share: Share
    local: int
    local_count: int


def rank_from_environment(environment: Mapping[str, str]) -> Rank:
    """Return the rank of this process under torchrun or srun, in a Slurm array, or in both.

    The rank is read from `RANK` and `WORLD_SIZE` (torchrun, with `LOCAL_RANK` and
    `LOCAL_WORLD_SIZE`), or from `SLURM_PROCID` and `SLURM_STEP_NUM_TASKS` (srun; `SLURM_NTASKS` is
    not read, because in a batch script it counts tasks that were not started). The array
    task is read from `SLURM_ARRAY_TASK_ID`, `SLURM_ARRAY_TASK_COUNT`, `SLURM_ARRAY_TASK_MIN` and
    `SLURM_ARRAY_TASK_STEP`.

    Args:
        environment: environment variables.

    Raises:
        InvalidArgumentError: variables are missing or inconsistent.
    """
    inner = local = None
    if "RANK" in environment and "WORLD_SIZE" in environment:
        inner = _share(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"))
        local = _number(environment, "LOCAL_RANK", 0), _number(environment, "LOCAL_WORLD_SIZE", 1)
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        inner = _share(
            _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
        )
        local = (_number(environment, "SLURM_LOCALID", 0), _tasks_here(environment))
    outer = _array_task(environment)
    if inner is None and outer is None:
        raise InvalidArgumentError(
            "--executor torchrun requires the environment variables of a launcher, and none are "
            "set; start the command as 'torchrun --nproc-per-node 8 -m sparselogits cache ... "
            "--executor torchrun', by srun, or in a Slurm array (docs/scaling.md)"
        )
    inner, outer = inner or WHOLE, outer or WHOLE
    share = Share(outer.index * inner.count + inner.index, outer.count * inner.count)
    return Rank(share, *(local or (0, 1)))


def wait_for_first_rank(
    begun: Callable[[], bool], *, seconds: float = WAIT_SECONDS, every: float = POLL_SECONDS
) -> None:
    """Wait until the first rank has packed the text and created the caches.

    Args:
        begun: function that returns whether the packed text and the caches exist.
        seconds: longest time to wait, in seconds.
        every: time between two calls of `begun`, in seconds.

    Raises:
        CacheError: `begun` still returns False after `seconds` seconds.
    """
    end = time.monotonic() + seconds
    while not begun():
        if time.monotonic() > end:
            raise CacheError(
                f"the first rank has not created the cache within {seconds / 3600:g} hours; check "
                "the output of the first rank, then start all ranks again"
            )
        time.sleep(every)


def _array_task(environment: Mapping[str, str]) -> Share | None:
    """Return the share of this task of a Slurm array; None outside of an array."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
    offset = _number(environment, "SLURM_ARRAY_TASK_ID") - first
    return _share(offset // step, _number(environment, "SLURM_ARRAY_TASK_COUNT"))


def _share(rank: int, ranks: int) -> Share:
    """Return the share of a rank. Raises InvalidArgumentError if there are not as many ranks."""
    if not 0 <= rank < ranks:
        raise InvalidArgumentError(
            f"the environment states rank {rank} of {ranks} ranks, expected a rank in "
            f"[0, {ranks}); the tasks of an array must have no gaps, as in --array=0-15. Submit "
            "all tasks again: existing shards are not built twice"
        )
    return Share(rank, ranks)


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Return the largest number of tasks in `SLURM_STEP_TASKS_PER_NODE`, such as '4(x2),3'."""
    groups = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")
    counts = [group.partition("(")[0] for group in groups]
    return max((int(count) for count in counts if count.isdecimal()), default=1)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return an environment variable as an integer from 0, or raise InvalidArgumentError."""
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise InvalidArgumentError(
            f"the environment variable {name} is {text!r}, expected a number; start the ranks with "
            "torchrun, srun or a Slurm array (docs/scaling.md)"
        )
    return int(text)
