"""Define `sparselogits import`, which creates a cache from collected log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparselogits.cli.info import print_info
from sparselogits.cli.options import (
    DATA,
    MODEL,
    MODEL_NAMES,
    OUTPUT,
    TARGETS,
    Allow,
    Json,
    TrustRemoteCode,
    WindowsPerShard,
    print_train_command,
)
from sparselogits.console import messages, stage
from sparselogits.wording import counted


def import_command(
    data: Annotated[
        str,
        typer.Argument(
            help="JSON lines or Parquet with tokens and their Top-K log-probabilities: a file, a "
            "folder or a glob pattern."
        ),
    ],
    *,
    tokenizer: Annotated[
        str,
        typer.Option(help=f"Tokenizer of the teacher: {MODEL_NAMES}.", rich_help_panel=MODEL),
    ],
    vocab_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Vocabulary size of the teacher: the number of logits per token.",
            rich_help_panel=MODEL,
        ),
    ],
    teacher: Annotated[
        str,
        typer.Option(help="Name of the teacher to record in the cache.", rich_help_panel=MODEL),
    ] = "imported",
    trust_remote_code: TrustRemoteCode = False,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens per window.",
            show_default="the length of the rows, if it is the same for all",
            rich_help_panel=DATA,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Entries per token.",
            show_default="as in the first row",
            rich_help_panel=TARGETS,
        ),
    ] = None,
    exact_weights: Annotated[
        bool,
        typer.Option(
            "--exact-weights",
            help="Store probabilities as float32 instead of rounding them.",
            rich_help_panel=TARGETS,
        ),
    ] = False,
    compression_config: Annotated[
        Path | None,
        typer.Option(
            help="File with the settings of DistillKit's compression, for compressed rows.",
            show_default="compression_config.yaml next to the data",
            rich_help_panel=TARGETS,
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(help="Folder of the cache; it must be new or empty.", rich_help_panel=OUTPUT),
    ],
    windows_per_shard: WindowsPerShard = 512,
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Create a cache (biased) from Top-K log-probabilities collected by vLLM or another tool."""
    from sparselogits.caching import import_collected
    from sparselogits.teacher.loading import load_tokenizer

    with stage("importing", "windows") as update:
        report = import_collected(
            data,
            load_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
            out,
            vocab_size=vocab_size,
            teacher=teacher,
            window=window,
            k=k,
            windows_per_shard=windows_per_shard,
            exact_weights=exact_weights,
            compression=compression_config,
            allow=tuple(allow or ()),
            progress=update,
        )
    said = f"{counted(report.rows, 'row')} read"
    if report.tokens_dropped:
        verb = "fills" if report.tokens_dropped == 1 else "fill"
        said += f"; the last {counted(report.tokens_dropped, 'token')} {verb} no window"
    messages.print(said)
    print_info(out, as_json)
    if not as_json:
        print_train_command(out, tokenizer=tokenizer)
