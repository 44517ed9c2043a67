"""The first table of docs/results.md: every stored comparison in a line.

python experiments/compare/summary.py
"""

from __future__ import annotations

from pathlib import Path

from sparselogits.lab.compare import MethodRow, Results, read_results

RESULTS = Path(__file__).parents[1] / "results"
COMPARISONS = (
    ("compare_small_teacher", "5 M teacher, one pass"),
    ("compare_small_teacher_longer", "the same, three times the text"),
    ("compare_small_teacher_larger", "the same, a larger student"),
    ("compare_small_teacher_converged", "better 5 M teacher, six passes"),
    ("compare_smollm2", "SmolLM2-135M, one pass"),
)
METHODS = ("CE", "full KD", "systematic 12", "RS-KD 12", "Top-K 12")


def cell(row: MethodRow | None) -> str:
    """Held-out loss, and the share of the gap where it is known and not so by definition."""
    if row is None or "loss" not in row.figures:
        return "not run"
    said = f"{row.figures['loss'].mean:.3f}"
    if row.family in ("ce", "full") or row.gap_closed is None:
        return said
    return f"{said} ({row.gap_closed.mean:.0f}\N{NO-BREAK SPACE}%)"


def size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}\N{NO-BREAK SPACE}M"


def lines(results: Results, setting: str) -> list[str]:
    found = []
    tokens = results.settings["corpus"]["training_tokens"]
    for student, parameters in results.settings["student_parameters"].items():
        rows = {row.method: row for row in results.methods if row.student == student}
        cells = [setting, size(parameters), f"{tokens:,}".replace(",", "\N{NO-BREAK SPACE}")]
        cells += [cell(rows.get(method)) for method in METHODS]
        found.append(f"| {' | '.join(cells)} |")
    return found


def table() -> list[str]:
    head = ["setting", "student", "tokens of text", *METHODS]
    found = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, setting in COMPARISONS:
        found += lines(read_results(RESULTS / f"{name}.json"), setting)
    return found


def main() -> None:
    print("\n".join(table()))


if __name__ == "__main__":
    main()
