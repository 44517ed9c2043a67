"""Define `sparselogits import`, which creates a cache from collected log-probabilities."""

from __future__ import annotations

from pathlib import Path

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
    print_train_command_of,
)
from sparselogits.console import messages, stage
from sparselogits.wording import counted


def import_command(
    data: str = typer.Argument(
        help="JSON lines or Parquet with tokens and their Top-K log-probabilities: a file, a "
        "folder or a glob pattern."
    ),
    tokenizer: str = MODEL(f"Tokenizer of the teacher: {MODEL_NAMES}.", ...),
    vocab_size: int = MODEL(
        "Vocabulary size of the teacher: the number of logits per token.", ..., min=1
    ),
    teacher: str = MODEL("Name of the teacher to record in the cache.", "imported"),
    trust_remote_code: TrustRemoteCode = False,
    window: int | None = DATA(
        "Tokens per window.", shown="the length of the rows, if it is the same for all", min=2
    ),
    k: int | None = TARGETS("Entries per token.", shown="as in the first row", min=1),
    exact_weights: bool = TARGETS(
        "Store probabilities as float32 instead of rounding them.", False, "--exact-weights"
    ),
    compression_config: Path | None = TARGETS(
        "YAML file with the settings of DistillKit's compression, for compressed rows.",
        shown="compression_config.yaml next to the data",
    ),
    out: str = OUTPUT("Folder of the cache; it must be new or empty.", ...),
    windows_per_shard: WindowsPerShard = 512,
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Create a cache of biased targets from Top-K log-probabilities that another tool collected."""
    from sparselogits.caching import import_collected
    from sparselogits.teacher.loading import keep_tokenizer, load_tokenizer

    loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    with stage("importing", "windows") as update:
        report = import_collected(
            data,
            loaded,
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
    keep_tokenizer(loaded, out)
    said = f"{counted(report.rows, 'row')} read"
    if report.tokens_dropped:
        verb = "fills" if report.tokens_dropped == 1 else "fill"
        said += f"; the last {counted(report.tokens_dropped, 'token')} {verb} no window"
    messages.print(said)
    opened = print_info(out, as_json)
    if not as_json:
        print_train_command_of(opened, out, tokenizer)
