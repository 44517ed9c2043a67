"""What commands share: option types and where results go."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]


def device_named(name: str) -> str:
    """The device an option names; auto is the accelerator where there is one."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def stdout() -> Console:
    """Where results are printed; progress and remarks go to standard error."""
    return Console(highlight=False)
