"""Define `sparselogits demo`, which needs no data or model but those of Python packages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparselogits.cli.options import OUTPUT, Json, say_json, say_next, stdout


def demo(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of everything that the demo makes: 4 GB meanwhile, 2 GB at the end.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """Prune a small model and heal it with each method; about four minutes, without a hub."""
    from sparselogits.extras import require_demo

    require_demo()  # before torch is imported, which takes seconds
    from sparselogits.lab.demo import run_demo

    result = run_demo(out)
    if as_json:
        paths = {"report": str(result.report), "student": str(result.student)}
        say_json(result.to_json() | paths | {"talk": result.talk})
        return
    console = stdout()
    console.print(result.table())
    console.print(result.remark(), soft_wrap=True)
    for sample in result.samples:
        console.print(f"\n{sample.prompt}", soft_wrap=True)
        for name, said in sample.texts.items():
            console.print(f"  {name}: {said}", soft_wrap=True)
    console.print(f"\nreport: {result.report}", soft_wrap=True)
    console.print(f"student: {result.student}; talk to it with", soft_wrap=True)
    console.print(result.talk, soft_wrap=True)
    say_next(otherwise=f"open {result.report} in a browser")
