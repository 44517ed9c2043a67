"""`sparselogits demo`: the whole way on material that comes with Python packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparselogits.cli.options import OUTPUT, Json, say_json, say_next, stdout
from sparselogits.console import messages


def demo(
    out: Annotated[
        Path,
        typer.Option(help="Folder of everything that the demo makes.", rich_help_panel=OUTPUT),
    ] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """Cache, train five students and compare them, on a real teacher and text, without a hub."""
    from sparselogits.extras import require_demo

    require_demo()  # before the seconds that importing torch takes
    from sparselogits.lab.demo import run_demo

    result = run_demo(out)
    if as_json:
        say_json(result.to_json())
    else:
        stdout().print(result.table())
        stdout().print(result.remark(), soft_wrap=True)
        stdout().print(f"report: {result.report}", soft_wrap=True)
        messages.print(f"Next: open {result.report} in a browser; then distil text of your own:")
        say_next(
            "cache", "--teacher", "demo", "--data", "TEXT", "--out", "my-cache", "--holdout", "0.05"
        )
