"""Define the commands; each one parses options, makes one call and prints one result.

Results go to standard output (JSON with `--json`), progress and notes to standard error. Exit codes
and final messages are in `endings`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.rich_utils
from rich.table import Table
from rich.text import Text

from sparselogits import __version__
from sparselogits.cli.cache import CacheCommand, cache
from sparselogits.cli.compare import compare
from sparselogits.cli.demo import demo
from sparselogits.cli.endings import end_of
from sparselogits.cli.evaluate import evaluate_command
from sparselogits.cli.gradients import gradients
from sparselogits.cli.import_ import import_command
from sparselogits.cli.info import info
from sparselogits.cli.plan import plan
from sparselogits.cli.report import report
from sparselogits.cli.shrink import shrink
from sparselogits.cli.store import card, export, merge, push, repair, verify
from sparselogits.cli.train import train
from sparselogits.cli.view import view
from sparselogits.console import quiet_transformers

app = typer.Typer(
    name="sparselogits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Offline knowledge distillation of language models from a cache of sparse, unbiased "
    "teacher targets.",
)


_NAME_WIDTH = 32


class _OptionTable(Table):
    """A table of options in two columns: names with types, which are never cut, and help texts."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row as rich does; `cells` are those of typer: names, the type and the help text."""
        if len(cells) < 3:
            super().add_row(*cells, **options)
            return
        lines: list[Text] = []
        for cell in cells[:-1]:
            piece = Text(cell) if isinstance(cell, str) else cell
            if not piece or piece.plain == "<bool>":
                continue
            if lines and len(lines[-1]) + 1 + len(piece) <= _NAME_WIDTH:
                lines[-1] = Text(" ").join([lines[-1], piece])
            else:
                lines.append(piece)
        super().add_row(Text("\n").join(lines), cells[-1], **options)
        self.columns[0].no_wrap = True


# typer draws help pages with the class of this name; its own six columns leave no room for texts
setattr(typer.rich_utils, "Table", _OptionTable)  # noqa: B010


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparselogits {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error. Can be given anywhere on the command line.",
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_say_version, is_eager=True
        ),
    ] = False,
) -> None:
    state = context.ensure_object(dict)
    state["command"] = context.invoked_subcommand
    quiet_transformers()


_MAKE, _KEEP = "Make a cache", "Look after a cache"
_USE, _STUDY = "Train and evaluate", "Study"

# in the order of `sparselogits --help`; the help page of a command ends with its example
_COMMANDS: tuple[tuple[str, Callable[..., None], str, str], ...] = (
    ("cache", cache, _MAKE, "--teacher demo --data notes.txt --out my-cache --holdout 0.05"),
    (
        "import",
        import_command,
        _MAKE,
        "logprobs.jsonl --tokenizer MODEL --vocab-size 128256 --out my-cache",
    ),
    ("plan", plan, _MAKE, "--teacher-params 8B --student-params 1B --tokens 10B"),
    ("demo", demo, _MAKE, "--out demo-run"),
    ("train", train, _USE, "--cache my-cache --student-config tiny --out my-run"),
    ("shrink", shrink, _USE, "demo --layers 24 --cache my-cache --out student"),
    ("eval", evaluate_command, _USE, "my-run --cache my-cache --teacher demo"),
    ("info", info, _KEEP, "my-cache"),
    ("view", view, _KEEP, "my-cache --window 3 --teacher demo"),
    ("verify", verify, _KEEP, "my-cache"),
    ("repair", repair, _KEEP, "my-cache"),
    ("merge", merge, _KEEP, "part-1 part-2 --out my-cache"),
    ("export", export, _KEEP, "my-cache --out plain --format lists"),
    ("card", card, _KEEP, "my-cache"),
    ("push", push, _KEEP, "my-cache hf://datasets/me/my-cache"),
    ("compare", compare, _STUDY, "comparison.yaml"),
    ("report", report, _STUDY, "my-comparison"),
    ("gradients", gradients, _STUDY, "my-run --teacher demo --data other.txt"),
)
for _name, _function, _panel, _example in _COMMANDS:
    app.command(
        _name,
        cls=CacheCommand if _function is cache else None,
        rich_help_panel=_panel,
        no_args_is_help=_name != "demo",
        epilog=f"Example: sparselogits {_name} {_example}",
    )(_function)


def main() -> None:
    """Run a command, and turn an exception into a message and an exit code."""
    end_of(app)
