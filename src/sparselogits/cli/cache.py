"""Define `sparselogits cache`, which runs the teacher once over a text and caches its targets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

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
    JoinRows,
    Json,
    MaskRate,
    MaskSpan,
    MaskUnits,
    SeparatorId,
    Teacher,
    TokenizedBy,
    TrustRemoteCode,
    WindowsPerShard,
    given_words,
    masked_objective,
    optional_tokenizer,
    print_next,
    print_train_command_of,
)
from sparselogits.cli.role import build_role
from sparselogits.console import messages, stage
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.methods import listed
from sparselogits.wording import counted

if TYPE_CHECKING:
    from sparselogits.caching import TextPlace
    from sparselogits.corpus import PackedCorpus
    from sparselogits.samplers import Sampler

DEFAULT_BUDGET = 12.0
"""Mean number of entries per token if neither a budget nor the sampler's size is given."""

DEFAULT_SAMPLER = "systematic"
"""Name of the sampler if --sampler is not given."""

SAMPLER = "sparselogits.cli.cache"
"""Key of the values of sampler options in the `meta` of the click context."""


ObjectiveName = StrEnum("ObjectiveName", ["causal", "masked"])
"""Names of the objectives: predict the next token, or predict masked tokens."""

PackingName = StrEnum("PackingName", ["joined", "documents"])
"""Names of the kinds of packing, see `corpus.Packing`."""

EngineName = StrEnum("EngineName", ["transformers", "vllm"])
"""Names of the libraries that can run the teacher."""

ExecutorName = StrEnum("ExecutorName", ["local", "torchrun", "ray"])
"""Names of the executors that can run a build."""


