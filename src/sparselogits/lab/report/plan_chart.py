"""Draw the chart of a plan: device hours with a cache and with an online teacher, by tokens."""

from __future__ import annotations

from pathlib import Path

from sparselogits.lab.planning import Plan, Settings
from sparselogits.lab.planning.grid import STUDENTS, TOKENS, grid
from sparselogits.lab.report.charts import Drawing, curve_chart, draw_png, looks_of, require_drawing

WAYS = ("cached", "online")


def draw_plan(settings: Settings, path: Path) -> None:
    """Draw the grid of a plan as a PNG file; solid lines with a cache, dashed ones without.

    Raises:
        MissingDependencyError: altair or vl-convert is not installed.
    """
    require_drawing()
    draw_png(plan_drawing(settings), path, width=560)


def plan_drawing(settings: Settings) -> Drawing:
    """Return the chart of a grid of plans."""
    plans = grid(settings)
    groups = {f"{student}, {way}": student for student in STUDENTS for way in WAYS}
    points = [
        {"method": f"{student}, {way}", "x": tokens, "y": hours}
        for student in STUDENTS
        for name, tokens in TOKENS.items()
        for way, hours in zip(WAYS, _hours(settings, plans[student, name]), strict=True)
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
    title = f"Device hours of {passes} over the text, by student"
    return Drawing("plan", title, chart)


def _hours(settings: Settings, found: Plan) -> tuple[float, float]:
    """Return device hours with a cache and with an online teacher."""
    cached = found.teacher_hours + settings.passes * found.student_hours
    return cached, settings.passes * found.online_hours
