"""Measure how far the gradient of a target is from the gradient of full distillation.

On each batch of windows, the gradients of full distillation and of each target are computed for the
same student; a random target is drawn several times. Angle, norm ratio, bias and variance
(`moments.py`) are computed in five spaces, with logits z and the head's weight U:

    logits         dL/dz of all positions, concatenated
    hidden         dL/dz U of all positions, concatenated: the gradient that the trunk receives
    summed logits  dL/dz summed over the batch: the gradient of a bias of the head
    summed hidden  dL/dz U summed over the batch: the gradient of a vector added to the head's input
    parameters     the gradient with respect to all parameters, summed over the batch

In the last three spaces the relative noise of unbiased targets decreases with the batch size. The
student is in eval mode and at temperature one. Angle and norm ratio are averaged over draws, and
all metrics over batches of consecutive windows, with Student's t interval over batches.

Cost per window: one pass of the teacher and of each student's trunk; per target and draw, at most
one pass of the sampler, one pass of the loss and one backward pass of each trunk, and memory for
gradients of the head's weight and of all parameters.
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
from sparselogits.evaluate.passes import labelled_positions, teacher_slices, without_padding
from sparselogits.lab.gradients.compared import Target
from sparselogits.lab.gradients.moments import Moments
from sparselogits.lab.gradients.student_gradients import Drawn, Space, StudentGradients
from sparselogits.language_model import require_predicting
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.samplers import Sampler, thinning_starts, window_uniforms
from sparselogits.targets import thinning_choices
from sparselogits.teacher import Engine


@dataclass(frozen=True)
class GradientFidelity:
    """Metrics of a target's gradient in one space and at one batch size.

    Args:
        student: name of the student.
        target: name of the target.
        entries: mean entries per position.
        space: name of a space, see the docstring of `measure.py`.
        batch_tokens: number of tokens per batch.
        draws: number of draws of the target per batch.
        angle: angle to full distillation's gradient, in degrees.
        norm_ratio: norm divided by the norm of full distillation's gradient.
        squared_bias: squared bias divided by the squared norm of full distillation's gradient.
        variance: trace of the covariance divided by the squared norm of full distillation's
            gradient.
        relative_angle: angle divided by the angle of a reference target in the same batch; None
            without a reference, or if an angle of the reference is 0.
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
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GradientFidelity:
        """Create an instance from the result of `to_json`."""
        estimates = {k: Estimate(**v) for k, v in value.items() if isinstance(v, dict)}
        return cls(**{**value, **estimates})

    @property
    def bias(self) -> float | None:
        """Square root of `squared_bias`; None if the lower end of its interval is not positive."""
        low = self.squared_bias.low
        distinguishable = low is None or low > 0
        return math.sqrt(max(self.squared_bias.mean, 0.0)) if distinguishable else None

    @property
    def bias_below(self) -> float | None:
        """Upper bound of the bias where `bias` is None; otherwise None."""
        squared = self.squared_bias
        if squared.low is None or squared.high is None or squared.low > 0:
            return None
        # a negative estimate is noise around zero, so half the width of the interval is the bound
        return math.sqrt(max(squared.high, squared.high - squared.mean))

    @property
    def noise(self) -> float:
        """Square root of the variance."""
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
    """Compare the gradients of targets with full distillation's gradient.

    Args:
        students: transformers language models by name, whose trunk and head can be run separately:
            masked ones if the windows are corrupted, otherwise causal ones. A student must not
            equal the teacher, because full distillation's gradient would be zero.
        windows: text to measure on; windows that do not fill a batch of the largest size are not
            used.
        teacher: teacher whose distribution the targets approximate.
        targets: targets to compare, with distinct names.
        batch_tokens: batch sizes in tokens, multiples of the window length.
        draws: number of draws of each random target; at least 2, to separate bias from variance.
            Draw r uses the random seed `seed + r`.
        seed: random seed of the first draw.
        against: name of the reference target for `relative_angle`; None for no reference.
        progress: function that is called with the number of windows done and the total number.

    Returns:
        One value per student, target, space and batch size.

    Raises:
        InvalidArgumentError: If trunk and head of a student cannot be run separately, a student
            caps its logits, has fewer ids than the teacher, equals the teacher or cannot separate
            the documents of a window, a batch has no label, a model is causal where the windows
            need a masked one, or the reverse, or `targets`, `batch_tokens`, `draws` or `against` is
            invalid.
    """
    length = windows.corpus.packing.window_length
    sizes = _window_counts(batch_tokens, length, len(windows))
    draw_counts = _draw_counts(targets, draws, against)
    masked = windows.corruption is not None
    taught = getattr(teacher, "model", None)
    models = {f"the student {name}": model for name, model in students.items()}
    for whose, model in {**models, **({} if taught is None else {"the teacher": taught})}.items():
        require_predicting(model, masked=masked, whose=whose, of="this text")
    learners = {
        name: StudentGradients(model, targets, draw_counts, sizes)
        for name, model in students.items()
    }
    used = len(windows) // max(sizes) * max(sizes)
    entries = torch.zeros(len(targets), dtype=torch.float64)
    positions = 0
    for index in range(used):
        item = without_padding(windows[index])
        for learner in learners.values():
            learner.begin(item)
        labels = item["shift_labels"]
        for part, logits in teacher_slices(teacher, item, labels != IGNORE_INDEX):
            assert logits is not None  # there is a teacher
            rows = labelled_positions(labels, part)
            if not len(rows):
                continue
            drawer = _Drawer(item["input_ids"], labels[rows], rows, logits, index, seed)
            drawn = [drawer.draws(t, n) for t, n in zip(targets, draw_counts, strict=True)]
            counts = [[int((draw.weights > 0).sum()) for draw in draws] for draws in drawn]
            entries += torch.tensor([sum(n) / len(n) for n in counts], dtype=torch.float64)
            positions += len(rows)
            for learner in learners.values():
                learner.add_slice(rows, logits, drawn, labels[rows])
        for learner in learners.values():
            learner.end()
        if progress is not None:
            progress(index + 1, used)
    per_position = (entries / max(1, positions)).tolist()
    names = [target.name for target in targets]
    found_rows = []
    for student, learner in learners.items():
        for size, batches in zip(sizes, learner.batches, strict=True):
            for (space, index), found in batches.found.items():
                reference = None if against is None else batches.found[space, names.index(against)]
                of = (student, targets[index], per_position[index], space, size * length)
                found_rows.append(_fidelity(*of, found, reference))
    return found_rows


