"""Define `sparselogits average`, which averages the weights of checkpoints into one model."""

from __future__ import annotations

from pathlib import Path

import typer

from sparselogits.cli.options import OUTPUT, Allow, Json, print_json, print_next
from sparselogits.console import results, stage
from sparselogits.wording import counted


def average(
    checkpoints: list[str] = typer.Argument(
        help="Model folders of one architecture: checkpoints of a run, or runs that started from "
        "the same weights.",
        metavar="CHECKPOINT...",
    ),
    out: Path = OUTPUT("Output folder for the averaged model.", ...),
    save_dtype: str = OUTPUT(
        "Data type of the saved weights: float32, bfloat16, float16, or auto for that of the first "
        "checkpoint.",
        "auto",
    ),
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Average the weights of checkpoints into a model to use as a teacher or as a student."""
    from sparselogits.train import average_checkpoints

    with stage("averaging", "checkpoints") as update:
        average_checkpoints(checkpoints, out, dtype=save_dtype, progress=update)
    if as_json:
        print_json({"out": str(out), "checkpoints": checkpoints})
        return
    results().print(f"{out}: the mean of {counted(len(checkpoints), 'checkpoint')}", soft_wrap=True)
    print_next("cache", "--teacher", out, "--data", "TEXT", "--out", "my-cache")
