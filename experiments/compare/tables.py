"""Print the tables of a stored comparison, with intervals over seeds.

    python experiments/compare/tables.py experiments/results/compare_small_teacher.json

Intervals are computed here from the seeds' own numbers (`runs` of results.json): Student's t for
means and differences paired by seed, Fieller's for shares of the gap. So they do not
depend on the version that wrote the results. Intervals of zero-shot tasks are the stored bootstrap
intervals over samples, those of gradients the stored t intervals over batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sparselogits.evaluate import Estimate, fieller_interval, t_interval
from sparselogits.lab.compare import MethodRow, Results, read_results
from sparselogits.lab.compare.results import MetricEstimate, OfBatches
from sparselogits.lab.compare.tasks import column_of

HEAD = (
    "| method | seeds | rounds | entries | bytes | loss | loss - CE | of the gap % | KL | ECE % | "
    "overconf. % | acceptance % | agreement % |"
)


class Seeds:
    """Metrics of the runs of one student, by method and seed.

    Args:
        results: stored comparison.
        student: name of the student; by default the first one.
    """

    def __init__(self, results: Results, student: str | None = None) -> None:
        self.student = student or results.methods[0].student
        self.rows = {own.method: own for own in results.methods if own.student == self.student}
        self._runs = {
            (run.method, run.seed): run.figures
            for run in results.runs
            if run.student == self.student and run.status == "done"
        }

    def values(self, *methods: str, metric: str = "loss") -> list[list[float]]:
        """Return a metric of each method, over the seeds that all given methods have."""
        done = [{s for m, s in self._runs if m == method} for method in methods]
        seeds = sorted(set.intersection(*done))
        return [[self._runs[method, seed][metric] for seed in seeds] for method in methods]

    def mean(self, method: str, metric: str = "loss") -> Estimate | None:
        """Return the mean of a metric with Student's t over seeds; None without finished runs."""
        (own,) = self.values(method, metric=metric)
        return t_interval(own) if own else None

    def less(self, method: str, other: str, metric: str = "loss") -> Estimate | None:
        """Return the paired difference of two methods; None if they share no seed."""
        found = self.differences(method, other, metric)
        return t_interval(found) if found else None

    def differences(self, method: str, other: str, metric: str = "loss") -> list[float]:
        """Return the difference of two methods per seed; empty if a method is missing."""
        if method not in self.rows or other not in self.rows:
            return []
        one, another = self.values(method, other, metric=metric)
        return [x - y for x, y in zip(one, another, strict=True)]

    def gap(self, method: str) -> Estimate | None:
        """Return the closed share of the gap from CE to full KD in per cent; None if no gap."""
        if not {method, "CE", "full KD"} <= set(self.rows):
            return None
        own, ce, full = self.values(method, "CE", "full KD")
        if not own:
            return None
        whole = [x - y for x, y in zip(ce, full, strict=True)]
        if (t_interval(whole).low or 0) <= 0:
            return None
        return fieller_interval([100 * (x - y) for x, y in zip(ce, own, strict=True)], whole)


def said(found: Estimate | None, digits: int = 3, scale: float = 1, sign: str = "") -> str:
    """Format an estimate with its interval, for example "0.734 (0.490 to 0.979)"."""
    if found is None:
        return "-"

    def own(value: float) -> str:
        return f"{round(scale * value, digits) + 0.0:{sign}.{digits}f}"  # no negative zero

    if found.low is None or found.high is None:
        return own(found.mean)
    return f"{own(found.mean)} ({own(found.low)} to {own(found.high)})"


def line(row: MethodRow, seeds: Seeds) -> str:
    """Return the line of a method in the main table."""
    if not row.seeds_done:
        state = "failed" if row.seeds_failed else "not run"
        return f"| {row.method} | {state} |" + " - |" * 11

    def mean(metric: str, scale: float = 1, digits: int = 3) -> str:
        found = seeds.mean(row.method, metric)
        return "-" if found is None else f"{scale * found.mean:.{digits}f}"

    rounds = (row.sampler or {}).get("rounds")
    reference = row.family == "ce" or row.method == "full KD"
    cells = [
        row.method,
        str(len(row.seeds_done)),
        "-" if rounds is None else str(rounds),
        "-" if row.entries is None else f"{row.entries:.1f}",
        "-" if row.bytes_per_token is None else f"{row.bytes_per_token:.1f}",
        said(seeds.mean(row.method)),
        "-" if row.family == "ce" else said(seeds.less(row.method, "CE")),
        "-" if reference else said(seeds.gap(row.method), 0),
        mean("kl"),
        mean("ece", 100, 1),
        said(seeds.mean(row.method, "overconfidence"), 1, 100),
        mean("acceptance", 100, 1),
        mean("agreement", 100, 1),
    ]
    return f"| {' | '.join(cells)} |"