class _Drawer:
    """Object that draws targets at some positions of a window.

    Targets with the same sampler object and equal `rounds` share draws.
    """

    def __init__(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        logits: Tensor,
        window: int,
        seed: int,
    ) -> None:
        self.tokens, self.labels, self.positions = tokens, labels, positions
        self.logits, self.window, self.seed = logits, window, seed
        self.drawn: dict[tuple[int, int | None, int], Drawn] = {}

    def draws(self, target: Target, count: int) -> list[Drawn]:
        """Return `count` draws of a target."""
        if target.sampler is None:
            ids = self.labels[:, None]
            return [Drawn(ids, torch.ones(ids.shape))]
        found = []
        for draw in range(count):
            key = id(target.sampler), target.rounds, draw
            if key not in self.drawn:
                self.drawn[key] = self._draw(target.sampler, target.rounds, draw)
            found.append(self.drawn[key])
        return found

    def _draw(self, sampler: Sampler, rounds: int | None, draw: int) -> Drawn:
        length, per_position = len(self.tokens), sampler.uniforms_per_position
        uniforms = window_uniforms(self.seed + draw, self.window, length, per_position)
        own = uniforms[self.positions].to(self.logits.device)
        targets = sampler.at(self.tokens, self.positions)(self.logits, own)
        if rounds is not None:
            choices = thinning_choices(targets.rounds or 0, rounds)
            starts = thinning_starts(self.seed + draw, 0, self.window, length, choices)
            targets = targets.thin(rounds, starts[self.positions].to(targets.ids.device))
        return Drawn(*targets.padded())


def _fidelity(
    student: str,
    target: Target,
    entries: float,
    space: Space,
    batch_tokens: int,
    found: Sequence[Moments],
    reference: Sequence[Moments] | None,
) -> GradientFidelity:
    """Compute the metrics of a target's gradient from the moments of each batch."""
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


def _window_counts(batch_tokens: Sequence[int], length: int, windows: int) -> list[int]:
    """Validate batch sizes in tokens; return the distinct sizes in windows, ascending."""
    sizes = sorted(set(batch_tokens))
    wrong = [size for size in sizes if size < 1 or size % length]
    if wrong or not sizes:
        raise InvalidArgumentError(
            f"batch sizes must be multiples of the window length of {length} tokens, found "
            f"{wrong or 'none'}: give multiples such as {4 * length}"
        )
    if windows * length < sizes[-1]:
        raise InvalidArgumentError(
            f"the text has {windows * length} tokens in {windows} windows, less than a batch of "
            f"{sizes[-1]} tokens: use more text or smaller batches"
        )
    return [size // length for size in sizes]


def _draw_counts(targets: Sequence[Target], draws: int, against: str | None) -> list[int]:
    """Validate the arguments, and return the number of draws for each target."""
    names = [target.name for target in targets]
    if len(set(names)) < len(names) or not names:
        raise InvalidArgumentError(
            f"found the targets {names}: give at least one target, and distinct names"
        )
    if against is not None and against not in names:
        raise InvalidArgumentError(f"unknown target {against!r}; available: {names}")
    if draws < 2:
        raise InvalidArgumentError(
            f"draws must be 2 or more, found {draws}: one draw does not separate bias from noise"
        )
    return [target.draws(draws) for target in targets]
