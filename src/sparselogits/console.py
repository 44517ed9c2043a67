"""Print results, messages, and the progress of long work with its rate and remaining time.

Names, paths and errors may come from untrusted files, and a terminal executes control characters
(they can change the window title, write to the clipboard, or clear the screen). The consoles of
this module therefore escape control characters in all text, and do not interpret markup in strings;
use `styled` for styled text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from sparselogits.untrusted import printable
from sparselogits.wording import duration, rate, significant


class EscapingConsole(Console):
    """A rich console that escapes the control characters in all text.

    Strings are wrapped on a terminal, but not in pipes and logs, because these have no width.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects as rich's `Console.print` does, but wrap strings only on a terminal."""
        if not self.is_terminal and all(isinstance(each, str) for each in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to rich text; escape control characters before its width is measured."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments that rich renders, with text escaped, but not control segments."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else segment._replace(text=text)


_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}

messages = EscapingConsole(stderr=True, **_PLAIN)
"""Console on standard error, for progress and messages; `results` returns the one for results."""


def results() -> Console:
    """Return a new console on standard output, for results."""
    return EscapingConsole(**_PLAIN)


def styled(label: str, style: str, rest: str = "") -> Text:
    """Return a label in a rich style, followed by plain text."""
    return Text.assemble((label, style), printable(rest))


LOG_SECONDS = 15.0
"""Minimum number of seconds between progress lines in pipes and logs; the last may be sooner."""

MEASURABLE_SECONDS = 0.2
"""Minimum time in seconds over which a rate is measured; a shorter time gives no useful rate."""

NOTEBOOK_SECONDS = 0.5
"""Minimum number of seconds between two updates of a progress line in a notebook."""


def quiet_transformers() -> None:
    """Silence progress bars, and messages of transformers below the level of errors.

    Call this before other libraries are imported: it sets environment variables that they read at
    import, unless the variables are set already. Of libraries that are imported already, only the
    progress bars of transformers and `datasets` are disabled, whatever the variables are.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:  # transformers reads the environment when it is imported
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()


Update = Callable[..., None]
"""Function `update(done, total=None, note="")` that reports a count, its total and a remark."""


@contextmanager
def stage(what: str, unit: str, *, per_unit: float = 1.0) -> Iterator[Update]:
    """Display the progress of one task; yield the function that updates the display.

    A terminal shows a bar; a notebook shows a line that is overwritten, at most once per
    `NOTEBOOK_SECONDS`. A pipe or log gets at most one line per `LOG_SECONDS` and one after the task
    has succeeded, without control characters.

    Args:
        what: the task, as a gerund ("packing text").
        unit: name of the counted unit, in the plural ("tokens").
        per_unit: number of units that correspond to a count of 1 passed to `update`.

    Example:
        >>> with stage("reading windows", "windows") as update:
        ...     for done in range(1, 4):
        ...         update(done, 3)
    """
    started = time.monotonic()
    first: list[tuple[float, float]] = []  # time and count of the first update

    def describe(done: float, total: float | None, note: str) -> str:
        now = time.monotonic()
        if not first:
            first.append((now, done))
        elapsed, gained = now - first[0][0], done - first[0][1]
        amounts = [amount * per_unit for amount in ([done] if total is None else [done, total])]
        noun = unit.removesuffix("s") if amounts[-1] == 1 else unit
        parts = [f"{'/'.join(map(significant, amounts))} {noun}"]
        if gained > 0 and elapsed >= MEASURABLE_SECONDS:
            parts.append(rate(gained * per_unit / elapsed, unit))
            if total and done < total:
                parts.append(f"{duration((total - done) * elapsed / gained)} left")
        return " · ".join([*parts, note] if note else parts)

    if _can_draw_bar():
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=messages, transient=False) as bar:
            task = bar.add_task(what, total=None, state="")

            def draw(done: float, total: float | None = None, note: str = "") -> None:
                state = describe(done, total, note)
                bar.update(task, completed=done, total=total, state=state)

            yield draw
        return
    last_line, latest = started, ""
    pause, write = (
        (NOTEBOOK_SECONDS, _overwrite_line)
        if messages.is_jupyter
        else (LOG_SECONDS, messages.print)
    )

    def log(done: float, total: float | None = None, note: str = "") -> None:
        nonlocal last_line, latest
        latest = describe(done, total, note)
        if time.monotonic() - last_line >= pause:
            last_line = time.monotonic()
            write(f"{what}: {latest}")

    yield log
    write(f"{what}: {latest or 'nothing to do'} · {duration(time.monotonic() - started)}")
    if messages.is_jupyter:
        sys.stderr.write("\n")


def _overwrite_line(line: str) -> None:
    """Overwrite a notebook's progress line; pad it to 100 characters to cover the previous text.

    rich is not used, because it would add a separate block of HTML per line.
    """
    sys.stderr.write(f"\r{line:<100}")
    sys.stderr.flush()


def _can_draw_bar() -> bool:
    """Return whether standard error is a terminal with a movable cursor.

    The stream is checked, because rich's property is also true in a pipe with FORCE_COLOR. In a
    notebook rich needs ipywidgets to draw a bar, so a plain line is written there.
    """
    if messages.is_jupyter or messages.is_dumb_terminal:
        return False
    return messages.file.isatty()
