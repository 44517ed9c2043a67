"""Measure how far the gradient of a target is from that of full distillation.

On a batch of windows the gradient of full distillation (t = p) and that of each target are computed
for the same student, once for a target that is not random and in several draws for one that is.
Angle, norm ratio, bias and variance (`moments.py`) are computed in five spaces:

    logits         dL/dz of every position, positions side by side. Nothing is averaged over
                   tokens, so the metrics do not depend on the batch size.
    hidden         the same multiplied by the student's unembedding, dL/dz U: the gradient that the
                   trunk receives.
    summed logits  dL/dz summed over the batch: the gradient of a bias of the head, whether or not
                   the student has one.
    summed hidden  dL/dz U summed over the batch: the gradient of a vector added to all inputs of
                   the head.
    parameters     the gradient of all parameters of the student, summed over the batch: the
                   gradient that an optimiser receives. The table of the RS-KD paper
                   (arXiv 2503.16870) is of this kind.

In the last three the noise of unbiased targets averages out as batches grow, the bias does not.
Sums and means over the positions of a batch have the same angle and relative metrics. The student
is in eval mode and at temperature one. Positions without a label are skipped, as in training.

Each metric is a mean over batches (within a batch first over draws) with a t interval over batches
of consecutive windows, which are assumed to be independent.

Cost: one teacher pass and one pass of the student's trunk per window; for each target and draw one
pass of the sampler, one of the loss, two products with the head's size and one backward pass of the
trunk. Memory: a few tensors as large as the logits of one slice of positions; for each target and
draw one tensor as large as the head's weight, and one vector of all parameters for each batch size
of more than one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.data import TextDataset
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate.intervals import Estimate, t_interval
from sparselogits.evaluate.passes import teacher_slices
from sparselogits.lab.gradients.compared import Target
from sparselogits.lab.gradients.moments import Moments
from sparselogits.lab.gradients.student_gradients import Drawn, Learner, Space
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.samplers import Sampler, thinning_starts, window_uniforms
from sparselogits.targets import thinning_choices
from sparselogits.teacher import Engine


@dataclass(frozen=True)
class GradientFidelity:
    """Hold the metrics of one target's gradient, in one space and at one batch size.

    Args:
        student: name of the student.
        target: name of the target.
        entries: mean entries per position.
        space: one of the spaces of the module's docstring.
        batch_tokens: tokens per batch.
        draws: draws of the target per batch.
        angle: angle to full distillation's gradient, in degrees.
        norm_ratio: norm divided by that of full distillation's gradient.
        squared_bias: squared bias divided by the squared norm of full distillation's gradient.
        variance: variance, summed over the space, divided by the same squared norm.
        relative_angle: angle divided by that of the target `against` in the same batch; None
            without such a target.
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
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GradientFidelity:
        """Return the object whose `to_json` returned this value."""
        estimates = {k: Estimate(**v) for k, v in value.items() if isinstance(v, dict)}
        return cls(**{**value, **estimates})

    @property
    def bias(self) -> float | None:
        """Root of the squared bias; None if it is not distinguishable from zero."""
        low = self.squared_bias.low
        told = low is None or low > 0
        return math.sqrt(max(self.squared_bias.mean, 0.0)) if told else None

    @property
    def bias_below(self) -> float | None:
        """Upper bound of a bias that is not distinguishable from zero; None for others."""
        own = self.squared_bias
        if own.low is None or own.high is None or own.low > 0:
            return None
        # a negative estimate is zero plus noise: the half width of its interval bounds the square
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
    """Compare the gradients of targets with full distillation's.

    Args:
        students: transformers causal language models by name, whose trunk and head can be run
            separately.
        windows: text to measure on; as many windows are used as fill whole batches of the largest
            size.
        teacher: the teacher whose distribution the targets approximate. A student that equals it
            has no gradient to compare with.
        targets: the targets to compare.
        batch_tokens: batch sizes in tokens, multiples of the window length.
        draws: draws of each random target, at least 2: one draw does not separate bias from
            variance. Draw r is keyed by (seed + r, window).
        seed: random seed of the first draw.
        against: name of the target that `relative_angle` compares with.
        progress: called with the number of windows done and their total.

    Returns:
        One row per student, target, space and batch size.

    Raises:
        InvalidArgumentError: If a student's trunk and head cannot be run separately, if a student
            caps its logits, has fewer ids than the teacher or equals it, or if sizes, draws or
            names do not fit.
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
    """Draw the targets of one slice of positions; a draw that two targets share is made once."""

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
        """Return draws of a target at the positions that count."""
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
        # a sampler that follows a student expects all positions; those that count are kept below
        made = sampler.at(self.tokens, self.part)(self.logits, own)
        if rounds is not None:
            choices = thinning_choices(made.rounds or 0, rounds)
            starts = thinning_starts(self.seed + draw, 0, self.window, length, choices)
            made = made.thin(rounds, starts[self.part].to(made.ids.device))
        ids, weights = made.padded()
        counted = self.counted.to(ids.device)
        return Drawn(ids[counted], weights[counted])


def _mean_entries(draws: Sequence[Drawn]) -> float:
    """Return the entries of a slice, summed over positions and averaged over draws."""
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
            f"batch sizes must be multiples of the window of {length} tokens, found "
            f"{wrong or 'none'}"
        )
    if windows * length < sizes[-1]:
        raise InvalidArgumentError(
            f"the text has {windows} windows, {windows * length} tokens, and a batch "
            f"{sizes[-1]}: use more text or smaller batches"
        )
    return [size // length for size in sizes]


def _draws(targets: Sequence[Target], draws: int, against: str | None) -> list[int]:
    names = [target.name for target in targets]
    if len(set(names)) < len(names) or not names:
        raise InvalidArgumentError(f"targets need distinct names, at least one, found {names}")
    if against is not None and against not in names:
        raise InvalidArgumentError(f"unknown target {against!r}; available: {names}")
    if draws < 2:
        raise InvalidArgumentError(
            f"draws must be 2 or more, found {draws}: one does not separate bias from noise"
        )
    return [target.draws(draws) for target in targets]
