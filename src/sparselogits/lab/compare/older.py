"""Convert the finished work of earlier versions to the current file layout (`finished.py`).

OUT/draws.json                  {"teacher": weights, "parameters": {draw: sampler}}
OUT/teacher.json                {"of": inputs, "row": row}
OUT/gradients.json              {"found": {fingerprint: rows}, ...}
OUT/tasks/teacher.json          {"scores": {task: {"fingerprint": ..., "scores": ...}}, ...}
OUT/runs/ID/tasks.json          the same for a student
OUT/runs/ID/outcome.json        outcome of a run, with its fingerprint
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparselogits.lab.compare.finished import FinishedWork, fingerprint


def convert_older_work(out: Path, work: FinishedWork) -> None:
    """Store the values that an earlier version computed, unless they are already stored."""
    for kind, key, value in _older(out):
        if work.value(kind, key) is None:
            work.store(kind, key, value)


def _older(out: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield the kind, fingerprint and value of readable results of an earlier version."""
    draws = _read(out / "draws.json")
    for draw, sampler in draws.get("parameters", {}).items():
        yield "samplers", fingerprint([draws["teacher"], draw]), sampler
    if teacher := _read(out / "teacher.json"):
        yield "teacher", fingerprint(teacher["of"]), teacher["row"]
    for key, rows in _read(out / "gradients.json").get("found", {}).items():
        yield "gradients", key, rows
    for task in _read(out / "tasks" / "teacher.json").get("scores", {}).values():
        yield "tasks", fingerprint(task["fingerprint"].split(" ", 1)), task["scores"]
    for file in sorted(out.glob("runs/*/outcome.json")):
        if not (outcome := _read(file)):
            continue
        run = outcome["fingerprint"]
        yield "runs", run, outcome
        for task in _read(file.with_name("tasks.json")).get("scores", {}).values():
            yield "tasks", fingerprint([task["fingerprint"], run]), task["scores"]


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):  # missing, or truncated by a version that wrote in place
        found: dict[str, Any] = json.loads(file.read_bytes())
        return found
    return {}
