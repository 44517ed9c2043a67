"""The commands, thin: options in, one call, a result printed.

Exit codes: 0 done, 2 a mistake that the message explains, 130 interrupted (and resumable), 1 a
bug. Results go to standard output (JSON with `--json`), progress and remarks to standard error.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparselogits.cli.cache import cache
from sparselogits.cli.demo import demo
from sparselogits.cli.evaluate import evaluate_command
from sparselogits.cli.gradients import gradients
from sparselogits.cli.info import info
from sparselogits.cli.plan import plan
from sparselogits.cli.store import export, merge, repair, verify
from sparselogits.cli.train import train
from sparselogits.console import messages, quiet_transformers
from sparselogits.errors import SparseLogitsError, SparseLogitsWarning

app = typer.Typer(
    name="sparselogits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Offline knowledge distillation of language models from a cache of sparse, unbiased "
    "teacher targets.",
)

INTERRUPTED = 130


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = {"debug": debug}
    quiet_transformers()


app.command()(cache)
app.command()(info)
app.command()(plan)
app.command()(train)
app.command("eval")(evaluate_command)
app.command()(gradients)
app.command()(verify)
app.command()(repair)
app.command()(merge)
app.command()(export)
app.command()(demo)


def main() -> None:
    """Entry point: run a command and turn what it raises into a message and an exit code."""
    debug = "--debug" in sys.argv
    warnings.showwarning = _show_warning
    try:
        app()
    except SystemExit as stop:  # how typer ends, a usage error (2) or Ctrl-C (130) included
        if stop.code == INTERRUPTED:
            _say_interrupted()
        raise
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(INTERRUPTED)
    except SparseLogitsError as error:
        if debug:
            raise
        messages.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


def _say_interrupted() -> None:
    messages.print("\ninterrupted; what was finished is kept. The same command goes on from there.")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SparseLogitsWarning):
        messages.print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)
