"""Schedule the number of cached rounds that training uses at each optimiser step.

A cache with N rounds per position can be thinned without bias to any smaller number of rounds (see
`SparseTargets.thin`). The subset of rounds is a function of (seed, epoch, window) and of the number
of rounds, which depends on the optimiser step. That step is computed from the position of the
window in the order, so that DataLoader workers that read ahead, and runs that resume, compute the
same number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from sparselogits.errors import InvalidArgumentError


@dataclass(frozen=True)
class Stage:
    """Part of training with a constant number of rounds.

    Args:
        rounds: number of rounds per position, at least 1.
        until: share of all optimiser steps after which the stage ends, in (0, 1].
        until_step: number of optimiser steps after which the stage ends, instead of `until`.
    """

    rounds: int
    until: float | None = None
    until_step: int | None = None

    def ends(self, steps: int) -> float:
        """Return the number of optimiser steps after which the stage ends, of `steps` in all.

        The result may be fractional, and is infinite for a stage without an end.
        """
        if self.until_step is not None:
            return self.until_step
        return math.inf if self.until is None else self.until * steps


@dataclass(frozen=True)
class Schedule:
    """Number of rounds per position as a function of the optimiser step.

    Args:
        stages: stages in order. The last stage lasts until the end of training.
        fresh_noise: whether to select cached rounds anew in each epoch; otherwise every epoch uses
            the selection of epoch 0.

    Raises:
        InvalidArgumentError: there is no stage, a stage is invalid, or the values of `until`, or
            those of `until_step`, do not ascend.

    Examples:
        >>> schedule = Schedule((Stage(3, until=0.5), Stage(12)))
        >>> [schedule.rounds_at(step, 4) for step in range(4)]
        [3, 3, 12, 12]
    """

    stages: tuple[Stage, ...]
    fresh_noise: bool = True

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidArgumentError(
                "a thinning schedule needs at least one stage, found none; omit thinning for all "
                "cached rounds"
            )
        for stage in self.stages:
            _require_sound(stage, last=stage is self.stages[-1])
        for name in ("until", "until_step"):
            ends = [e for stage in self.stages if (e := getattr(stage, name)) is not None]
            if any(b <= a for a, b in pairwise(ends)):
                raise InvalidArgumentError(
                    f"the stages of a thinning schedule must end one after another, found {name} "
                    f"{ends}; give ascending values"
                )

    @classmethod
    def constant(cls, rounds: int, *, fresh_noise: bool = True) -> Schedule:
        """Create a schedule with a constant number of rounds per position, at least 1."""
        return cls((Stage(rounds),), fresh_noise)

    def rounds_at(self, step: int, steps: int) -> int:
        """Return the number of rounds at a step, counted from 0, of `steps` optimiser steps."""
        for stage in self.stages[:-1]:
            if step < stage.ends(steps):
                return stage.rounds
        return self.stages[-1].rounds

    def require_within(self, cached: int | None, teachers: int = 1) -> None:
        """Validate that the cached targets can be thinned to the rounds of all stages.

        Args:
            cached: number of cached rounds per position, over all mixed caches; None if a cache
                was not drawn in rounds.
            teachers: largest number of teachers in a window. Each teacher requires at least one
                round.

        Raises:
            InvalidArgumentError: the targets were not drawn in rounds, or a stage has more rounds
                than the caches or fewer rounds than teachers.
        """
        require_round_each(min(stage.rounds for stage in self.stages), teachers)
        wanted = max(stage.rounds for stage in self.stages)
        if cached is None:
            raise InvalidArgumentError(
                f"rounds={wanted}: the entries of this cache are not drawn in rounds and cannot be "
                "thinned; omit thinning"
            )
        if wanted > cached:
            raise InvalidArgumentError(
                f"rounds={wanted}: the cache has {cached} rounds per position; choose between 1 "
                f"and {cached}"
            )


def require_round_each(rounds: int, teachers: int) -> None:
    """Validate that there is at least one round per teacher. Raises InvalidArgumentError."""
    if rounds < teachers:
        raise InvalidArgumentError(
            f"rounds={rounds}: a window mixes {teachers} teachers, each of which requires at "
            f"least one round; use at least {teachers} rounds"
        )


@dataclass(frozen=True)
class Pace:
    """Mapping from positions of an order to optimiser steps.

    Args:
        windows_per_step: number of windows per optimiser step, over all ranks and accumulated
            batches.
        steps_per_epoch: number of optimiser steps per epoch.
        steps: number of optimiser steps of the training.

    Examples:
        >>> Pace(windows_per_step=8, steps_per_epoch=10, steps=20).step_of(epoch=1, position=16)
        12
    """

    windows_per_step: int
    steps_per_epoch: int
    steps: int

    def step_of(self, epoch: int, position: int) -> int:
        """Return the optimiser step that trains on a position of an epoch; indices start at 0."""
        within = min(position // self.windows_per_step, self.steps_per_epoch - 1)
        return epoch * self.steps_per_epoch + within


def _require_sound(stage: Stage, *, last: bool) -> None:
    """Validate a stage; only the last one may lack an end. Raises InvalidArgumentError."""
    if stage.rounds < 1:
        raise InvalidArgumentError(
            f"a stage has at least one round, found {stage.rounds}; give a positive number"
        )
    if stage.until is not None and stage.until_step is not None:
        raise InvalidArgumentError("a stage has until and until_step; give one of them, not both")
    if not last and stage.until is None and stage.until_step is None:
        raise InvalidArgumentError(
            f"the stage of {stage.rounds} rounds has neither until nor until_step; give one of "
            "them, because only the last stage may omit both"
        )
    if stage.until is not None and not 0 < stage.until <= 1:
        raise InvalidArgumentError(
            f"until must be a share of training in (0, 1], found {stage.until}; use until_step for "
            "a number of steps"
        )
    if stage.until_step is not None and stage.until_step < 1:
        raise InvalidArgumentError(
            f"until_step must be at least 1, found {stage.until_step}; give a number of steps"
        )
