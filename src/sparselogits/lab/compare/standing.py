"""How a comparison stands: what its runs have found, read once and put together once.

A comparison's results are written anew after every run. To read all outcomes and form every
interval again costs two seconds each time at a hundred runs of 96 windows and 1 000 resamples. So
within a process an outcome is read once, because a run's outcome is never another, and a row is
formed again only when an outcome it rests on is new: the method's own, CE's or full KD's.
"""

from __future__ import annotations

from pathlib import Path

from sparselogits.lab.compare.caches import Setting
from sparselogits.lab.compare.recipe import CompareRecipe
from sparselogits.lab.compare.results import MethodRow
from sparselogits.lab.compare.runs import Outcome, Planned, failure_of, outcome_of, plan
from sparselogits.lab.compare.summary import Run, method_rows


class Standing:
    """The runs of one comparison, and what is known of them.

    Args:
        recipe: the comparison.
        setting: see `caches.prepare`.
    """

    def __init__(self, recipe: CompareRecipe, setting: Setting) -> None:
        self.recipe, self.setting = recipe, setting
        self.planned = plan(recipe, setting)
        self._outcomes: dict[Path, Outcome] = {}
        self._rows: dict[tuple[object, ...], MethodRow] = {}

    def outcome(self, planned: Planned) -> Outcome | None:
        """What a run found, if it is finished."""
        if planned.folder is None:
            return None
        known = self._outcomes.get(planned.folder)
        if known is None and (known := outcome_of(planned)) is not None:
            self._outcomes[planned.folder] = known
        return known

    def runs(self) -> list[Run]:
        """All runs as they are now."""
        return [Run(own, self.outcome(own), failure_of(own)) for own in self.planned]

    def method_rows(self, runs: list[Run]) -> list[MethodRow]:
        """A row for every method and student, over the seeds that are done.

        Args:
            runs: as `runs` gave them.
        """
        return method_rows(runs, self.recipe, self.setting, self._rows)
