"""Summarise the results of a comparison in a few sentences."""

from __future__ import annotations

import math

from sparselogits.lab.compare.results import MethodRow, Results
from sparselogits.objectives import Masked


def headline(results: Results, student: str) -> str:
    """Describe the method with the lowest held-out loss, compared with CE and full KD.

    Methods that train without a cache are considered only if no other has a finite loss.

    Args:
        results: results of the comparison.
        student: name of the student.
    """
    rows = [row for row in results.methods if row.student == student and _loss(row) is not None]
    if not rows:
        return "No method has a finished run yet."
    ce = next((row for row in rows if row.family == "ce"), None)
    full = next((row for row in rows if row.family == "full"), None)
    cached = [row for row in rows if row.entries is not None]
    best = min(cached or rows, key=lambda row: _loss(row) or 0.0)
    said = f"{best.method} has the lowest held-out loss"
    said += " of the methods that train from a cache" if cached else ""
    said += f": {_loss(best):.3f} nats"
    if best.bytes_per_token is not None:
        entries, size = f"{best.entries:.1f} entries", f"{best.bytes_per_token:.1f} bytes"
        if isinstance(results.objective, Masked):
            said += f" from {entries} per masked token ({size} per token of text)"
        else:
            said += f" from {entries} ({size}) per token"
    others = [
        f"{name} {_loss(row):.3f}"
        for name, row in (("CE without a teacher", ce), ("full KD with the teacher online", full))
        if row is not None and row is not best
    ]
    said += f", compared with {' and '.join(others)}." if others else "."
    return said + _of_the_gap(best, ce, full) + _cheapest(cached, best)


def _of_the_gap(best: MethodRow, ce: MethodRow | None, full: MethodRow | None) -> str:
    """Describe the share of the gap between CE and full KD that a method closes."""
    if ce is None or full is None or best is ce or best is full:
        return ""
    closed = best.gap_closed
    if closed is None and not set(best.seeds_done) & set(ce.seeds_done) & set(full.seeds_done):
        return f" {best.method}, CE and full KD have no finished seed in common."
    if closed is None:
        return " The gap between CE and full KD is not distinguishable from noise here."
    said = f" It closes {closed.mean:.0f} % of the gap between CE and full KD"
    ends = closed.both
    if ends.low is not None and ends.high is not None:
        said += f" (95 % interval {ends.low:.0f} to {ends.high:.0f} %)"
    return said + "."


def _cheapest(cached: list[MethodRow], best: MethodRow) -> str:
    """Describe the smallest cache whose loss is not distinguishable from the best method's."""
    loss, size = best.figures["loss"].mean, best.bytes_per_token
    if size is None:
        return ""
    near = [
        row
        for row in cached
        if row.bytes_per_token is not None
        and row.bytes_per_token < size
        and (ends := row.figures["loss"].seeds).low is not None
        and ends.low <= loss
    ]
    if not near:
        return ""
    least = min(near, key=lambda row: row.bytes_per_token or 0.0)
    return (
        f" {least.method} needs {least.bytes_per_token:.1f} bytes per token, and the interval of "
        "its loss over seeds includes the best one's."
    )


def _loss(row: MethodRow) -> float | None:
    loss = row.figures.get("loss")
    return loss.mean if loss is not None and math.isfinite(loss.mean) else None
