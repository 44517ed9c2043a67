"""`sparselogits train`: a student from a cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    TRAINING,
    Device,
    Json,
    device_named,
    say_json,
    say_next,
    stdout,
)
from sparselogits.console import messages, stage
from sparselogits.wording import counted


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="YAML recipe of the run; options take precedence over it.",
            show_default="options only",
        ),
    ] = None,
    *,
    method: Annotated[
        str | None,
        typer.Option(
            help="Loss: sparse (from the cache), ce (labels only), full or reverse_kl (teacher "
            "online).",
            show_default="sparse",
            rich_help_panel=MODEL,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help=f"Teacher of the cache, for full and reverse_kl: {MODEL_NAMES}.",
            show_default="no teacher",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: Device = "auto",
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL of the cache to train from.",
            show_default="the recipe's",
            rich_help_panel=DATA,
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the cache.", show_default="1", rich_help_panel=TRAINING),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Share of the loss on the labels, between 0 and 1.",
            show_default="0",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate of AdamW.", show_default="0.001", rich_help_panel=TRAINING
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Random seed for initial weights and data order.",
            show_default="0",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run.", show_default="the recipe's", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a student from a recipe or from options; under torchrun, on all its ranks."""
    from sparselogits.train import leave_process_group, load_recipe, run
    from sparselogits.train.recipe import parse_recipe

    options = {
        "cache": cache,
        "out": out,
        "method": method,
        "teacher": teacher,
        "alpha": alpha,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    if recipe is not None:
        loaded = load_recipe(recipe, **options)
    else:
        given = {k: v for k, v in options.items() if v is not None}
        loaded = parse_recipe(given, source="the command line")
    if os.environ.get("RANK", "0") != "0":  # the first of torchrun's ranks speaks for all
        run(loaded, device=device_named(device))
        leave_process_group()
        return
    with stage("training", "steps") as update:
        result = run(
            loaded,
            device=device_named(device),
            progress=lambda done, total, line: update(
                done, total, f"loss {line['loss']:.3f}" if "loss" in line else ""
            ),
        )
    leave_process_group()
    if not result.fresh:
        messages.print("this run was finished before; nothing was done")
    if as_json:
        facts = {"out": str(result.out), "seconds": result.seconds, "steps": result.steps}
        say_json(facts | {"curve": result.curve})
    else:
        last = f", last loss {result.curve[-1][1]:.3f}" if result.curve else ""
        steps = counted(result.steps, "step")
        stdout().print(f"student in {result.model_path}: {steps}{last}", soft_wrap=True)
        say_next("eval", result.out, "--cache", loaded.cache, *_teacher_of(loaded.teacher))


def _teacher_of(name: str | None) -> list[str]:
    return [] if name is None else ["--teacher", name]