def main_table(results: Results) -> list[str]:
    """Return the table of the metrics of all methods, with those of the teacher below."""
    seeds = Seeds(results)
    lines = [HEAD, "|---" * 13 + "|", *(line(row, seeds) for row in results.methods)]
    if results.teacher is None:
        return lines
    own = results.teacher.figures
    return [
        *lines,
        "",
        f"The teacher: loss {own['loss']:.3f}, ECE {100 * own['ece']:.1f} %, overconfidence "
        f"{100 * own['overconfidence']:.1f} %.",
    ]


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
"""Pairs of methods whose difference is printed if the comparison has both."""


def pairs_table(results: Results) -> list[str]:
    """Return the table of differences in loss, paired by seed."""
    seeds, lines = Seeds(results), []
    for one, other in PAIRS:
        if differences := seeds.differences(one, other):
            by_seed = ", ".join(f"{own:+.3f}" for own in differences)
            found = said(t_interval(differences), sign="+")
            lines.append(f"| {one} | {other} | {found} | {by_seed} |")
    if not lines:
        return []
    return [
        "| method | minus | loss, t interval over seeds | each seed |",
        "|---" * 4 + "|",
        *lines,
    ]


def drafting_table(results: Results) -> list[str]:
    """Return the table of realised and expected acceptance; empty if none was measured."""
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


def order_of_acceptance(results: Results) -> float:
    """Return Spearman's rank correlation of acceptance and loss over the finished methods."""
    done = [row.figures for row in results.methods if row.seeds_done]
    loss, acceptance = (
        np.argsort(np.argsort([sign * own[name].mean for own in done]))
        for name, sign in (("loss", -1), ("acceptance", 1))
    )
    return float(np.corrcoef(loss, acceptance)[0, 1])


def acceptance_line(results: Results) -> list[str]:
    """Return the rank correlation of acceptance and loss as a sentence; empty if too few."""
    done = sum(bool(row.seeds_done) for row in results.methods)
    if done < 3:
        return []
    rho = order_of_acceptance(results)
    return [f"Acceptance against loss, rank correlation over {done} methods: {rho:.2f}."]


def tasks_table(results: Results) -> list[str]:
    """Return the table of zero-shot scores; empty if none was measured."""
    names = list(dict.fromkeys(name for row in results.methods for name in row.tasks))
    if not names:
        return []
    columns = [(name, *column_of(name)) for name in names]
    lines = [f"| method | {' | '.join(head for _, head, _, _ in columns)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in results.methods:
        cells = (over_samples(row.tasks.get(n), scale, digits) for n, _, scale, digits in columns)
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    if results.teacher is not None:
        known = results.teacher.tasks
        own = (f"{scale * known[n]:.{d}f}" if n in known else "-" for n, _, scale, d in columns)
        lines.append(f"| (the teacher) | {' | '.join(own)} |")
    return lines


def over_samples(score: MetricEstimate | None, scale: float, digits: int) -> str:
    """Format the score of a task with its bootstrap interval over samples."""
    if score is None:
        return "-"
    own = score.windows
    return said(Estimate(score.mean, own.low, own.high, 0), digits, scale)


def gradient_table(results: Results) -> list[str]:
    """Return the table of gradient angles per batch size, and norm ratio, bias and noise."""
    measured = [row for row in results.methods if row.gradient is not None]
    if not measured:
        return []
    assert measured[0].gradient is not None
    on, sizes = measured[0].gradient, [own.batch_tokens for own in measured[0].gradient.sizes]
    angles = " | ".join(f"angle, {size:,} tokens" for size in sizes)
    lines = [
        f"Gradients compared with full KD's, on the student that {on.student_method} with seed "
        f"{on.student_seed} left; angles in degrees, ± half of Student's t interval over batches:",
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


def over_batches(metric: OfBatches, digits: int) -> str:
    """Format the mean of a metric with ± half of its interval over batches."""
    mean = f"{metric.mean:.{digits}f}"
    return mean if metric.high is None else f"{mean} ± {metric.high - metric.mean:.{digits}f}"


def of_student(results: Results, student: str) -> Results:
    """Return the results with the methods and runs of one student only."""
    rows = [row for row in results.methods if row.student == student]
    runs = [run for run in results.runs if run.student == student]
    return results.model_copy(update={"methods": rows, "runs": runs})


TABLES = (
    main_table,
    pairs_table,
    acceptance_line,
    drafting_table,
    tasks_table,
    gradient_table,
)


def tables_of(results: Results) -> list[str]:
    """Return all tables of a comparison as lines of Markdown, in one group per student."""
    students = list(dict.fromkeys(row.student for row in results.methods))
    lines: list[str] = []
    for student in students:
        if len(students) > 1:
            lines += [f"## {student}", ""]
        for table in TABLES:
            if own := table(of_student(results, student)):
                lines += [*own, ""]
    return lines[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    print("\n".join(tables_of(read_results(parser.parse_args().results))))


if __name__ == "__main__":
    main()