def cache(
    context: typer.Context,
    teacher: Teacher,
    dtype: Dtype = "auto",
    device: Device = "auto",
    temperature: float = MODEL(
        "Temperature that divides the teacher's logits before sampling.", 1.0
    ),
    trust_remote_code: TrustRemoteCode = False,
    data: str = DATA(
        "Text to distil on: a text, JSON lines or Parquet file, a folder of such files, or the "
        "name of a dataset on the Hugging Face hub.",
        ...,
    ),
    window: int = DATA("Tokens per window. The text is packed into windows of this length.", 1024),
    holdout: float = DATA(
        "Fraction of the text to hold out for `sparselogits eval`, for example 0.05.", 0.0
    ),
    text_field: str = DATA(
        "Field (JSON lines) or column (Parquet, dataset) that contains the text.", "text"
    ),
    split: str = DATA("Split of a dataset to read.", "train"),
    completion_only: bool = DATA(
        "Cache targets for answers only. A record has either `messages`, or `prompt` and "
        "`completion`.",
        False,
        "--completion-only",
    ),
    tokenized_by: TokenizedBy = None,
    join_rows: JoinRows = False,
    separator_id: SeparatorId = None,
    packing: PackingName = DATA(
        "joined: join all documents and cut them into full windows. documents: one document per "
        "window, between the tokenizer's special tokens and padded (BERT); a longer document takes "
        "several windows.",
        PackingName.joined,
    ),
    reset_attention: bool = DATA(
        "Prevent documents that share a window from attending to each other.",
        False,
        "--reset-attention",
    ),
    append: bool = DATA(
        "Add this text to an existing cache as new windows; nothing is rewritten.",
        False,
        "--append",
    ),
    budget: float | None = TARGETS(
        "Mean number of entries to store per token.", shown=f"{DEFAULT_BUDGET:g}"
    ),
    seed: int = TARGETS("Random seed for sampling.", 0, min=0),
    objective: ObjectiveName | None = TARGETS(
        "causal: the teacher predicts the next token. masked: it predicts masked tokens (BERT).",
        shown="by the class of the teacher",
    ),
    mask_rate: MaskRate = None,
    mask_units: MaskUnits = None,
    mask_span: MaskSpan = None,
    exact_weights: bool | None = TARGETS(
        "Store real-valued weights (of topk, topp, threshold or a proposal exponent) as float32, "
        "or rounded by at most 2.2 % in a third of the bytes. Counts of rounds stay exact.",
        None,
        "--exact-weights/--rounded-weights",
        shown="rounded; for an existing cache, its setting",
    ),
    out: str = OUTPUT(
        "Folder or URL (s3://bucket/prefix) of the cache. An existing cache is resumed.", ...
    ),
    windows_per_shard: WindowsPerShard = 512,
    work: Path | None = OUTPUT(
        "Local folder where the text is packed when --out is a URL.",
        shown="the user's cache folder",
    ),
    as_json: Json = False,
    batch: int = PERFORMANCE(
        "Windows per forward pass of the teacher. Reduce it if memory runs out.", 8, min=1
    ),
    processes: int = PERFORMANCE("Number of processes that tokenise the text.", 1, min=1),
    threads: int | None = PERFORMANCE(
        "PyTorch threads per worker. Builds with the same number write the same bytes.",
        shown="PyTorch's default; under torchrun, the cores divided by the ranks",
        min=1,
    ),
    device_map: str | None = PERFORMANCE(
        "auto: distribute the teacher's layers over all devices, host memory and disk.",
        shown="the whole teacher on --device",
    ),
    engine_name: EngineName = PERFORMANCE(
        "Library that runs the teacher's layers. vllm is installed separately, and runs causal "
        "models from a folder or a hub.",
        EngineName.transformers,
        "--engine",
    ),
    executor: ExecutorName = DISTRIBUTED(
        "Processes that run the build: this one, the ranks of torchrun, or a Ray cluster.",
        ExecutorName.local,
    ),
    windows: str | None = DISTRIBUTED(
        "Build only windows A to B - 1, given as A:B, for example 0:512.", shown="all windows"
    ),
    workers: int | None = DISTRIBUTED(
        "Maximum number of Ray workers.", shown="as many as fit on the cluster", min=1
    ),
    gpus: float | None = DISTRIBUTED(
        "GPUs per Ray worker; may be a fraction.", shown="1 with a CUDA device, else 0", min=0
    ),
    tp_plan: str | None = DISTRIBUTED(
        "auto: split each layer of the teacher across the ranks of torchrun (tensor parallelism).",
        shown="not split",
    ),
    allow: Allow = None,
) -> None:
    """Run the teacher once over a text and cache a sparse target per token, unbiased by default."""
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
    from sparselogits.corruption import Corruption, TokenKinds
    from sparselogits.store.storage.location import is_url
    from sparselogits.teacher import load_teacher, load_vllm_teacher
    from sparselogits.teacher.loading import (
        keep_tokenizer,
        load_tokenizer,
        locate_model,
        names_masked_model,
    )
    from sparselogits.teacher.vllm_engine import require_first_gpu, require_vllm
    from sparselogits.teacher.vocabulary import vocabulary_size

    drawn, budget = _sampler(context.meta[SAMPLER], budget)
    request = CacheRequest(out, drawn, budget, seed, temperature, exact_weights)
    if not 0 <= holdout < 1:
        raise InvalidArgumentError(
            f"--holdout is {holdout:g}; give the fraction of text to hold out, from 0 to below 1"
        )
    only = _window_range(windows)
    role = build_role(executor.value, threads, workers, gpus, device, split=tp_plan is not None)
    source = open_source(
        data,
        text_field=text_field,
        split=split,
        completion_only=completion_only,
        tokenized_by=optional_tokenizer(tokenized_by, trust_remote_code=trust_remote_code),
        join_rows=join_rows,
    )
    if role.is_first:
        messages.print(source.in_words())
    _, located = locate_model(teacher)  # rejects unusable model files before the text is packed
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    masks = names_masked_model(teacher, trust_remote_code=trust_remote_code)
    how: dict[str, Any] = {"device_map": device_map, "tp_plan": tp_plan}
    if engine_name == EngineName.vllm:
        require_vllm(
            {
                "--device-map": device_map is not None,
                "--tp-plan": tp_plan is not None,
                "a GGUF file": "gguf_file" in located,
                "a masked teacher": masks,
            }
        )
        require_first_gpu(role.device)
        how = {"window_length": window}
    load = partial(
        load_teacher if engine_name == EngineName.transformers else load_vllm_teacher,
        teacher,
        tokenizer=tokenizer,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        allow=tuple(allow or ()),  # allowances apply per process, and workers are processes
        **how,
    )
    rules = packing_for(
        tokenizer,
        window_length=window,
        separator_id=separator_id,
        holdout=holdout,
        reset_attention=reset_attention,
        kind="joined" if packing is PackingName.joined else "documents",
    )
    _require_objective(objective, masks)
    hides = masked_objective(
        tokenizer, masked=masks, rate=mask_rate, units=mask_units, span=mask_span, seed=seed
    )
    tokenizer_hash = tokenizer_fingerprint(tokenizer)

    def find_place() -> TextPlace:
        return place_of_text(fetch_texts(out, work), source, rules, append=append)

    def pack_text(place: TextPlace, vocab_size: int) -> PackedCorpus:
        with stage("packing text", "MB", per_unit=1e-6) as update:
            packed = pack(
                source,
                tokenizer,
                rules,
                place.folder,
                vocab_size=vocab_size,
                progress=update,
                processes=processes,
            )
        if role.is_first:
            messages.print(packed.in_words())
        if role.is_first and not is_url(out):
            keep_tokenizer(tokenizer, out)  # after packing, which rejects another tokenizer
        shard_ranges(packed.windows, windows_per_shard, only, first_window=place.first_window)
        return packed

    # steps that need no weights come first, because a teacher takes minutes to load
    if role.follows:
        role.wait_for_text(find_place)
        role.follow(load())
        return
    check_request(request, rules, tokenizer_hash, windows_per_shard, hides)
    place = find_place() if role.is_first else role.wait_for_text(find_place, out)
    vocab_size = recorded_vocabulary(place.folder) or vocabulary_size(
        teacher, trust_remote_code=trust_remote_code
    )
    corpus = None
    if vocab_size is not None:
        corpus = pack_text(place, vocab_size)
        publish_text(out, corpus.folder)
    messages.print(f"loading the teacher {teacher}")
    with role.leading(load(device=role.device)) as engine:
        if corpus is None:
            corpus = pack_text(place, engine.vocab_size)
            publish_text(out, corpus.folder)
        if engine.vocab_size != corpus.vocab_size:
            raise IdentityMismatchError(
                f"the text in {place.folder} was packed for {corpus.vocab_size} token ids, but the "
                f"teacher has {engine.vocab_size}. Name the teacher that the cache was begun with, "
                "delete that folder to pack the text again, or choose another --out"
            )
        corruption = None
        if hides is not None:
            corruption = Corruption(hides, TokenKinds.of(tokenizer, engine.vocab_size))
        with stage("caching", "tokens", per_unit=window) as update:
            report = role.build(
                load,
                engine,
                corpus,
                [request],
                tokenizer_hash=tokenizer_hash,
                batch=batch,
                windows_per_shard=windows_per_shard,
                only=only,
                first_window=place.first_window,
                corruption=corruption,
                progress=update,
            )
    if report.windows_found:
        there = "was" if report.windows_found == 1 else "were"
        messages.print(f"{counted(report.windows_found, 'window')} {there} in the cache already")
    if role.is_first:
        text = source.selection() | {"summary": asdict(corpus.summary)}
        opened = print_info(out, as_json, text=text)
        if not as_json and only is None:
            allowed = given_words(context, "allow")
            print_train_command_of(opened, out, teacher, allowed)
        elif not as_json:
            verify = f"sparselogits verify {out}"
            print_next(otherwise=f"build the other windows, then check that all exist: {verify}")


