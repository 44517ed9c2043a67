"""`sparselogits eval`: a student on held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparselogits.cli.options import Device, Json, device_named, stdout
from sparselogits.console import stage


def evaluate_command(
    student: Annotated[str, typer.Argument(help="Folder of a student, or its run.")],
    cache: Annotated[str, typer.Option(help="Directory or URL with the held-out text.")],
    teacher: Annotated[str | None, typer.Option(help="For KL and agreement.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Packed corpus [default: the cache's own].")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many windows.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the teacher.")] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a student on the held-out text: loss, and how far it is from its teacher."""
    from sparselogits.build import fetch_texts
    from sparselogits.corpus import PackedCorpus
    from sparselogits.data import TextDataset
    from sparselogits.evaluate import evaluate
    from sparselogits.store import Cache
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_causal_lm, load_tokenizer
    from sparselogits.train.run import require_same_teacher

    opened = Cache.open(cache)
    windows = TextDataset(PackedCorpus.open(corpus or fetch_texts(cache) / "corpus"), limit=limit)
    path = Path(student)
    model = load_causal_lm(str(path / "model") if (path / "model").is_dir() else student)
    model.to(device_named(device))
    engine = None
    if teacher is not None:
        engine = load_teacher(
            teacher, tokenizer=load_tokenizer(teacher), dtype=dtype, device=device_named(device)
        )
        require_same_teacher(engine, opened.identity)
    with stage("evaluating", "windows") as update:
        found = evaluate({"student": model}, windows, engine, progress=update)
    if as_json:
        typer.echo(json.dumps({name: row.to_json() for name, row in found.items()}, indent=2))
        return
    facts = opened.statistics()
    table = Table("", "loss", "perplexity", "KL to teacher", "top-1 agreement")
    for name, row in found.items():
        kl = "-" if row.kl is None else f"{row.kl:.4f}"
        agreement = "-" if row.agreement is None else f"{row.agreement:.1%}"
        table.add_row(name, f"{row.loss:.4f}", f"{row.perplexity:.2f}", kl, agreement)
    stdout().print(table)
    stdout().print(
        f"cache: {facts.entries_per_position:.2f} entries and {facts.bytes_per_token:.2f} bytes a "
        f"token; held-out: {next(iter(found.values())).positions:,} positions"
    )
