"""Define the command line: commands parse options, call the library and print results.

Results go to standard output (JSON with `--json`), progress and notes to standard error. The module
`exits` defines exit codes and final messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
import typer.rich_utils
from rich.table import Table
from rich.text import Text

from sparselogits import __version__
from sparselogits.cli.average import average
from sparselogits.cli.cache import CacheCommand, cache
from sparselogits.cli.compare import compare
from sparselogits.cli.demo import demo
from sparselogits.cli.draft import draft_vocabulary
from sparselogits.cli.evaluate import evaluate_command
from sparselogits.cli.exits import run_and_exit
from sparselogits.cli.gradients import gradients
from sparselogits.cli.import_ import import_command
from sparselogits.cli.info import info
from sparselogits.cli.plan import plan
from sparselogits.cli.report import report
from sparselogits.cli.retokenize import retokenize_command
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
"""Largest number of characters in a line that joins names and type of an option."""


class _OptionTable(Table):
    """Table of options in two columns: names with types, never truncated, and help texts."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; join all but the last of three or more cells (names, type, help text)."""
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


# typer draws help pages with `rich_utils.Table`; its six columns leave too little width for texts
setattr(typer.rich_utils, "Table", _OptionTable)  # noqa: B010


def _print_version(requested: bool) -> None:
    """Print the version and exit, if requested."""
    if requested:
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
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Store the name of the command for `exits`, and silence transformers."""
    state = context.ensure_object(dict)
    state["command"] = context.invoked_subcommand
    quiet_transformers()


_CREATE, _MANAGE = "Create a cache", "Manage a cache"
_USE, _ANALYSE = "Train and evaluate", "Analyse"
"""Headings of the command groups in `sparselogits --help`."""

_COMMANDS: tuple[tuple[str, Callable[..., None], str, str], ...] = (
    ("cache", cache, _CREATE, "--teacher demo --data notes.txt --out my-cache --holdout 0.05"),
    (
        "import",
        import_command,
        _CREATE,
        "logprobs.jsonl --tokenizer MODEL --vocab-size 128256 --out my-cache",
    ),
    (
        "retokenize",
        retokenize_command,
        _CREATE,
        "my-cache --tokenizer STUDENT --out student-cache",
    ),
    ("plan", plan, _CREATE, "--teacher-params 8B --student-params 1B --tokens 10B"),
    ("demo", demo, _CREATE, "--out demo-run"),
    ("train", train, _USE, "--cache my-cache --student-config tiny --out my-run"),
    ("shrink", shrink, _USE, "demo --layers 24 --cache my-cache --out student"),
    ("average", average, _USE, "run-1 run-2 run-3 --out teacher"),
    (
        "draft-vocabulary",
        draft_vocabulary,
        _USE,
        "my-cache --size 32000 --out draft.safetensors",
    ),
    ("eval", evaluate_command, _USE, "my-run --cache my-cache --teacher demo"),
    ("info", info, _MANAGE, "my-cache"),
    ("view", view, _MANAGE, "my-cache --window 3 --teacher demo"),
    ("verify", verify, _MANAGE, "my-cache"),
    ("repair", repair, _MANAGE, "my-cache"),
    ("merge", merge, _MANAGE, "part-1 part-2 --out my-cache"),
    ("export", export, _MANAGE, "my-cache --out plain --format lists"),
    ("card", card, _MANAGE, "my-cache"),
    ("push", push, _MANAGE, "my-cache hf://datasets/me/my-cache"),
    ("compare", compare, _ANALYSE, "comparison.yaml"),
    ("report", report, _ANALYSE, "my-comparison"),
    ("gradients", gradients, _ANALYSE, "my-run --teacher demo --data other.txt"),
)
"""Name, function, group and example arguments of each command, in the order of `--help`."""

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
    run_and_exit(app)
