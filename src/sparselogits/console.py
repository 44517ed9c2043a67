"""Print results, and the progress of long work with its rate and remaining time.

Names, paths and errors may come from a file of unknown origin, and a terminal executes control
characters (which change its title, write the clipboard, or clear the screen). The consoles made
here therefore escape control characters in all text, and do not interpret markup in a string: style
comes from `styled`.
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
    """A console that escapes the control characters in all text.

    In pipes and logs, which have no width, lines are not wrapped.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        if not self.is_terminal and all(isinstance(one, str) for one in objects):
            options.setdefault("soft_wrap", True)
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to text, escaped before its width is measured."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, and escape the text of each segment."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else segment._replace(text=text)


def _console(**options: Any) -> Console:
    return EscapingConsole(highlight=False, markup=False, emoji=False, **options)


messages = _console(stderr=True)
"""Progress and remarks; results go to standard output."""


def results() -> Console:
    """Return the console on which results are printed; progress and messages go to `messages`."""
    return _console()


def styled(label: str, style: str, rest: str = "") -> Text:
    """Return a styled label with plain text behind it."""
    return Text.assemble((label, style), printable(rest))


LOG_SECONDS = 15.0
MEASURABLE_SECONDS = 0.2
"""A rate over less than this says nothing."""

NOTEBOOK_SECONDS = 0.5


def quiet_transformers() -> None:
    """Silence the progress bars and loading messages of transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "transformers" in sys.modules:  # it read the environment when it was imported
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets import disable_progress_bars

        disable_progress_bars()


Update = Callable[..., None]
"""update(done, total | None, note="")"""


@contextmanager
def stage(what: str, unit: str, *, per_unit: float = 1.0) -> Iterator[Update]:
    """Show progress of one piece of work.

    On a terminal this is a bar; in a notebook one line that is overwritten twice per second;
    elsewhere (pipes, CI logs) a line every `LOG_SECONDS` and one at the end, without control
    characters.

    Args:
        what: the work, as a gerund ("packing text").
        unit: name of what is counted, in the plural ("tokens").
        per_unit: units per step of the counts passed to `update`.
    """
    started = time.monotonic()
    first: list[tuple[float, float]] = []  # when, and what was there already

    def describe(done: float, total: float | None, note: str) -> str:
        now = time.monotonic()
        if not first:
            first.append((now, done))
        elapsed, gained = now - first[0][0], done - first[0][1]
        amounts = [amount * per_unit for amount in ([done] if total is None else [done, total])]
        one = unit.removesuffix("s")
        said = "/".join(map(significant, amounts)) + f" {one if amounts[-1] == 1 else unit}"
        parts = [said]
        if gained > 0 and elapsed >= MEASURABLE_SECONDS:
            parts.append(rate(gained * per_unit / elapsed, unit))
            if total and done < total:
                parts.append(f"{duration((total - done) * elapsed / gained)} left")
        return " · ".join([*parts, note] if note else parts)

    if _draws():
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[said]}", markup=False),
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
    say(f"{what}: {latest or 'nothing to do'} · {duration(time.monotonic() - started)}")
    if messages.is_jupyter:
        sys.stderr.write("\n")


def _write_over(line: str) -> None:
    """Overwrite the previous line of a notebook, which may have been longer.

    Printed through rich, each line would be a separate output, a block of HTML.
    """
    sys.stderr.write(f"\r{line:<100}")
    sys.stderr.flush()


def _draws() -> bool:
    """Return whether a bar can be drawn: on a terminal with a movable cursor, despite FORCE_COLOR.

    In a notebook rich requires ipywidgets, and warns instead of drawing if it is missing.
    """
    if messages.is_jupyter or messages.is_dumb_terminal:
        return False
    return messages.file.isatty()
