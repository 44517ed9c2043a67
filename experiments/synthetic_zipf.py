"""Show what a student with one free logit per token learns from a Zipf teacher's sparse targets.

    python experiments/synthetic_zipf.py        (about half a minute)

The teacher is p_i ~ 1 / i over 1 000 tokens. At every step the student gets a new sparse target
of the same p and minimises cross-entropy. From Top-K it learns the head, renormalised to one, and a
tail of zero; from unbiased targets it learns p. Writes results/synthetic_zipf.{json,png}.
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

VOCABULARY, BUDGET, STEPS, BATCH = 1000, 12, 3000, 8
RESULTS = Path(__file__).parent / "results"


def train(sampler: Sampler | None, teacher: Tensor) -> Tensor:
    """Return the student's distribution [V] after training; without a sampler the target is p."""
    logits = torch.zeros(VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        target = teacher.softmax(-1).float()
        if sampler is not None:
            uniforms = window_uniforms(0, step, BATCH, sampler.uniforms_per_position)
            target = sampler(teacher.expand(BATCH, -1), uniforms).dense().mean(0)
        loss = -(target * logits.log_softmax(-1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return logits.detach().double().softmax(-1)


def curve(name: str, probabilities: Tensor) -> list[dict[str, object]]:
    """Return the points of a line, probability by rank, without probabilities below 1e-8."""
    values = enumerate(probabilities.tolist(), 1)
    return [{"method": name, "x": rank, "y": value} for rank, value in values if value >= 1e-8]


def main() -> None:
    torch.set_num_threads(1)
    teacher = -torch.arange(1, VOCABULARY + 1).double().log()
    p = teacher.softmax(-1)
    methods: dict[str, Sampler | None] = {
        "full": None,
        f"top-{BUDGET}": TopK(BUDGET),
        "top-50": TopK(50),
        "multinomial": fit_budget(Multinomial(), [teacher[None]], BUDGET),
        "systematic": fit_budget(Systematic(), [teacher[None]], BUDGET),
        "threshold": fit_budget(Threshold(), [teacher[None]], BUDGET),
    }
    rows = []
    points = curve("teacher", p)
    for name, sampler in methods.items():
        student = train(sampler, teacher)
        rows.append(
            {
                "method": name,
                "parameters": None if sampler is None else sampler.parameters(),
                "kl_teacher_student": float((p * (p / student).log()).sum()),
                "head_mass_of_12": float(student[:12].sum()),
                "tail_mass_beyond_50": float(student[50:].sum()),
            }
        )
        print(rows[-1])
        points += curve(name, student)
    names = ["teacher", *methods]
    chart = curve_chart(
        points,
        looks_of({name: name for name in names}),
        x="rank of the token",
        y="student's probability",
        logarithmic=True,
    )
    drawing = Drawing("zipf", "What a student learns of a Zipf teacher", chart)
    draw_png(drawing, RESULTS / "synthetic_zipf.png", scale=1.5)
    conditions = {
        "vocabulary": VOCABULARY,
        "budget": BUDGET,
        "steps": STEPS,
        "targets_a_step": BATCH,
        "seed": 0,
        "torch": torch.__version__,
        "teacher_head_mass_of_12": float(p[:12].sum()),
        "teacher_tail_mass_beyond_50": float(p[50:].sum()),
    }
    text = json.dumps({"conditions": conditions, "rows": rows}, indent=1)
    (RESULTS / "synthetic_zipf.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
