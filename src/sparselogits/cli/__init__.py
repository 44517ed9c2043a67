"""The commands, thin: options in, one call, a result printed.

Results go to standard output (JSON with `--json`), progress and remarks to standard error; exit
codes and what is said at the end are in `endings`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from sparselogits import __version__
from sparselogits.cli.cache import cache
from sparselogits.cli.compare import compare
from sparselogits.cli.demo import demo
from sparselogits.cli.endings import end_of
from sparselogits.cli.evaluate import evaluate_command
from sparselogits.cli.gradients import gradients
from sparselogits.cli.import_ import import_command
from sparselogits.cli.info import info
from sparselogits.cli.plan import plan
from sparselogits.cli.report import report
from sparselogits.cli.store import card, export, merge, push, repair, verify
from sparselogits.cli.train import train
from sparselogits.cli.view import view
from sparselogits.console import quiet_transformers

app = typer.Typer(
    name="sparselogits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Offline knowledge distillation of language models from a cache of sparse, unbiased "
    "teacher targets.",
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparselogits {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere on the line.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    state = context.ensure_object(dict)
    state["command"] = context.invoked_subcommand
    quiet_transformers()


app.command()(cache)
app.command("import")(import_command)
app.command()(info)
app.command()(view)
app.command()(plan)
app.command()(train)
app.command("eval")(evaluate_command)
app.command()(gradients)
app.command()(compare)
app.command()(report)
app.command()(verify)
app.command()(repair)
app.command()(card)
app.command()(push)
app.command()(merge)
app.command()(export)
app.command()(demo)


def main() -> None:
    """Entry point: run a command and turn what it raises into a message and an exit code."""
    end_of(app)
