"""Define `sparselogits report`, which writes the report page of a comparison."""

from __future__ import annotations

from pathlib import Path

import typer

from sparselogits.cli.options import OUTPUT, print_next
from sparselogits.console import results


def report(
    comparison: Path = typer.Argument(help="Folder of a comparison, or its results.json."),
    out: Path | None = OUTPUT(
        "Folder for the page and its charts.", shown="the comparison's folder"
    ),
) -> None:
    """Write the report page of a comparison from results.json, even while the comparison runs."""
    from sparselogits.lab.compare import read_results
    from sparselogits.lab.report import write_report

    folder = comparison if comparison.is_dir() else comparison.parent
    page = write_report(read_results(comparison), out or folder)
    results().print(str(page), soft_wrap=True)
    print_next(otherwise=f"open {page} in a browser")
