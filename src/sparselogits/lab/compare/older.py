"""Finished work as older versions stored it, taken over so that nothing is computed again.

OUT/draws.json                  {"teacher": weights, "parameters": {draw: sampler}}
OUT/teacher.json                {"of": determined, "row": row}
OUT/gradients.json              {"found": {fingerprint: rows}, ...}
OUT/tasks/teacher.json          {"scores": {task: {"fingerprint": ..., "scores": ...}}, ...}
OUT/runs/ID/tasks.json          likewise, of the student
OUT/runs/ID/outcome.json        the outcome, with its fingerprint
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparselogits.lab.compare.finished import FinishedWork, fingerprint


def take_over(out: Path, work: FinishedWork) -> None:
    """Keep what an older version has finished, where it is not kept yet."""
    for kind, key, value in _older(out):
        if work.value(kind, key) is None:
            work.keep(kind, key, value)


def _older(out: Path) -> Iterator[tuple[str, str, Any]]:
    draws = _read(out / "draws.json")
    for draw, sampler in draws.get("parameters", {}).items():
        yield "samplers", fingerprint([draws["teacher"], draw]), sampler
    if teacher := _read(out / "teacher.json"):
        yield "teacher", fingerprint(teacher["of"]), teacher["row"]
    for key, rows in _read(out / "gradients.json").get("found", {}).items():
        yield "gradients", key, rows
    for own in _read(out / "tasks" / "teacher.json").get("scores", {}).values():
        yield "tasks", fingerprint(own["fingerprint"].split(" ", 1)), own["scores"]
    for file in sorted(out.glob("runs/*/outcome.json")):
        if not (outcome := _read(file)):
            continue
        yield "runs", outcome["fingerprint"], outcome
        for own in _read(file.with_name("tasks.json")).get("scores", {}).values():
            yield "tasks", fingerprint([own["fingerprint"], outcome["fingerprint"]]), own["scores"]


def _read(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):  # absent; or cut short by a version that wrote in place
        found: dict[str, Any] = json.loads(file.read_bytes())
        return found
    return {}
