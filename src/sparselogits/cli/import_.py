"""`sparselogits import`: Top-K logprobs that were collected elsewhere, as a cache."""

from __future__ import annotations

from typing import Annotated

import typer

from sparselogits.cli.info import print_info
from sparselogits.cli.options import Json
from sparselogits.console import messages, stage


def import_command(
    data: Annotated[str, typer.Argument(help="JSONL or Parquet: a file, folder or pattern.")],
    tokenizer: Annotated[str, typer.Option(help="The teacher's: folder, GGUF file or hub name.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Columns of the teacher's head.")],
    out: Annotated[str, typer.Option(help="A new or empty folder.")],
    teacher: Annotated[str, typer.Option(help="The teacher's name, to be recorded.")] = "imported",
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window [default: the rows' one length].")
    ] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Entries a token [default: the first row's].")
    ] = None,
    windows_per_shard: Annotated[int, typer.Option(min=1, help="Windows a file.")] = 512,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that comes with the tokenizer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a (biased) cache of Top-K logprobs that vLLM or another trainer collected."""
    from sparselogits.build import import_collected
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
            progress=update,
        )
    dropped = f"; the last {report.tokens_dropped} tokens fill no window" * bool(
        report.tokens_dropped
    )
    messages.print(f"{report.rows} rows read{dropped}")
    print_info(out, as_json)
