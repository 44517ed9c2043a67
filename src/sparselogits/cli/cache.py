"""`sparselogits cache`: the teacher's pass."""

from __future__ import annotations

import math
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparselogits.cli.crew import crew_of
from sparselogits.cli.info import print_info
from sparselogits.cli.options import (
    DATA,
    DISTRIBUTED,
    MODEL,
    OUTPUT,
    PERFORMANCE,
    TARGETS,
    Allow,
    Device,
    Dtype,
    Json,
    SeparatorId,
    Teacher,
    TrustRemoteCode,
    WindowsPerShard,
    say_next,
    say_train,
)
from sparselogits.console import messages, stage
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.wording import counted

if TYPE_CHECKING:
    from sparselogits.caching import TextPlace
    from sparselogits.corpus import PackedCorpus

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
    *,
    teacher: Teacher,
    dtype: Dtype = "auto",
    device: Device = "auto",
    temperature: Annotated[
        float,
        typer.Option(
            help="Number that the teacher's logits are divided by before sampling.",
            rich_help_panel=MODEL,
        ),
    ] = 1.0,
    trust_remote_code: TrustRemoteCode = False,
    data: Annotated[
        str,
        typer.Option(
            help="Text to distil on: a text, JSON lines or Parquet file, a folder of such files, "
            "or the name of a dataset on the Hugging Face hub.",
            rich_help_panel=DATA,
        ),
    ],
    window: Annotated[
        int,
        typer.Option(
            help="Tokens per window. The text is packed into windows of this length.",
            rich_help_panel=DATA,
        ),
    ] = 1024,
    holdout: Annotated[
        float,
        typer.Option(
            help="Share of the text that is kept aside for `sparselogits eval`, as in 0.05.",
            rich_help_panel=DATA,
        ),
    ] = 0.0,
    text_field: Annotated[
        str,
        typer.Option(
            help="Field (JSON lines) or column (Parquet, dataset) that holds the text.",
            rich_help_panel=DATA,
        ),
    ] = "text",
    split: Annotated[
        str, typer.Option(help="Split of a dataset to read.", rich_help_panel=DATA)
    ] = "train",
    completion_only: Annotated[
        bool,
        typer.Option(
            "--completion-only",
            help="Cache targets for answers only. Records hold either `messages` or `prompt` and "
            "`completion`.",
            rich_help_panel=DATA,
        ),
    ] = False,
    separator_id: SeparatorId = None,
    reset_attention: Annotated[
        bool,
        typer.Option(
            "--reset-attention",
            help="Prevent documents that share a window from attending to each other.",
            rich_help_panel=DATA,
        ),
    ] = False,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add this text to an existing cache as new windows; nothing is rewritten.",
            rich_help_panel=DATA,
        ),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Mean number of entries to store per token.",
            show_default=f"{DEFAULT_BUDGET:g}",
            rich_help_panel=TARGETS,
        ),
    ] = None,
    sampler: Annotated[
        SamplerName,
        typer.Option(
            help="Method that chooses the entries. All but topk and topp are unbiased.",
            rich_help_panel=TARGETS,
        ),
    ] = SamplerName.systematic,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed for sampling.", rich_help_panel=TARGETS)
    ] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Sampling rounds per token, in place of --budget.",
            show_default="from --budget",
            rich_help_panel=TARGETS,
        ),
    ] = None,
    proposal_exponent: Annotated[
        float,
        typer.Option(
            help="Power of the teacher's probabilities to draw from, for systematic and "
            "multinomial.",
            rich_help_panel=TARGETS,
        ),
    ] = 1.0,
    k: Annotated[
        int | None,
        typer.Option(
            help="Entries per token for topk, in place of --budget.",
            show_default="from --budget",
            rich_help_panel=TARGETS,
        ),
    ] = None,
    p: Annotated[
        float,
        typer.Option(help="Probability mass to keep per token, for topp.", rich_help_panel=TARGETS),
    ] = 0.95,
    max_entries: Annotated[
        int,
        typer.Option(
            help="Largest number of entries per token, for topp.", rich_help_panel=TARGETS
        ),
    ] = 100,
    tau: Annotated[
        float | None,
        typer.Option(
            help="Smallest probability that threshold keeps exactly, in place of --budget.",
            show_default="from --budget",
            rich_help_panel=TARGETS,
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            help="Folder or URL (s3://bucket/prefix) of the cache. A cache that is already there "
            "is resumed.",
            rich_help_panel=OUTPUT,
        ),
    ],
    windows_per_shard: WindowsPerShard = 512,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Local folder where the text is packed when --out is a URL.",
            show_default="the user's cache folder",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: Json = False,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Windows per forward pass of the teacher. Lower it if memory runs out.",
            rich_help_panel=PERFORMANCE,
        ),
    ] = 8,
    processes: Annotated[
        int,
        typer.Option(min=1, help="Processes that tokenise the text.", rich_help_panel=PERFORMANCE),
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            help="PyTorch threads per worker. The same number gives the same bytes.",
            show_default="PyTorch's own choice; under torchrun, the cores divided by the ranks",
            rich_help_panel=PERFORMANCE,
        ),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="auto: spread the teacher's layers over all devices, memory and disk.",
            show_default="the whole teacher on --device",
            rich_help_panel=PERFORMANCE,
        ),
    ] = None,
    executor: Annotated[
        ExecutorName,
        typer.Option(
            help="What runs the build: this process, the ranks of torchrun, or a Ray cluster.",
            rich_help_panel=DISTRIBUTED,
        ),
    ] = ExecutorName.local,
    windows: Annotated[
        str | None,
        typer.Option(
            help="Build only windows A to B - 1, written A:B as in 0:512.",
            show_default="all windows",
            rich_help_panel=DISTRIBUTED,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Largest number of Ray workers.",
            show_default="as many as the cluster has room for",
            rich_help_panel=DISTRIBUTED,
        ),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            help="GPUs per Ray worker; may be a fraction.",
            show_default="1 with a CUDA device, else 0",
            rich_help_panel=DISTRIBUTED,
        ),
    ] = None,
    tp_plan: Annotated[
        str | None,
        typer.Option(
            help="auto: split each layer of the teacher over the ranks of torchrun "
            "(tensor parallelism).",
            show_default="not split",
            rich_help_panel=DISTRIBUTED,
        ),
    ] = None,
    allow: Allow = None,
) -> None:
    """Run the teacher once over a text and cache a few unbiased targets per token."""
    from sparselogits.caching import (
        CacheRequest,
        check_request,
        fetch_texts,
        place_of_text,
        publish_text,
        shard_ranges,
    )
    from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
    from sparselogits.corpus.packed import recorded_vocabulary
    from sparselogits.samplers import from_parameters
    from sparselogits.store.storage.location import is_url
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import keep_tokenizer, load_tokenizer, locate_model
    from sparselogits.teacher.vocabulary import vocabulary_size

    chosen, budget = _sampler_options(
        sampler.value, budget, rounds, proposal_exponent, k, p, max_entries, tau
    )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InvalidArgumentError(f"--temperature divides logits: above 0, found {temperature}")
    if not 0 <= holdout < 1:
        raise InvalidArgumentError(
            f"--holdout is the share of the text to hold out, from 0 to below 1; found {holdout:g}"
        )
    drawn = from_parameters(chosen)
    only = _window_range(windows)
    crew = crew_of(executor.value, threads, workers, gpus, device, split=tp_plan is not None)
    source = open_source(data, text_field=text_field, split=split, completion_only=completion_only)
    if crew.is_first:
        messages.print(source.in_words())
    locate_model(teacher)  # files that are refused are refused before the text is packed
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    load = partial(
        load_teacher,
        teacher,
        tokenizer=tokenizer,
        dtype=dtype,
        device_map=device_map,
        tp_plan=tp_plan,
        trust_remote_code=trust_remote_code,
        allow=tuple(allow or ()),  # for workers, which are other processes
    )
    packing = packing_for(
        tokenizer,
        window_length=window,
        separator_id=separator_id,
        holdout=holdout,
        reset_attention=reset_attention,
    )
    request = CacheRequest(out, drawn, budget, seed, temperature)
    tokenizer_hash = tokenizer_fingerprint(tokenizer)

    def find_place() -> TextPlace:
        return place_of_text(fetch_texts(out, work), source, packing, append=append)

    def pack_text(place: TextPlace, vocab_size: int) -> PackedCorpus:
        with stage("packing text", "MB", per_unit=1e-6) as update:
            packed = pack(
                source,
                tokenizer,
                packing,
                place.folder,
                vocab_size=vocab_size,
                progress=update,
                processes=processes,
            )
        if crew.is_first:
            messages.print(packed.in_words())
        if crew.is_first and not is_url(out):
            keep_tokenizer(tokenizer, out)  # the folder is this text's and tokenizer's by now
        shard_ranges(packed.windows, windows_per_shard, only, first_window=place.first_window)
        return packed

    # what needs no weights comes first: a teacher takes minutes to load
    if crew.follows:
        crew.wait_for_packing(find_place)
        crew.follow(load())
        return
    check_request(request, packing, tokenizer_hash, windows_per_shard)
    place = find_place() if crew.is_first else crew.wait_for_text(out, find_place)
    vocab_size = recorded_vocabulary(place.folder) or vocabulary_size(
        teacher, trust_remote_code=trust_remote_code
    )
    corpus = None
    if vocab_size is not None:
        corpus = pack_text(place, vocab_size)
        publish_text(out, corpus.folder)
    messages.print(f"loading the teacher {teacher}")
    with crew.leading(load(device=crew.device)) as engine:
        if corpus is None:
            corpus = pack_text(place, engine.vocab_size)
            publish_text(out, corpus.folder)
        if engine.vocab_size != corpus.vocab_size:
            raise IdentityMismatchError(
                f"the text in {place.folder} was packed for {corpus.vocab_size} token ids, but the "
                f"teacher has {engine.vocab_size}: it is not the teacher that the cache was begun "
                "with, or its configuration names another size. Delete that folder to pack the "
                "text again, or choose another --out"
            )
        with stage("caching", "tokens", per_unit=window) as update:
            report = crew.build(
                load,
                engine,
                corpus,
                [request],
                tokenizer_hash=tokenizer_hash,
                batch=batch,
                windows_per_shard=windows_per_shard,
                only=only,
                first_window=place.first_window,
                progress=update,
            )
    if report.windows_found:
        there = "was" if report.windows_found == 1 else "were"
        messages.print(f"{counted(report.windows_found, 'window')} {there} in the cache already")
    if crew.is_first:
        text = source.selection() | {"summary": corpus.summary.to_json()}
        print_info(out, as_json, text=text)
        if not as_json and only is None:
            say_train(out, tokenizer=teacher)
        elif not as_json:
            say_next(
                otherwise="build the other windows, then check that all are there: "
                + f"sparselogits verify {out}"
            )


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