def _require_objective(objective: ObjectiveName | None, masks: bool) -> None:
    """Check that the objective fits the kind of teacher (causal or masked)."""
    kind = ObjectiveName.masked if masks else ObjectiveName.causal
    if objective not in (None, kind):
        raise InvalidArgumentError(
            f"--objective is {objective}, but the teacher is a {kind} language model; expected "
            f"--objective {kind}. Leave it out, or use another teacher"
        )


class CacheCommand(TyperCommand):
    """Command with additional options: `--sampler`, and one per field that a sampler declares.

    The options are created when the command is parsed or its help is shown, because creating them
    imports the samplers of other packages.
    """

    @cached_property
    def _sampler_options(self) -> list[Any]:
        return _sampler_options()

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all options; the options of samplers follow --budget."""
        own, of_samplers = super().get_params(ctx), self._sampler_options
        known = {name for option in own for name in option.opts}
        for option in of_samplers:
            if clash := known.intersection(option.opts):
                raise InvalidArgumentError(
                    f"a sampler of another package declares a field for the option {clash.pop()}, "
                    "which `sparselogits cache` already has; rename the field or uninstall the "
                    "package"
                )
        first = 1 + next(i for i, option in enumerate(own) if option.name == "budget")
        return [*own[:first], *of_samplers, *own[first:]]

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with the values of sampler options in the context."""
        names = [option.name for option in self._sampler_options]
        ctx.meta[SAMPLER] = {name: ctx.params.pop(name) for name in names}
        return super().invoke(ctx)


