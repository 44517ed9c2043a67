"""The tables of docs/results.md, from a stored comparison.

python experiments/compare/tables.py experiments/results/compare_small_teacher.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sparselogits.evaluate.intervals import t_interval
from sparselogits.lab.compare import MethodRow, Results, read_results
from sparselogits.lab.compare.results import Ends, Figure, OfBatches
from sparselogits.lab.compare.task_scores import column_of

HEAD = (
    "| method | seeds | entries | bytes | loss | loss - CE | of the gap % | KL | ECE % | "
    "overconf. % | acceptance % | agreement % |"
)


def said(figure: Figure | None, scale: float = 1, digits: int = 3) -> str:
    return "-" if figure is None else f"{scale * figure.mean:.{digits}f}"


def with_ends(figure: Figure | None, ends: str, scale: float = 1, digits: int = 3) -> str:
    if figure is None:
        return "-"
    found: Ends = getattr(figure, ends)
    if found.low is None or found.high is None:
        return said(figure, scale, digits)
    low, high = (f"{scale * end:.{digits}f}" for end in (found.low, found.high))
    return f"{said(figure, scale, digits)} ({low} to {high})"


def line(row: MethodRow) -> str:
    if not row.seeds_done:
        state = "failed" if row.seeds_failed else "not run"
        return f"| {row.method} | {state} |" + " - |" * 10
    own = row.figures
    cells = [
        row.method,
        str(len(row.seeds_done)),
        "-" if row.entries is None else f"{row.entries:.1f}",
        "-" if row.bytes_per_token is None else f"{row.bytes_per_token:.1f}",
        said(own.get("loss")),
        with_ends(row.minus_ce.get("loss"), "both"),
        with_ends(row.gap_closed, "both", digits=0),
        said(own.get("kl")),
        said(own.get("ece"), 100, 1),
        with_ends(own.get("overconfidence"), "both", 100, 1),
        said(own.get("acceptance"), 100, 1),
        said(own.get("agreement"), 100, 1),
    ]
    return f"| {' | '.join(cells)} |"


def seeds_table(results: Results) -> list[str]:
    lines = ["| method | loss - CE, mean and t interval over seeds |", "|---|---|"]
    for row in results.methods:
        if len(row.seeds_done) > 1 and "loss" in row.minus_ce:
            lines.append(f"| {row.method} | {with_ends(row.minus_ce['loss'], 'seeds')} |")
    return lines if len(lines) > 2 else []


PAIRS = [
    *((f"systematic {b}", f"RS-KD {b}") for b in ("2.4", "5", "12")),
    *((f"{m} {b}", f"systematic {b}") for m in ("threshold", "adaptive") for b in ("5", "12")),
    *((m, "full KD") for m in ("RS-KD 12", "systematic 12", "RS-KD 25", "RS-KD 57")),
    *((f"RS-KD 12, alpha {a}", "RS-KD 12") for a in ("0.1", "0.3", "0.5")),
    *((f"RS-KD 12, exponent {x}", "RS-KD 12") for x in ("0.5", "0.8", "1.2")),
    *((f"Top-K {k}, smooth", f"Top-K {k}, ghost") for k in (5, 12, 50, 100)),
    *(
        (f"Top-K {k}, {rule}", f"Top-K {k}")
        for rule in ("smooth", "ghost", "ground truth")
        for k in (5, 12, 50, 100)
    ),
    ("systematic 12, thinned to 4, fresh", "systematic 12, thinned to 4, frozen"),
]
"""Methods whose difference docs/results.md speaks of; those a comparison lacks are left out."""


def pairs_table(results: Results) -> list[str]:
    """Differences of loss, paired by seed: Student's t over the seeds that both have."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for run in results.runs:
        if run.status == "done":
            losses.setdefault((run.student, run.method), {})[run.seed] = run.figures["loss"]
    lines = []
    for student in dict.fromkeys(row.student for row in results.methods):
        for one, other in PAIRS:
            first, second = (losses.get((student, name), {}) for name in (one, other))
            differences = [first[seed] - second[seed] for seed in first if seed in second]
            if not differences:
                continue
            found = t_interval(differences)
            said = f"{found.mean:+.3f}"
            if found.low is not None and found.high is not None:
                said += f" ({found.low:+.3f} to {found.high:+.3f})"
            by_seed = ", ".join(f"{own:+.3f}" for own in differences)
            lines.append(f"| {one} | {other} | {said} | {by_seed} |")
    if not lines:
        return []
    return ["| method | less | loss, t interval over seeds | each seed |", "|---" * 4 + "|", *lines]


