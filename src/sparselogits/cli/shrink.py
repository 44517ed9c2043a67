"""Define `sparselogits shrink`, which creates a student by removing parts of its teacher."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sparselogits.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    Allow,
    Device,
    Group,
    Json,
    TokenizedBy,
    TrustRemoteCode,
    given_options,
    optional_tokenizer,
    print_json,
    print_next,
)
from sparselogits.console import messages, results, stage
from sparselogits.devices import resolve_device
from sparselogits.errors import InvalidArgumentError, ShrinkError
from sparselogits.files import require_new_folder
from sparselogits.methods import listed
from sparselogits.wording import counted, parameters

if TYPE_CHECKING:
    from torch import Tensor

    from sparselogits.shrink import Shrunk

STUDENT = Group("Student")
"""Group of the options that describe the student."""


LayerScoreOption = StrEnum("LayerScoreOption", ["influence", "loss", "spaced"])
"""Names of the rules that select the blocks of the student."""


def shrink(
    context: typer.Context,
    teacher: str = typer.Argument(
        help="Model to create the student from: a folder, a hub name, or `demo`.", metavar="TEACHER"
    ),
    out: Path = OUTPUT("Folder to write the student to.", ...),
    layers: int | None = STUDENT(
        "Number of transformer blocks to keep, selected by --layer-score.", shown="all"
    ),
    drop_layers: str | None = STUDENT(
        "Indices of the blocks to remove, for example 13,14,15, instead of --layers.", shown="none"
    ),
    channels: int | None = STUDENT(
        "Number of MLP channels to keep per block.", None, "--intermediate-size", shown="all"
    ),
    heads: int | None = STUDENT(
        "Number of attention heads to keep per block. Heads that share keys and values are kept or "
        "removed together.",
        shown="all",
    ),
    hidden: int | None = STUDENT(
        "Width of the hidden states to keep.", None, "--hidden-size", shown="all"
    ),
    layer_score: LayerScoreOption = STUDENT(
        "How to select blocks: influence (one minus the cosine of a block's input and output; one "
        "forward pass), loss (loss on the text without the block; one forward pass per block) or "
        "spaced (at equal distances from the first to the last block, as in DistilBERT; needs no "
        "text).",
        LayerScoreOption.influence,
    ),
    cache: str | None = DATA(
        "Cache whose windows are the calibration text.", shown="none; give this or --data"
    ),
    data: str | None = DATA(
        "Calibration text, instead of --cache: a file, a folder or a dataset, as for `sparselogits "
        "cache`.",
        shown="none; give this or --cache",
    ),
    tokenized_by: TokenizedBy = None,
    windows: int = DATA("Number of calibration windows, spread evenly over the text.", 32, min=1),
    window: int = DATA("Tokens per calibration window, with --data.", 512, min=2),
    dtype: str = MODEL(
        "Data type of the student's weights: auto (the teacher's), float32, bfloat16 or float16.",
        "auto",
    ),
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    allow: Allow = None,
) -> None:
    """Create a student from a teacher by removing blocks, MLP channels, heads or hidden width."""
    from sparselogits.shrink import save, shrink
    from sparselogits.teacher.loading import load_language_model, load_tokenizer

    dropped = _block_numbers(drop_layers)
    sizes = (channels, heads, hidden)
    if all(v is None for v in (layers, dropped, *sizes)):
        raise ShrinkError(
            "nothing to prune: give --layers, --drop-layers, --intermediate-size, --heads or "
            "--hidden-size"
        )
    ranked = layers if layer_score is not LayerScoreOption.spaced else None
    needs_text = any(v is not None for v in (ranked, *sizes))
    if needs_text and (cache is None) == (data is None):
        raise InvalidArgumentError(
            "expected one calibration text, found "
            + ("none" if cache is None else "--cache and --data")
            + ": give either --cache or --data (--drop-layers and --layer-score spaced need "
            "neither)"
        )
    if layers is None and given_options(context, "layer_score"):
        raise InvalidArgumentError(
            "--layer-score selects the blocks that --layers keeps; give --layers, or leave it out"
        )
    calibration = ("cache", "data", "tokenized_by", "windows", "window")
    unused = given_options(context, *calibration)
    if unused and not needs_text:
        raise InvalidArgumentError(
            f"{listed(list(unused))} cannot be used with --drop-layers or --layer-score spaced "
            "alone, which need no calibration text; leave it out"
        )
    unused = given_options(context, "tokenized_by", "window")
    if unused and data is None:
        raise InvalidArgumentError(
            f"{listed(list(unused))} can only be used with --data: a cache has windows "
            "already, of ids of the teacher's tokenizer. Name a text with --data, or leave it out"
        )
    require_new_folder(out)
    device = resolve_device(device)
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    messages.print(f"loading the model {teacher}")
    model = load_language_model(teacher, dtype=dtype, trust_remote_code=trust_remote_code)
    model = model.to(device)
    tokens = None
    if cache is not None and needs_text:
        tokens = _tokens_of_cache(cache, tokenizer, windows)
    elif needs_text:
        tokens = _tokens_of_text(str(data), tokenized_by, tokenizer, model, window, windows)
    with stage("measuring", "passes") as update:
        shrunk = shrink(
            model,
            layers=layers,
            drop_layers=dropped,
            channels=channels,
            heads=heads,
            hidden=hidden,
            windows=tokens,
            layer_score=layer_score.value,  # type: ignore[arg-type]
            progress=update,
        )
    save(shrunk, out, tokenizer, teacher=Path(teacher).name)
    _print_student(shrunk, out, cache, as_json)


def _print_student(shrunk: Shrunk, out: Path, cache: str | None, as_json: bool) -> None:
    """Print the size of the student and the removed blocks, as text or as JSON."""
    if as_json:
        print_json({"out": str(out), **shrunk.to_json()})
        return
    share = shrunk.parameters_after / shrunk.parameters_before
    results().print(
        f"student in {out}: {parameters(shrunk.parameters_after)}, {share:.0%} of the teacher's "
        f"{parameters(shrunk.parameters_before)}"
    )
    if shrunk.dropped_layers:
        indices = ", ".join(map(str, shrunk.dropped_layers))
        removed = counted(len(shrunk.dropped_layers), "block")
        results().print(f"removed {removed}, counted from 0: {indices}")
    print_next("train", "--cache", cache or "CACHE", "--student", out, "--out", "my-run")


def _block_numbers(text: str | None) -> tuple[int, ...] | None:
    """Parse the value of `--drop-layers`."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InvalidArgumentError(
            f"--drop-layers is {text!r}; give block indices separated by commas, such as 13,14"
        )
    return tuple(int(part) for part in parts)


