"""What commands share: option types and where results go."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from sparselogits.errors import InvalidArgumentError, reason_of

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]


def device_named(name: str) -> str:
    """The device an option names; auto is the accelerator where there is one.

    Raises:
        InvalidArgumentError: a device that torch does not know, or that is not here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = reason_of(error).splitlines()[0]
        raise InvalidArgumentError(
            f"--device {name} cannot be used here ({first}); choose auto or cpu, or install a "
            "torch that was built for that device"
        ) from error
    return name


def stdout() -> Console:
    """Where results are printed; progress and remarks go to standard error."""
    return Console(highlight=False)
