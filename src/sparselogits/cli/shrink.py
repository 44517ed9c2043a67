"""Define `sparselogits shrink`, which makes a student by removing parts of its teacher."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparselogits.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    Device,
    Json,
    TrustRemoteCode,
    device_named,
    say_json,
    say_next,
    stdout,
)
from sparselogits.console import messages, stage
from sparselogits.errors import InvalidArgumentError, ShrinkError
from sparselogits.files import require_new_folder

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.shrink import Shrunk

STUDENT = "Student"


class LayerScoreOption(StrEnum):
    """Name the ways of ranking blocks."""

    influence = "influence"
    loss = "loss"


def shrink(
    teacher: Annotated[
        str,
        typer.Argument(
            help="Model to make the student from: a folder, a hub name, or `demo`.",
            metavar="TEACHER",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write the student to.", rich_help_panel=OUTPUT)
    ],
    layers: Annotated[
        int | None,
        typer.Option(
            help="Number of transformer blocks to keep; --layer-score ranks them.",
            show_default="all",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    drop_layers: Annotated[
        str | None,
        typer.Option(
            help="Numbers of the blocks to remove, as in 13,14,15, instead of --layers.",
            show_default="none",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            "--intermediate-size",
            help="MLP channels to keep per block.",
            show_default="all",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            help="Attention heads to keep per block. Heads that share keys and values are kept or "
            "removed together.",
            show_default="all",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    hidden: Annotated[
        int | None,
        typer.Option(
            "--hidden-size",
            help="Width of the hidden states to keep.",
            show_default="all",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    layer_score: Annotated[
        LayerScoreOption,
        typer.Option(
            help="How blocks are ranked: influence (one minus the cosine of a block's input and "
            "output; one pass) or loss (loss on the text without the block; one pass per block).",
            rich_help_panel=STUDENT,
        ),
    ] = LayerScoreOption.influence,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Cache whose windows are the calibration text.",
            show_default="none; give this or --data",
            rich_help_panel=DATA,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=(
                "Calibration text, instead of --cache: a file, a folder or a dataset, as for "
                "`sparselogits cache`."
            ),
            show_default="none; give this or --cache",
            rich_help_panel=DATA,
        ),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(
            min=1, help="Calibration windows, spread over the text.", rich_help_panel=DATA
        ),
    ] = 32,
    window: Annotated[
        int,
        typer.Option(
            min=2, help="Tokens per calibration window, with --data.", rich_help_panel=DATA
        ),
    ] = 512,
    dtype: Annotated[
        str,
        typer.Option(
            help="Number format of the student's weights: auto (the teacher's), float32, bfloat16 "
            "or float16.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Make a student from a teacher by removing blocks, MLP channels, heads or hidden channels."""
    from sparselogits.shrink import save, shrink
    from sparselogits.teacher.loading import load_language_model, load_tokenizer

    dropped = _numbers(drop_layers)
    if all(v is None for v in (layers, dropped, channels, heads, hidden)):
        raise ShrinkError(
            "nothing to prune: give --layers, --drop-layers, --intermediate-size, --heads or "
            "--hidden-size"
        )
    by_scores = any(v is not None for v in (layers, channels, heads, hidden))
    if by_scores and (cache is None) == (data is None):
        raise InvalidArgumentError(
            "no calibration text is given, or two are: give either --cache or --data (only "
            "--drop-layers alone needs none)"
        )
    require_new_folder(out)
    where = device_named(device)
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    messages.print(f"loading the model {teacher}")
    model = load_language_model(teacher, dtype=dtype, trust_remote_code=trust_remote_code).to(where)
    tokens = None
    if by_scores:
        tokens = (
            _of_cache(cache, tokenizer, windows)
            if cache is not None
            else _of_text(str(data), tokenizer, model, window, windows)
        )
    with stage("measuring", "passes") as update:
        shrunk = shrink(
            model,
            layers=layers,
            drop_layers=dropped,
            channels=channels,
            heads=heads,
            hidden=hidden,
            windows=tokens,
            layer_score=layer_score.value,
            progress=update,
        )
    save(shrunk, out, tokenizer, teacher=Path(teacher).name)
    _say(shrunk, out, cache, as_json)


def _say(shrunk: Shrunk, out: Path, cache: str | None, as_json: bool) -> None:
    if as_json:
        say_json({"out": str(out), **shrunk.to_json()})
        return
    share = shrunk.parameters_after / shrunk.parameters_before
    stdout().print(
        f"student in {out}: {shrunk.parameters_after / 1e6:.1f} M parameters, {share:.0%} of the "
        f"teacher's {shrunk.parameters_before / 1e6:.1f} M"
    )
    if shrunk.dropped_layers:
        stdout().print(f"removed blocks: {', '.join(map(str, shrunk.dropped_layers))}")
    say_next("train", "--cache", cache or "CACHE", "--student", out, "--out", "my-run")


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise InvalidArgumentError(
            f"--drop-layers takes numbers of blocks separated by commas, as in 13,14; got {text!r}"
        )
    return tuple(int(part) for part in parts)


def _of_cache(name: str, tokenizer: Any, count: int) -> Tensor:
    """Return int64 [N, L] tokens of windows spread over a cache, made with the same tokenizer."""
    import torch

    from sparselogits.corpus import require_tokenizer
    from sparselogits.data import CacheDataset
    from sparselogits.store.ranges import spread

    cache = CacheDataset(name)
    require_tokenizer(
        tokenizer, cache.identity.tokenizer, cache.cache.recorded_tokenizer(), whose="the model's"
    )
    return torch.stack([cache[i]["input_ids"] for i in spread(len(cache), count)])


def _of_text(name: str, tokenizer: Any, model: Any, window: int, count: int) -> Tensor:
    """Return int64 [N, L] tokens of windows spread over a text."""
    import numpy as np
    import torch

    from sparselogits.corpus import open_source, pack, packing_for
    from sparselogits.store.ranges import spread

    source = open_source(name)
    with tempfile.TemporaryDirectory() as folder, stage("packing text", "MB", per_unit=1e-6) as bar:
        corpus = pack(
            source,
            tokenizer,
            packing_for(tokenizer, window_length=window),
            Path(folder) / "corpus",
            vocab_size=model.get_output_embeddings().weight.shape[0],
            progress=bar,
        )
        chosen = [corpus.read(i, i + 1)[0].tokens for i in spread(corpus.windows, count)]
    return torch.from_numpy(np.stack(chosen).astype(np.int64))
