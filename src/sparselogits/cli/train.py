"""`sparselogits train`: a student from a cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from sparselogits.cli.options import Device, Json, device_named, stdout
from sparselogits.console import messages, stage


def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe.")] = None,
    cache: Annotated[str | None, typer.Option(help="Directory or URL of the cache.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run.")] = None,
    method: Annotated[str | None, typer.Option(help="sparse, ce, full or reverse_kl.")] = None,
    teacher: Annotated[str | None, typer.Option(help="For full and reverse_kl.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the labels' loss.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the cache.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and order.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a student, from a recipe or from options alone; under torchrun, on all its ranks."""
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
        typer.echo(json.dumps(facts | {"curve": result.curve}, indent=2))
    else:
        last = f", last loss {result.curve[-1][1]:.3f}" if result.curve else ""
        stdout().print(f"student in {result.model_path}: {result.steps} steps{last}")
