"""Measure the calibration of students trained on sparse targets of a known posterior.

    python experiments/synthetic_mixture.py        (about half a minute)

The Gaussian mixture has 400 classes in 8 dimensions with one covariance: the posterior is a linear
softmax. The posterior is the teacher, and a student of the same form can learn it exactly. Each
student is trained on the same 20 000 points in mini-batches, with sparse targets newly drawn from
the posterior.
Calibration and loss are measured on labels drawn from the posterior at unseen points. Writes
results/synthetic_mixture.{json,png}.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from sparselogits.lab.report.charts import Drawing, curve_chart, draw_png, looks_of
from sparselogits.samplers import (
    Multinomial,
    Sampler,
    Systematic,
    Threshold,
    TopK,
    fit_budget,
    window_uniforms,
)

CLASSES, DIMENSIONS, POINTS, BATCH, EPOCHS, BUDGET = 400, 8, 20_000, 500, 20, 6
RESULTS = Path(__file__).parent / "results"


class Mixture:
    """Gaussian mixture of equally likely classes with unit covariance and Gaussian centres."""

    def __init__(self, seed: int, spread: float = 0.8) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.centres = self._normal(CLASSES, DIMENSIONS) * spread

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def points(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw labels and points of their classes; return points [count, DIMENSIONS] and labels."""
        labels = torch.randint(0, CLASSES, (count,), generator=self.generator)
        return self.centres[labels] + self._normal(count, DIMENSIONS), labels

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the posterior at points x, [N, CLASSES]."""
        return x @ self.centres.T - self.centres.square().sum(-1) / 2


def train(sampler: Sampler | str, mixture: Mixture, x: Tensor, labels: Tensor) -> torch.nn.Module:
    """Train a linear student on a sampler's targets, on "labels" or on the "full" posterior."""
    torch.manual_seed(0)
    student = torch.nn.Linear(DIMENSIONS, CLASSES)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * POINTS // BATCH)
    step = 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(POINTS).split(BATCH):
            teacher = mixture.logits(x[rows])
            if sampler == "labels":
                target = torch.nn.functional.one_hot(labels[rows], CLASSES).float()
            elif isinstance(sampler, str):
                target = teacher.softmax(-1)
            else:
                uniforms = window_uniforms(0, step, BATCH, sampler.uniforms_per_position)
                target = sampler(teacher, uniforms).dense()
            loss = -(target * student(x[rows]).log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
    return student


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> tuple[float, Tensor]:
    """Return the calibration error, and confidence and accuracy of equal-mass bins, [bins, 2]."""
    confidence, guess = probabilities.max(-1)
    order = confidence.argsort()
    right = (guess == labels).float()
    groups = [(confidence[g].mean(), right[g].mean()) for g in order.chunk(bins)]
    table = torch.tensor(groups)
    return float((table[:, 0] - table[:, 1]).abs().mean()), table


def main() -> None:
    torch.set_num_threads(1)
    mixture = Mixture(seed=0)
    x, labels = mixture.points(POINTS)
    test_x, test_labels = mixture.points(POINTS)
    teacher = mixture.logits(test_x).log_softmax(-1)
    pilot = [mixture.logits(x[:1000])]
    methods: dict[str, Sampler | str] = {
        "labels": "labels",
        "full": "full",
        f"top-{BUDGET}": TopK(BUDGET),
        f"top-{4 * BUDGET}": TopK(4 * BUDGET),
        "multinomial": fit_budget(Multinomial(), pilot, BUDGET),
        "systematic": fit_budget(Systematic(), pilot, BUDGET),
        "threshold": fit_budget(Threshold(), pilot, BUDGET),
    }
    rows = []
    points: list[dict[str, object]] = []
    for name, sampler in methods.items():
        student = train(sampler, mixture, x, labels)(test_x).detach().log_softmax(-1)
        error, table = calibration(student.exp(), test_labels)
        rows.append(
            {
                "method": name,
                "parameters": None if isinstance(sampler, str) else sampler.parameters(),
                "loss": float(-student[torch.arange(POINTS), test_labels].mean()),
                "kl_teacher_student": float((teacher.exp() * (teacher - student)).sum(-1).mean()),
                "ece_percent": 100 * error,
            }
        )
        print(rows[-1])
        points += [{"method": name, "x": sure, "y": right} for sure, right in table.tolist()]
    looks = looks_of({name: name for name in methods})
    chart = curve_chart(points, looks, x="confidence", y="accuracy", diagonal=True, marks=True)
    drawing = Drawing("mixture", "Calibration, bins of equal mass", chart)
    draw_png(drawing, RESULTS / "synthetic_mixture.png", scale=1.5)
    conditions = {
        "classes": CLASSES,
        "dimensions": DIMENSIONS,
        "points": POINTS,
        "epochs": EPOCHS,
        "budget": BUDGET,
        "seed": 0,
        "torch": torch.__version__,
        "posterior_loss": float(-teacher[torch.arange(POINTS), test_labels].mean()),
    }
    text = json.dumps({"conditions": conditions, "rows": rows}, indent=1)
    (RESULTS / "synthetic_mixture.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