def drafting_table(results: Results) -> list[str]:
    lines = [
        "| method | verified | realised % | expected there % | standard error % |",
        "|---|---|---|---|---|",
    ]
    for row in results.methods:
        if (own := row.realised) is not None:
            numbers = (100 * x for x in (own.acceptance, own.expected, own.error))
            cells = " | ".join(f"{x:.1f}" for x in numbers)
            lines.append(f"| {row.method} | {own.verified} | {cells} |")
    if len(lines) == 2:
        return []
    drafted = [row.realised for row in results.methods if row.realised is not None]
    within = sum(abs(own.acceptance - own.expected) <= 2 * own.error for own in drafted)
    below = sum(own.acceptance < own.expected for own in drafted)
    said = (
        f"Within two standard errors: {within} of {len(drafted)}; below what is expected: {below}."
    )
    return [*lines, "", said]


def order_of_acceptance(results: Results) -> list[str]:
    """Whether acceptance orders the methods as the loss does: Spearman's rank correlation."""
    done = [row.figures for row in results.methods if row.seeds_done]
    if len(done) < 3:
        return []
    loss, acceptance = (
        np.argsort(np.argsort([sign * own[name].mean for own in done]))
        for name, sign in (("loss", -1), ("acceptance", 1))
    )
    rho = float(np.corrcoef(loss, acceptance)[0, 1])
    return [f"Acceptance against loss, rank correlation over {len(done)} methods: {rho:.2f}."]


def tasks_table(results: Results) -> list[str]:
    names = list(dict.fromkeys(name for row in results.methods for name in row.tasks))
    if not names:
        return []
    columns = [(name, *column_of(name)) for name in names]
    lines = [f"| method | {' | '.join(head for _, head, _, _ in columns)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in results.methods:
        cells = (
            with_ends(row.tasks.get(n), "both", scale, digits) for n, _, scale, digits in columns
        )
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    if results.teacher is not None:
        known = results.teacher.tasks
        own = (f"{scale * known[n]:.{d}f}" if n in known else "-" for n, _, scale, d in columns)
        lines.append(f"| (the teacher) | {' | '.join(own)} |")
    return lines


def gradient_table(results: Results) -> list[str]:
    """Angles in batches of every size; norm, bias and noise in the largest. Empty if there is none.

    The angle's interval is Student's t over batches.
    """
    measured = [row for row in results.methods if row.gradient is not None]
    if not measured:
        return []
    assert measured[0].gradient is not None
    on, sizes = measured[0].gradient, [own.batch_tokens for own in measured[0].gradient.sizes]
    angles = " | ".join(f"angle, {size:,} tokens" for size in sizes)
    lines = [
        f"Gradients beside full KD's, of the student that {on.student_method}, seed "
        f"{on.student_seed}, left:",
        "",
        f"| method | entries | {angles} | norm ratio | bias | noise |",
        "|---" * (5 + len(sizes)) + "|",
    ]
    for row in results.methods:
        if (own := row.gradient) is None:
            lines.append(f"| {row.method} |" + " - |" * (4 + len(sizes)))
            continue
        largest = own.sizes[-1]
        cells = [
            row.method,
            "-" if own.entries is None else f"{own.entries:.1f}",
            *(over_batches(size.angle, 1) for size in own.sizes),
            f"{largest.norm_ratio.mean:.2f}",
            f"<{largest.bias_below:.3f}" if largest.bias is None else f"{largest.bias:.3f}",
            f"{largest.noise:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def over_batches(figure: OfBatches, digits: int) -> str:
    said = f"{figure.mean:.{digits}f}"
    return said if figure.high is None else f"{said} ± {figure.high - figure.mean:.{digits}f}"


def of_student(results: Results, student: str) -> Results:
    rows = [row for row in results.methods if row.student == student]
    runs = [run for run in results.runs if run.student == student]
    return results.model_copy(update={"methods": rows, "runs": runs})


def show(results: Results) -> None:
    print(HEAD)
    print("|---" * 12 + "|")
    print("\n".join(line(row) for row in results.methods))
    if results.teacher is not None:
        own = results.teacher.figures
        print(
            f"\nThe teacher itself: loss {own['loss']:.3f}, ECE {100 * own['ece']:.1f} %, "
            f"overconfidence {100 * own['overconfidence']:.1f} %."
        )
    tables = (seeds_table, pairs_table, order_of_acceptance, drafting_table, tasks_table)
    for table in (*tables, gradient_table):
        if lines := table(results):
            print("\n" + "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    results = read_results(parser.parse_args().results)
    students = list(dict.fromkeys(row.student for row in results.methods))
    for student in students:
        if len(students) > 1:
            print(f"\n{student}:\n")
        show(of_student(results, student))


if __name__ == "__main__":
    main()
