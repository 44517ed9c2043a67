"""One plan for every size of student and amount of text, and the plot of it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from sparselogits.errors import MissingDependencyError
from sparselogits.files import write_whole
from sparselogits.planning.cost import Plan, Settings, plan

STUDENTS = {"300M": 3e8, "1B": 1e9, "3B": 3e9, "7B": 7e9, "13B": 13e9}
TOKENS = {"1B": 1e9, "10B": 1e10, "100B": 1e11, "1T": 1e12, "10T": 1e13}


def grid(settings: Settings) -> dict[tuple[str, str], Plan]:
    """(student, tokens) -> plan, all else as in `settings`."""
    return {
        (student, amount): plan(replace(settings, student_params=params, tokens=tokens))
        for student, params in STUDENTS.items()
        for amount, tokens in TOKENS.items()
    }


def draw(settings: Settings, path: Path) -> None:
    """Device hours of the cache's way and of an online teacher's, over tokens, as a PNG.

    Raises:
        MissingDependencyError: without matplotlib.
        StorageError: the path cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a plot needs matplotlib: pip install 'sparselogits[report]'"
        ) from error
    plans = grid(settings)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, student in enumerate(STUDENTS):
        row = [plans[student, amount] for amount in TOKENS]
        cached = [p.teacher_hours + settings.passes * p.student_hours for p in row]
        online = [settings.passes * p.online_hours for p in row]
        axes.loglog(TOKENS.values(), cached, "o-", color=f"C{number}", label=student)
        axes.loglog(TOKENS.values(), online, "--", color=f"C{number}")
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"hours of one {settings.device.name}")
    axes.set_title(f"{settings.passes:g} passes: cache (solid), online teacher (dashed)")
    axes.legend(title="student")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())