def _sampler_options() -> list[Any]:
    """Return `--sampler` and one option per field that a sampler declares, as click options."""
    from sparselogits.samplers import samplers

    offered = {name: kind for name, kind in samplers().items() if kind.on_command_line}
    biased = listed([name for name, kind in offered.items() if not kind.unbiased])
    help_text = f"Method that chooses the entries. All but {biased} are unbiased."
    names = StrEnum("SamplerName", list(offered))  # type: ignore[misc]
    options = {"sampler": (names, TARGETS(help_text, DEFAULT_SAMPLER))}
    for field in dict.fromkeys(field for kind in offered.values() for field in kind.declared()):
        options[field] = _option_of_field(field, offered)

    def options_of_samplers(**_: Any) -> None: ...

    kind = inspect.Parameter.KEYWORD_ONLY
    options_of_samplers.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, kind, default=default, annotation=type_)
            for name, (type_, default) in options.items()
        ]
    )
    options_of_samplers.__annotations__ = {name: type_ for name, (type_, _) in options.items()}
    app = typer.Typer(add_completion=False)
    app.command()(options_of_samplers)
    return list(typer.main.get_command(app).params)


def _option_of_field(field: str, offered: Mapping[str, type[Sampler]]) -> tuple[Any, Any]:
    """Return the type and the declaration of the option for a field that samplers declare."""
    owners = {name: kind for name, kind in offered.items() if field in kind.declared()}
    kind = next(iter(owners.values()))
    declared = kind.declared()[field]
    text = f"{declared.help}, for {listed(list(owners))}"
    default = f"{declared.default}"
    if field == kind.budget_parameter:
        text, default = f"{text}, in place of --budget", "from --budget"
    if declared.choices:
        text += f": {declared.expected()}"
    return declared.kind | None, TARGETS(f"{text}.", shown=default)


def _sampler(given: Mapping[str, Any], budget: float | None) -> tuple[Sampler, float | None]:
    """Return the sampler, and the budget to fit the sampler to; None for no budget."""
    from sparselogits.samplers import choose, samplers

    kind = samplers()[given["sampler"]]
    declared, size = kind.declared(), kind.budget_parameter
    fields = {n: value for n, value in given.items() if n != "sampler" and value is not None}
    unknown = [field for field in fields if field not in declared]
    if size is None and budget is not None:
        unknown.append("budget")
    if unknown:
        own = [_dashed(field) + (" or --budget" if field == size else "") for field in declared]
        raise InvalidArgumentError(
            f"--sampler {kind.name} takes {listed(own) or 'no option of its own'}, not "
            f"{_dashed(unknown[0])}; leave it out, or choose another sampler"
        )
    if size is not None and size not in fields:
        budget = DEFAULT_BUDGET if budget is None else budget
    elif size is not None and budget is not None:
        raise InvalidArgumentError(f"give --budget or {_dashed(size)}, not both")
    return choose(kind.name, fields).sampler(), budget


def _dashed(field: str) -> str:
    """Return the command-line option of a sampler's field."""
    return f"--{field.replace('_', '-')}"


def _window_range(text: str | None) -> tuple[int, int] | None:
    """Parse `--windows` into the first window and the window after the last; None if not given."""
    if text is None:
        return None
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise InvalidArgumentError(f"--windows is {text!r}; give A:B, for example 0:512")
    return int(first), int(stop)
