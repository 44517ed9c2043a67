"""`sparselogits cache`: the teacher's pass."""

from __future__ import annotations

import math
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sparselogits.cli.crew import crew_of
from sparselogits.cli.info import print_info
from sparselogits.cli.options import Device, Json
from sparselogits.console import messages, stage
from sparselogits.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sparselogits.build import TextPlace

DEFAULT_BUDGET = 12.0


class SamplerName(StrEnum):
    """Samplers of the command line."""

    systematic = "systematic"
    multinomial = "multinomial"
    uniform = "uniform"
    topk = "topk"
    topp = "topp"
    threshold = "threshold"


class ExecutorName(StrEnum):
    """Who runs the build."""

    local = "local"
    torchrun = "torchrun"
    ray = "ray"


def cache(
    teacher: Annotated[str, typer.Option(help="Model folder, GGUF file or hub name.")],
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, folder, or dataset.")],
    out: Annotated[
        str, typer.Option(help="Directory or URL (s3://...) of the cache; resumed if it exists.")
    ],
    sampler: Annotated[SamplerName, typer.Option(help="How entries are chosen.")] = (
        SamplerName.systematic
    ),
    budget: Annotated[
        float | None, typer.Option(help=f"Mean entries a token [default: {DEFAULT_BUDGET:g}].")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds a token, instead of a budget.")] = None,
    proposal_exponent: Annotated[float, typer.Option(help="Draw from p to this power.")] = 1.0,
    k: Annotated[
        int | None, typer.Option(help="Entries a token for topk, instead of a budget.")
    ] = None,
    p: Annotated[float, typer.Option(help="Mass kept, for topp.")] = 0.95,
    max_entries: Annotated[int, typer.Option(help="Cap on entries a token, for topp.")] = 100,
    tau: Annotated[
        float | None,
        typer.Option(help="Smallest probability kept exactly by threshold, instead of a budget."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    temperature: Annotated[float, typer.Option(help="Divides the teacher's logits.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Windows a forward pass.")] = 8,
    windows: Annotated[str | None, typer.Option(help="Build only windows A:B.")] = None,
    windows_per_shard: Annotated[int, typer.Option(min=1, help="Windows a file.")] = 512,
    append: Annotated[
        bool, typer.Option(help="Add this text to the cache: new windows, nothing rewritten.")
    ] = False,
    holdout: Annotated[float, typer.Option(help="Share of documents kept aside.")] = 0.0,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    completion_only: Annotated[
        bool,
        typer.Option(
            "--completion-only",
            help="Records are prompt and completion, or messages; only answers are learnt.",
        ),
    ] = False,
    separator_id: Annotated[
        int | None, typer.Option(help="Token between documents; end-of-text by default.")
    ] = None,
    reset_attention: Annotated[
        bool, typer.Option(help="Keep documents of one window from seeing each other.")
    ] = False,
    executor: Annotated[ExecutorName, typer.Option(help="Who runs the build.")] = (
        ExecutorName.local
    ),
    work: Annotated[
        Path | None,
        typer.Option(help="For a URL: where text is packed [default: the user's cache folder]."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that tokenise.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(help="Torch threads a worker; the same number gives the same bytes."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="For ray: workers at most [default: as the cluster has room]."),
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="For ray: GPUs a worker, fractions included.")
    ] = None,
    device: Device = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="auto: spread the teacher over devices, memory and disk.")
    ] = None,
    tp_plan: Annotated[
        str | None,
        typer.Option(help="auto: split each layer of the teacher over the ranks of torchrun."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that comes with the model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the teacher once over a text and cache a few unbiased targets a token."""
    from sparselogits.build import CacheRequest, fetch_texts, place_of_text, publish_text
    from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
    from sparselogits.samplers import from_parameters
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_tokenizer

    chosen, budget = _sampler_options(
        sampler.value, budget, rounds, proposal_exponent, k, p, max_entries, tau
    )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InvalidArgumentError(f"--temperature divides logits: above 0, found {temperature}")
    if budget is None:
        from_parameters(chosen)  # out of range is said before the teacher is loaded
    only = _window_range(windows)
    crew = crew_of(executor.value, threads, workers, gpus, device, split=tp_plan is not None)
    source = open_source(data, text_field=text_field, split=split, completion_only=completion_only)
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    load = partial(
        load_teacher,
        teacher,
        tokenizer=tokenizer,
        dtype=dtype,
        device_map=device_map,
        tp_plan=tp_plan,
        trust_remote_code=trust_remote_code,
    )
    if crew.follows:
        crew.follow(load())
        return
    packing = packing_for(
        tokenizer,
        window_length=window,
        separator_id=separator_id,
        holdout=holdout,
        reset_attention=reset_attention,
    )

    def find_place() -> TextPlace:
        return place_of_text(fetch_texts(out, work), source, packing, append=append)

    place = find_place() if crew.is_first else crew.wait_for_text(out, find_place)
    messages.print(f"loading the teacher {escape(teacher)}")
    with crew.leading(load(device=crew.device)) as engine:
        with stage("packing text", "MB", per_unit=1e-6) as update:
            corpus = pack(
                source,
                tokenizer,
                packing,
                place.folder,
                vocab_size=engine.vocab_size,
                progress=update,
                processes=processes,
            )
        publish_text(out, corpus.folder)
        with stage("caching", "tokens", per_unit=window) as update:
            report = crew.build(
                load,
                engine,
                corpus,
                [CacheRequest(out, from_parameters(chosen), budget, seed, temperature)],
                tokenizer_hash=tokenizer_fingerprint(tokenizer),
                batch=batch,
                windows_per_shard=windows_per_shard,
                only=only,
                first_window=place.first_window,
                progress=update,
            )
    if report.windows_found:
        messages.print(f"{report.windows_found} windows were there already")
    if crew.is_first:
        print_info(out, as_json)


def _sampler_options(
    name: str,
    budget: float | None,
    rounds: int | None,
    exponent: float,
    k: int | None,
    p: float,
    max_entries: int,
    tau: float | None,
) -> tuple[dict[str, Any], float | None]:
    """The sampler's parameters, and the budget that is yet to set one of them."""
    if name == "topp":
        if budget is not None:
            raise InvalidArgumentError("--sampler topp takes --p and --max-entries, not --budget")
        return {"name": name, "p": p, "max_entries": max_entries}, None
    option = {"topk": "k", "threshold": "tau"}.get(name, "rounds")
    given = {"k": k, "tau": tau, "rounds": rounds}
    for other, value in given.items():
        if other != option and value is not None:
            raise InvalidArgumentError(
                f"--sampler {name} takes --{option} or --budget, not --{other}"
            )
    if budget is not None and given[option] is not None:
        raise InvalidArgumentError(f"give --budget or --{option}, not both")
    if budget is None and given[option] is None:
        budget = DEFAULT_BUDGET
    if budget is not None and budget < 1:
        raise InvalidArgumentError(
            f"--budget is a mean number of entries, at least 1; got {budget}"
        )
    chosen: dict[str, Any] = {"name": name}
    if given[option] is not None:
        chosen[option] = given[option]
    if name in ("systematic", "multinomial"):
        chosen["proposal_exponent"] = exponent
    return chosen, budget


def _window_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, stop = text.partition(":")
    if not (colon and first.isdigit() and stop.isdigit()):
        raise InvalidArgumentError(f"--windows takes A:B, as in 0:512; got {text!r}")
    return int(first), int(stop)
