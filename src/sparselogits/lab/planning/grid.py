"""Compute plans for several student sizes and amounts of text."""

from __future__ import annotations

from dataclasses import replace

from sparselogits.lab.planning.cost import Plan, Settings, plan

STUDENTS = {"300M": 3e8, "1B": 1e9, "3B": 3e9, "7B": 7e9, "13B": 13e9}
"""Student sizes in the grid: number of parameters by label."""
TOKENS = {"1B": 1e9, "10B": 1e10, "100B": 1e11, "1T": 1e12, "10T": 1e13}
"""Amounts of text in the grid: number of tokens by label."""


def grid(settings: Settings) -> dict[tuple[str, str], Plan]:
    """Compute a plan for each pair of `STUDENTS` and `TOKENS`, by (student, tokens).

    Args:
        settings: inputs of the plans; `student_params` and `tokens` are replaced.
    """
    return {
        (student, amount): plan(replace(settings, student_params=params, tokens=tokens))
        for student, params in STUDENTS.items()
        for amount, tokens in TOKENS.items()
    }