def _tokens_of_cache(name: str, tokenizer: Any, count: int) -> Tensor:
    """Return the tokens of at most `count` windows spread over a cache, int64 [N, L].

    If windows are padded, their text is joined without the padding, so N or L may be smaller.
    """
    from sparselogits.corpus import require_tokenizer
    from sparselogits.data import CacheDataset
    from sparselogits.evaluate.passes import joined_texts
    from sparselogits.store.ranges import spread

    cache = CacheDataset(name)
    require_tokenizer(
        tokenizer,
        cache.identity.tokenizer,
        cache.cache.recorded_tokenizer(),
        whose="the tokenizer of the model",
    )
    return joined_texts([cache[i] for i in spread(len(cache), count)])


def _tokens_of_text(
    name: str, tokenized_by: str | None, tokenizer: Any, model: Any, window: int, count: int
) -> Tensor:
    """Return the tokens of at most `count` windows spread over a text, int64 [N, L].

    Rows of token ids are joined, as documents are, so that no padding is measured.
    """
    import numpy as np
    import torch

    from sparselogits.corpus import open_source, pack, packing_for
    from sparselogits.store.ranges import spread

    rows = tokenized_by is not None
    source = open_source(name, tokenized_by=optional_tokenizer(tokenized_by), join_rows=rows)
    with tempfile.TemporaryDirectory() as folder, stage("packing text", "MB", per_unit=1e-6) as bar:
        corpus = pack(
            source,
            tokenizer,
            packing_for(tokenizer, window_length=window, reset_attention=rows),
            Path(folder) / "corpus",
            vocab_size=model.get_output_embeddings().weight.shape[0],
            progress=bar,
        )
        chosen = [corpus.read(i, i + 1)[0].tokens for i in spread(corpus.windows, count)]
    return torch.from_numpy(np.stack(chosen).astype(np.int64))
