"""Schedule how many of the cached rounds training uses at each optimiser step.

One cache serves every smaller budget: the N cached rounds of a window are thinned to fewer (see
`SparseTargets.thin`), without bias for any number up to N, and a `Schedule` changes the number
during training. Which rounds are kept depends on (seed, epoch, window), and how many on the
optimiser step that trains on the window. That step is computed from the position of the window in
the order, so workers that read ahead and runs that resume agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from sparselogits.errors import InvalidArgumentError


@dataclass(frozen=True)
class Stage:
    """A part of training with one number of rounds.

    Args:
        rounds: rounds to keep per position.
        until: share of the optimiser steps at which the stage ends, in (0, 1].
        until_step: optimiser step at which the stage ends, instead of a share.
    """

    rounds: int
    until: float | None = None
    until_step: int | None = None

    def ends(self, steps: int) -> float:
        """Return the first step after the stage, given the number of steps."""
        if self.until_step is not None:
            return self.until_step
        return math.inf if self.until is None else self.until * steps


@dataclass(frozen=True)
class Schedule:
    """Rounds to keep, as a function of the optimiser step.

    Args:
        stages: stages in order; the end of the last stage is ignored, it lasts to the end of
            training.
        fresh_noise: keep different cached rounds in each epoch; otherwise those of epoch 0.

    Raises:
        InvalidArgumentError: there are no stages, rounds below one, or ends that do not ascend.
    """

    stages: tuple[Stage, ...]
    fresh_noise: bool = True

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidArgumentError("a thinning schedule needs at least one stage")
        for stage in self.stages:
            _require_sound(stage, last=stage is self.stages[-1])
        for name in ("until", "until_step"):
            ends = [e for stage in self.stages if (e := getattr(stage, name)) is not None]
            if any(b <= a for a, b in pairwise(ends)):
                raise InvalidArgumentError(
                    f"the stages of a thinning schedule must end one after another; {name} is "
                    f"{ends}"
                )

    @classmethod
    def constant(cls, rounds: int, *, fresh_noise: bool = True) -> Schedule:
        """Make a schedule with one number of rounds."""
        return cls((Stage(rounds),), fresh_noise)

    def rounds_at(self, step: int, steps: int) -> int:
        """Return the rounds to keep in an optimiser step, counted from 0, out of `steps`."""
        for stage in self.stages[:-1]:
            if step < stage.ends(steps):
                return stage.rounds
        return self.stages[-1].rounds

    def require_within(self, cached: int | None, teachers: int = 1) -> None:
        """Validate that a cache, or several caches that are mixed, have the rounds.

        Args:
            cached: rounds per position over all caches; None if not all are drawn in rounds.
            teachers: number of teachers that a window mixes; each needs a round.

        Raises:
            InvalidArgumentError: the cache is not drawn in rounds, or has too few, or a stage has
                fewer rounds than teachers.
        """
        least = min(stage.rounds for stage in self.stages)
        if least < teachers:
            raise InvalidArgumentError(
                f"rounds={least}: a window mixes {teachers} teachers, and each of them needs a "
                f"round; keep at least {teachers} rounds"
            )
        wanted = max(stage.rounds for stage in self.stages)
        if cached is None:
            raise InvalidArgumentError(
                f"rounds={wanted}: the entries of this cache are not drawn in rounds and cannot be "
                "thinned; omit thinning"
            )
        if wanted > cached:
            raise InvalidArgumentError(
                f"rounds={wanted}: the cache holds {cached} rounds per position; choose between 1 "
                f"and {cached}"
            )


@dataclass(frozen=True)
class Pace:
    """The optimiser step that trains on each position of the order.

    Args:
        windows_per_step: windows per optimiser step, over all ranks and accumulated batches.
        steps_per_epoch: optimiser steps per epoch.
        steps: optimiser steps of the whole training.
    """

    windows_per_step: int
    steps_per_epoch: int
    steps: int

    def step_of(self, epoch: int, position: int) -> int:
        """Return the step, from 0, that trains on the window at a position of an epoch."""
        within = min(position // self.windows_per_step, self.steps_per_epoch - 1)
        return epoch * self.steps_per_epoch + within


def _require_sound(stage: Stage, *, last: bool) -> None:
    if stage.rounds < 1:
        raise InvalidArgumentError(f"a stage keeps at least one round, found {stage.rounds}")
    if stage.until is not None and stage.until_step is not None:
        raise InvalidArgumentError("give a stage until or until_step, not both")
    if not last and stage.until is None and stage.until_step is None:
        raise InvalidArgumentError(
            "a stage has neither until nor until_step; only the last stage may omit both"
        )
    if stage.until is not None and not 0 < stage.until <= 1:
        raise InvalidArgumentError(
            f"until must be a share of training in (0, 1], found {stage.until}"
        )
    if stage.until_step is not None and stage.until_step < 1:
        raise InvalidArgumentError(f"until_step must be at least 1, found {stage.until_step}")
