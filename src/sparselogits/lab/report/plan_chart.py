"""Draw a chart of device hours with a cache and with the teacher online, against tokens."""

from __future__ import annotations

from pathlib import Path

from sparselogits.lab.planning import Plan, Settings
from sparselogits.lab.planning.grid import STUDENTS, TOKENS, grid
from sparselogits.lab.report.charts import Drawing, curve_chart, draw_png, looks_of, require_drawing

MODES = ("cached", "online")
"""Legend labels for training from a cache and for training with the teacher online."""


def draw_plan(settings: Settings, path: Path) -> None:
    """Draw the device hours of `grid` as a PNG file, with a line per student and mode.

    Lines are solid for training from a cache, and dashed for training with the teacher online.

    Raises:
        MissingDependencyError: If altair or vl-convert is not installed.
        StorageError: If the file cannot be written.
    """
    require_drawing()
    plans = grid(settings)
    groups = {f"{student}, {mode}": student for student in STUDENTS for mode in MODES}
    points = [
        {"method": f"{student}, {mode}", "x": tokens, "y": hours}
        for student in STUDENTS
        for name, tokens in TOKENS.items()
        for mode, hours in zip(MODES, _hours(settings, plans[student, name]), strict=True)
    ]
    chart = curve_chart(
        points,
        looks_of(groups),
        x="tokens",
        y=f"hours of one {settings.device.name}",
        logarithmic=True,
        marks=True,
    )
    passes = "one pass" if settings.passes == 1 else f"{settings.passes:g} passes"
    drawing = Drawing("plan", f"Device hours of {passes} over the text, by student", chart)
    draw_png(drawing, path, width=560)


def _hours(settings: Settings, found: Plan) -> tuple[float, float]:
    """Return device hours of a cache and all passes from it, and of all passes with the teacher."""
    cached = found.teacher_hours + settings.passes * found.student_hours
    return cached, settings.passes * found.online_hours
