"""How far a target's gradient is from full distillation's, on the same text and student.

On a batch of windows the gradient of full distillation (t = p) and that of each target are formed
for the same student, once for a target that is not random and in several draws for one that is.
Angle, norm ratio, bias and variance (`moments.py`) are taken in five spaces:

    logits         dL/dz of every position, positions side by side: what one position sees.
                   Averaged over no tokens, so it does not depend on the batch's size.
    hidden         the same after the student's unembedding, dL/dz U: what the trunk receives.
    summed logits  dL/dz summed over the batch: the gradient of a bias of the head, whether or not
                   the student has one.
    summed hidden  dL/dz U summed over the batch: that of a vector added to all of the head's input.
    parameters     the gradient of all the student's parameters, summed over the batch: what an
                   optimiser gets. The paper's table (arXiv 2503.16870) is of this kind.

Noise of unbiased targets averages out in the last three as batches grow, bias does not. Sums and
means over the batch's positions have the same angle and relative figures. The student is in eval
mode and at temperature one; positions without a label count in no figure, as in training.

Each figure is a mean over batches (over draws first, within a batch) with a t interval over
batches of consecutive windows, which are taken to be independent.

Cost: the teacher's pass and the student's trunk once a window; for every target and draw one pass
of the sampler and one backward pass of the trunk. Memory: logits of one slice of positions; for
every target and draw one tensor like the head's weight, and one vector of all parameters for each
batch size of more than one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.data import TextDataset
from sparselogits.data.dataset import IGNORE_INDEX
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.intervals import Estimate, t_interval
from sparselogits.evaluate.passes import teacher_slices
from sparselogits.lab.gradients.compared import Target
from sparselogits.lab.gradients.moments import Moments
from sparselogits.lab.gradients.student_gradients import Drawn, Learner, Space
from sparselogits.samplers import Sampler, thinning_starts, window_uniforms
from sparselogits.targets import thinning_choices
from sparselogits.teacher import Engine


@dataclass(frozen=True)
class GradientFidelity:
    """A target's gradient beside full distillation's, in one space and at one batch size.

    Args:
        student: name of the student.
        target: name of the target.
        entries: mean entries a position.
        space: see the module's docstring.
        batch_tokens: tokens a batch.
        draws: of the target, in each batch.
        angle: degrees.
        norm_ratio: of the target's gradient to full distillation's.
        squared_bias: relative to the squared norm of full distillation's gradient.
        variance: likewise, trace over the space.
        relative_angle: angle over that of the target `against`, in the same batch.
    """

    student: str
    target: str
    entries: float
    space: Space
    batch_tokens: int
    draws: int
    angle: Estimate
    norm_ratio: Estimate
    squared_bias: Estimate
    variance: Estimate
    relative_angle: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GradientFidelity:
        """Read what `to_json` wrote."""
        estimates = {k: Estimate(**v) for k, v in value.items() if isinstance(v, dict)}
        return cls(**{**value, **estimates})

    @property
    def bias(self) -> float | None:
        """Root of the squared bias; None where it cannot be told from zero."""
        low = self.squared_bias.low
        told = low is None or low > 0
        return math.sqrt(max(self.squared_bias.mean, 0.0)) if told else None

    @property
    def bias_below(self) -> float | None:
        """What the bias is below, where it cannot be told from zero."""
        own = self.squared_bias
        if own.low is None or own.high is None or own.low > 0:
            return None
        # a negative estimate is zero plus noise: its interval's half width bounds the square
        return math.sqrt(max(own.high, own.high - own.mean))

    @property
    def noise(self) -> float:
        """Root of the variance."""
        return math.sqrt(max(self.variance.mean, 0.0))


def measure_gradients(
    students: Mapping[str, nn.Module],
    windows: TextDataset,
    teacher: Engine,
    targets: Sequence[Target],
    *,
    batch_tokens: Sequence[int],
    draws: int = 4,
    seed: int = 0,
    against: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[GradientFidelity]:
    """Compare gradients of targets with full distillation's.

    Args:
        students: transformers causal language models by name, whose head runs apart from the trunk.
        windows: text to measure on. As many windows are used as fill whole batches of the largest
            size.
        teacher: whose distribution the targets stand for; a student that equals it has no gradient
            to compare with.
        targets: the rows.
        batch_tokens: batch sizes, multiples of the window's length.
        draws: of targets that are random; at least two, or bias and variance cannot be told apart.
            Draw r is keyed by (seed + r, window).
        seed: of the first draw.
        against: name of the target whose angle the others' are divided by.
        progress: called with windows done and in all.

    Returns:
        One row for every student, target, space and batch size.

    Raises:
        InvalidArgumentError: a student that cannot be taken apart, caps its logits, has fewer ids
            than the teacher or equals it; sizes, draws or names that do not fit.
    """
    length = windows.corpus.packing.window_length
    sizes = _window_counts(batch_tokens, length, len(windows))
    wanted = _draws(targets, draws, against)
    learners = {name: Learner(model, targets, wanted, sizes) for name, model in students.items()}
    used = len(windows) // max(sizes) * max(sizes)
    entries = torch.zeros(len(targets), dtype=torch.float64)
    positions = 0
    for index in range(used):
        item = windows[index]
        for learner in learners.values():
            learner.begin(item)
        for part, logits in teacher_slices(teacher, item):
            assert logits is not None  # there is a teacher
            labels = item["shift_labels"][part]
            counted = labels != IGNORE_INDEX
            if not bool(counted.any()):
                continue
            made = _Maker(item["input_ids"], labels, part, logits, index, seed)
            drawn = [made.draws(t, n) for t, n in zip(targets, wanted, strict=True)]
            entries += torch.tensor([_mean_entries(own) for own in drawn], dtype=torch.float64)
            positions += int(counted.sum())
            for learner in learners.values():
                learner.take(part, counted, logits, drawn, labels)
        for learner in learners.values():
            learner.end()
        if progress is not None:
            progress(index + 1, used)
    per_position = (entries / max(1, positions)).tolist()
    rows = []
    for name, learner in learners.items():
        for size, level in zip(sizes, learner.levels, strict=True):
            for (space, index), found in level.found.items():
                reference = (
                    None if against is None else level.found[space, _place(targets, against)]
                )
                rows.append(
                    _row(
                        name,
                        targets[index],
                        per_position[index],
                        space,
                        size * length,
                        found,
                        reference,
                    )
                )
    return rows


class _Maker:
    """Draws targets of one slice of positions; a draw two targets share is made once."""

    def __init__(
        self,
        tokens: Tensor,
        labels: Tensor,
        part: slice,
        logits: Tensor,
        window: int,
        seed: int,
    ) -> None:
        self.tokens, self.labels, self.part = tokens, labels, part
        self.logits, self.window, self.seed = logits, window, seed
        self.counted = labels != IGNORE_INDEX
        self.made: dict[tuple[int, int | None, int], Drawn] = {}

    def draws(self, target: Target, count: int) -> list[Drawn]:
        """So many draws of a target, at the positions that count."""
        if target.sampler is None:
            ids = self.labels[self.counted, None]
            return [Drawn(ids, torch.ones(ids.shape))]
        found = []
        for draw in range(count):
            key = id(target.sampler), target.rounds, draw
            if key not in self.made:
                self.made[key] = self._draw(target.sampler, target.rounds, draw)
            found.append(self.made[key])
        return found

    def _draw(self, sampler: Sampler, rounds: int | None, draw: int) -> Drawn:
        length, per_position = len(self.tokens), sampler.uniforms_per_position
        uniforms = window_uniforms(self.seed + draw, self.window, length, per_position)
        own = uniforms[self.part].to(self.logits.device)
        # all positions, as a sampler that follows a student expects; then those that count
        made = sampler.at(self.tokens, self.part)(self.logits, own)
        if rounds is not None:
            choices = thinning_choices(made.rounds or 0, rounds)
            starts = thinning_starts(self.seed + draw, 0, self.window, length, choices)
            made = made.thin(rounds, starts[self.part].to(made.ids.device))
        ids, weights = made.padded()
        counted = self.counted.to(ids.device)
        return Drawn(ids[counted], weights[counted])


def _mean_entries(draws: Sequence[Drawn]) -> float:
    """Entries of a slice, summed over positions and averaged over draws."""
    return sum(int((draw.weights > 0).sum()) for draw in draws) / len(draws)


def _row(
    student: str,
    target: Target,
    entries: float,
    space: Space,
    batch_tokens: int,
    found: Sequence[Moments],
    reference: Sequence[Moments] | None,
) -> GradientFidelity:
    angles = [float(m.angles().mean()) for m in found]
    relative = None
    others = [float(m.angles().mean()) for m in reference or ()]
    if others and min(others) > 0:
        relative = t_interval([a / b for a, b in zip(angles, others, strict=True)])
    return GradientFidelity(
        student,
        target.name,
        entries,
        space,
        batch_tokens,
        found[0].draws,
        angle=t_interval(angles),
        norm_ratio=t_interval([float(m.norm_ratios().mean()) for m in found]),
        squared_bias=t_interval([m.squared_bias() for m in found]),
        variance=t_interval([m.variance() for m in found]),
        relative_angle=relative,
    )


def _place(targets: Sequence[Target], name: str) -> int:
    return [target.name for target in targets].index(name)


def _window_counts(batch_tokens: Sequence[int], length: int, windows: int) -> list[int]:
    sizes = sorted(set(batch_tokens))
    wrong = [size for size in sizes if size < 1 or size % length]
    if wrong or not sizes:
        raise InvalidArgumentError(
            f"batch sizes are multiples of the window of {length} tokens, found {wrong or 'none'}"
        )
    if windows * length < sizes[-1]:
        raise InvalidArgumentError(
            f"the text has {windows} windows, {windows * length} tokens; a batch of {sizes[-1]} "
            "needs more text or a smaller size"
        )
    return [size // length for size in sizes]


def _draws(targets: Sequence[Target], draws: int, against: str | None) -> list[int]:
    names = [target.name for target in targets]
    if len(set(names)) < len(names) or not names:
        raise InvalidArgumentError(f"targets need names of their own, found {names}")
    if against is not None and against not in names:
        raise InvalidArgumentError(f"no target is called {against!r}; there are {names}")
    if draws < 2:
        raise InvalidArgumentError(
            f"bias and noise of {draws} draw cannot be told apart: 2 or more"
        )
    return [target.draws(draws) for target in targets]
