"""What a person sees while something long runs: rate and time left, on a terminal or in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

messages = Console(stderr=True, highlight=False)
"""Progress and remarks; results go to standard output."""

LOG_SECONDS = 15.0
NOTEBOOK_SECONDS = 0.5


def quiet_transformers() -> None:
    """Keep transformers' own bars and loading chatter out of the way of ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "transformers" in sys.modules:  # it read the environment when it was imported
        from transformers.utils import logging

        logging.disable_progress_bar()


Update = Callable[..., None]
"""update(done, total | None, note="")"""


@contextmanager
def stage(what: str, unit: str, *, per_unit: float = 1.0) -> Iterator[Update]:
    """Show progress of one piece of work.

    On a terminal a bar; in a notebook one line, written over twice a second; elsewhere (pipes, CI
    logs) a line every `LOG_SECONDS` and one at the end, without control characters.

    Args:
        what: the work, as a gerund ("packing text").
        unit: of the counts shown ("tokens").
        per_unit: units in one step of the counts that `update` is given.
    """
    started = time.monotonic()
    first: list[float] = []

    def describe(done: float, total: float | None, note: str) -> str:
        if not first:
            first.append(done)
        elapsed = time.monotonic() - started
        rate = (done - first[0]) / elapsed if elapsed > 0 else 0.0
        large = max(done, total or 0) * per_unit >= 10 or per_unit >= 1
        digits = 0 if large else 2
        parts = [f"{done * per_unit:,.{digits}f}"]
        if total:
            parts[0] += f"/{total * per_unit:,.{digits}f}"
        parts[0] += f" {unit}"
        if rate > 0:
            parts.append(f"{rate * per_unit:,.0f}/s")
            if total and done < total:
                parts.append(f"{_duration((total - done) / rate)} left")
        return " · ".join([*parts, note] if note else parts)

    if _draws():
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=messages, transient=False) as bar:
            task = bar.add_task(what, total=None, said="")

            def draw(done: float, total: float | None = None, note: str = "") -> None:
                said = describe(done, total, note)
                bar.update(task, completed=done, total=total, said=said)

            yield draw
        return
    last_line, latest = started, ""
    pause, say = (
        (NOTEBOOK_SECONDS, _write_over) if messages.is_jupyter else (LOG_SECONDS, messages.print)
    )

    def log(done: float, total: float | None = None, note: str = "") -> None:
        nonlocal last_line, latest
        latest = describe(done, total, note)
        if time.monotonic() - last_line >= pause:
            last_line = time.monotonic()
            say(f"{what}: {latest}")

    yield log
    say(f"{what}: {latest or 'nothing to do'} · {_duration(time.monotonic() - started)}")
    if messages.is_jupyter:
        sys.stderr.write("\n")


def _write_over(line: str) -> None:
    """In a notebook: in place of the line before it, which may have been longer.

    Printed through rich, each line would be an output of its own, a block of HTML.
    """
    sys.stderr.write(f"\r{line:<100}")
    sys.stderr.flush()


def _draws() -> bool:
    """Whether a bar can be drawn: on a terminal that moves its cursor, whatever FORCE_COLOR says.

    In a notebook rich would want ipywidgets, and warn in place of the bar where it is missing.
    """
    if messages.is_jupyter or messages.is_dumb_terminal:
        return False
    return messages.file.isatty()


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
