"""The commands, thin: options in, one call, a result printed.

Exit codes: 0 done, 2 a mistake that the message explains, 130 interrupted (and resumable), 1 a
bug. Results go to standard output (JSON with `--json`), progress and remarks to standard error.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from sparselogits.console import messages, quiet_transformers, stage
from sparselogits.errors import InvalidArgumentError, SparseLogitsError, SparseLogitsWarning

app = typer.Typer(
    name="sparselogits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Offline knowledge distillation of language models from a cache of sparse, unbiased "
    "teacher targets.",
)

DEFAULT_BUDGET = 12.0
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")]


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


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = {"debug": debug}
    quiet_transformers()


@app.command()
def cache(
    teacher: Annotated[str, typer.Option(help="Model folder, GGUF file or hub name.")],
    data: Annotated[str, typer.Option(help="Text, JSONL or Parquet file, folder, or dataset.")],
    out: Annotated[Path, typer.Option(help="Directory of the cache; resumed if it exists.")],
    sampler: Annotated[SamplerName, typer.Option(help="How entries are chosen.")] = (
        SamplerName.systematic
    ),
    budget: Annotated[
        float | None, typer.Option(help=f"Mean entries a token [default: {DEFAULT_BUDGET:g}].")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds a token, instead of a budget.")] = None,
    proposal_exponent: Annotated[float, typer.Option(help="Draw from p to this power.")] = 1.0,
    k: Annotated[int, typer.Option(help="Entries a token, for topk.")] = 50,
    p: Annotated[float, typer.Option(help="Mass kept, for topp.")] = 0.95,
    max_entries: Annotated[int, typer.Option(help="Cap on entries a token, for topp.")] = 100,
    tau: Annotated[float, typer.Option(help="Smallest probability kept exactly.")] = 0.05,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    temperature: Annotated[float, typer.Option(help="Divides the teacher's logits.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Windows a forward pass.")] = 8,
    windows: Annotated[str | None, typer.Option(help="Build only windows A:B.")] = None,
    windows_per_shard: Annotated[int, typer.Option(help="Windows a file.")] = 512,
    holdout: Annotated[float, typer.Option(help="Share of documents kept aside.")] = 0.0,
    text_field: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    separator_id: Annotated[
        int | None, typer.Option(help="Token between documents; end-of-text by default.")
    ] = None,
    reset_attention: Annotated[
        bool, typer.Option(help="Keep documents of one window from seeing each other.")
    ] = False,
    executor: Annotated[ExecutorName, typer.Option(help="Who runs the build.")] = (
        ExecutorName.local
    ),
    processes: Annotated[int, typer.Option(help="Processes that tokenise.")] = 1,
    device: Device = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run code that comes with the model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the teacher once over a text and cache a few unbiased targets a token."""
    from sparselogits.build import CacheRequest, build_caches
    from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
    from sparselogits.samplers import from_parameters
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_tokenizer

    chosen, budget = _sampler_options(
        sampler.value, budget, rounds, proposal_exponent, k, p, max_entries, tau
    )
    only = _window_range(windows)
    source = open_source(data, text_field=text_field, split=split)
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    packing = packing_for(
        tokenizer,
        window_length=window,
        separator_id=separator_id,
        holdout=holdout,
        reset_attention=reset_attention,
    )
    messages.print(f"loading the teacher {escape(teacher)}")
    engine = load_teacher(
        teacher,
        tokenizer=tokenizer,
        dtype=dtype,
        device=_device(device),
        trust_remote_code=trust_remote_code,
    )
    with stage("packing text", "MB", per_unit=1e-6) as update:
        corpus = pack(
            source,
            tokenizer,
            packing,
            out / "corpus",
            vocab_size=engine.vocab_size,
            progress=update,
            processes=processes,
        )
    with stage("caching", "tokens", per_unit=window) as update:
        report = build_caches(
            engine,
            corpus,
            [CacheRequest(out, from_parameters(chosen), budget, seed, temperature)],
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            batch=batch,
            windows_per_shard=windows_per_shard,
            only=only,
            progress=update,
        )
    if report.windows_found:
        messages.print(f"{report.windows_found} windows were there already")
    _print_info(out, as_json)


def _sampler_options(
    name: str,
    budget: float | None,
    rounds: int | None,
    exponent: float,
    k: int,
    p: float,
    max_entries: int,
    tau: float,
) -> tuple[dict[str, Any], float | None]:
    if budget is not None and rounds is not None:
        raise InvalidArgumentError("give --budget or --rounds, not both")
    if name in ("topk", "topp", "threshold"):
        if budget is not None or rounds is not None:
            raise InvalidArgumentError(
                f"--sampler {name} draws no rounds: drop --budget and --rounds, and set "
                f"{ {'topk': '--k', 'topp': '--p', 'threshold': '--tau'}[name] } instead"
            )
        options: dict[str, dict[str, Any]] = {
            "topk": {"k": k},
            "topp": {"p": p, "max_entries": max_entries},
            "threshold": {"tau": tau},
        }
        return {"name": name, **options[name]}, None
    if budget is None and rounds is None:
        budget = DEFAULT_BUDGET
    if budget is not None and budget < 1:
        raise InvalidArgumentError(
            f"--budget is a mean number of entries, at least 1; got {budget}"
        )
    chosen: dict[str, Any] = {"name": name}
    if rounds is not None:
        chosen["rounds"] = rounds
    if name != "uniform":
        chosen["proposal_exponent"] = exponent
    return chosen, budget


def _window_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, stop = text.partition(":")
    if not (colon and first.isdigit() and stop.isdigit()):
        raise InvalidArgumentError(f"--windows takes A:B, as in 0:512; got {text!r}")
    return int(first), int(stop)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def info(
    cache: Annotated[Path, typer.Argument(help="Directory of a cache.")], as_json: Json = False
) -> None:
    """Say what a cache holds and what it was made from."""
    _print_info(cache, as_json)


def _print_info(root: Path, as_json: bool) -> None:
    from sparselogits.store import Cache

    opened = Cache.open(root)
    facts = opened.statistics()
    if as_json:
        shown = {
            "path": str(root),
            "fingerprint": opened.identity.fingerprint,
            "identity": opened.identity.to_json(),
            "statistics": asdict(facts)
            | {
                "entries_per_position": facts.entries_per_position,
                "bits_per_entry": facts.bits_per_entry,
                "bytes_per_token": facts.bytes_per_token,
            },
        }
        typer.echo(json.dumps(shown, indent=2))
        return
    identity = opened.identity
    sampler = ", ".join(f"{k} {v}" for k, v in identity.sampler.items() if k != "name")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("cache", escape(str(root))),
        ("teacher", f"{identity.teacher['name']} ({identity.teacher['dtype']})"),
        ("sampler", f"{identity.sampler['name']} ({sampler})"),
        ("windows", f"{facts.windows:,} of {identity.window_length} tokens"),
        ("tokens", f"{facts.tokens:,}"),
        ("entries", f"{facts.entries:,}, {facts.entries_per_position:.2f} a token"),
        ("size", f"{facts.bytes_on_disk:,} bytes in {facts.shards} shards"),
        ("bits an entry", f"{facts.bits_per_entry:.2f}"),
        ("bytes a token", f"{facts.bytes_per_token:.2f}, the text's own tokens included"),
        ("teacher's loss", f"{facts.mean_teacher_loss:.3f} nats"),
        ("teacher's entropy", f"{facts.mean_teacher_entropy:.3f} nats"),
        ("identity", identity.fingerprint),
    ):
        table.add_row(f"[dim]{name}[/dim]", value)
    _stdout().print(table, soft_wrap=True)


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Directory of the cache.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run.")] = None,
    method: Annotated[str | None, typer.Option(help="sparse, ce or full.")] = None,
    teacher: Annotated[str | None, typer.Option(help="For method full.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Share of the labels' loss.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the cache.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and order.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a student, from a recipe or from options alone."""
    from sparselogits.train import load_recipe, run
    from sparselogits.train.recipe import parse_recipe

    options = {
        "cache": cache,
        "out": out,
        "method": method,
        "teacher": teacher,
        "alpha": alpha,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    if recipe is not None:
        loaded = load_recipe(recipe, **options)
    else:
        given = {k: v for k, v in options.items() if v is not None}
        loaded = parse_recipe(given, source="the command line")
    with stage("training", "steps") as update:
        result = run(
            loaded,
            device=_device(device),
            progress=lambda done, total, line: update(
                done, total, f"loss {line['loss']:.3f}" if "loss" in line else ""
            ),
        )
    if not result.fresh:
        messages.print("this run was finished before; nothing was done")
    if as_json:
        facts = {"out": str(result.out), "seconds": result.seconds, "steps": result.steps}
        typer.echo(json.dumps(facts | {"curve": result.curve}, indent=2))
    else:
        last = f", last loss {result.curve[-1][1]:.3f}" if result.curve else ""
        _stdout().print(f"student in {result.model_path}: {result.steps} steps{last}")


@app.command("eval")
def evaluate_command(
    student: Annotated[str, typer.Argument(help="Folder of a student, or its run.")],
    cache: Annotated[Path, typer.Option(help="The cache with the held-out text.")],
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
    from sparselogits.corpus import PackedCorpus
    from sparselogits.data import TextDataset
    from sparselogits.evaluate import evaluate
    from sparselogits.store import Cache
    from sparselogits.teacher import load_teacher
    from sparselogits.teacher.loading import load_causal_lm, load_tokenizer
    from sparselogits.train.run import require_same_teacher

    opened = Cache.open(cache)
    windows = TextDataset(PackedCorpus.open(corpus or cache / "corpus"), limit=limit)
    path = Path(student)
    model = load_causal_lm(str(path / "model") if (path / "model").is_dir() else student)
    model.to(_device(device))
    engine = None
    if teacher is not None:
        engine = load_teacher(
            teacher, tokenizer=load_tokenizer(teacher), dtype=dtype, device=_device(device)
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
    _stdout().print(table)
    _stdout().print(
        f"cache: {facts.entries_per_position:.2f} entries and {facts.bytes_per_token:.2f} bytes a "
        f"token; held-out: {next(iter(found.values())).positions:,} positions"
    )


@app.command()
def verify(
    cache: Annotated[Path, typer.Argument(help="Directory of a cache.")],
    sample: Annotated[
        int | None, typer.Option(help="Decode only so many row groups a shard, for a quick look.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a cache and check every byte, checksum and invariant; exit code 2 if damaged."""
    from sparselogits.store import Cache
    from sparselogits.store import verify as verify_cache

    with stage("verifying", "shards") as update:
        report = verify_cache(Cache.open(cache), sample=sample, progress=update)
    damaged = [shard for shard in report.shards if shard.error is not None]
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        for shard in damaged:
            _stdout().print(f"[red]damaged[/] {escape(shard.name)}: {escape(str(shard.error))}")
        for start, stop in report.missing:
            _stdout().print(f"missing windows {start}:{stop}")
        windows = sum(shard.checked for shard in report.shards)
        _stdout().print(f"{len(report.shards)} shards, {windows} windows read, {len(damaged)} bad")
    if damaged:
        messages.print("`sparselogits repair` sets damaged shards aside; `cache` builds them again")
        raise typer.Exit(2)


@app.command()
def repair(
    cache: Annotated[Path, typer.Argument(help="Directory of a cache.")], as_json: Json = False
) -> None:
    """Set damaged shards aside (nothing is deleted) and list the windows to build again."""
    from sparselogits.store import Cache
    from sparselogits.store import repair as repair_cache

    with stage("verifying", "shards") as update:
        report = repair_cache(Cache.open(cache), progress=update)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    for before, after in report.set_aside:
        _stdout().print(f"moved {escape(before)} to {escape(after)}")
    if report.rebuild:
        ranges = ", ".join(f"{start}:{stop}" for start, stop in report.rebuild)
        _stdout().print(f"to build: windows {ranges}; the `cache` command of this cache does it")
    else:
        _stdout().print("nothing to repair")


@app.command()
def merge(
    caches: Annotated[list[Path], typer.Argument(help="Caches of one identity.")],
    out: Annotated[Path, typer.Option(help="Directory of the merged cache.")],
    as_json: Json = False,
) -> None:
    """Join caches whose windows were built apart."""
    from sparselogits.store import Cache
    from sparselogits.store import merge as merge_caches

    with stage("merging", "shards") as update:
        report = merge_caches([Cache.open(path) for path in caches], out, progress=update)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        _stdout().print(f"{len(report.copied)} shards copied, {len(report.kept)} were there")


@app.command()
def export(
    cache: Annotated[Path, typer.Argument(help="Directory of a cache.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    form: Annotated[str, typer.Option("--format", help="lists, topk or datasets.")] = "lists",
    k: Annotated[int, typer.Option(help="Entries a token, for topk.")] = 50,
) -> None:
    """Write a cache in a form that other tools read."""
    from sparselogits.store import Cache
    from sparselogits.store import export as export_cache

    with stage("exporting", "windows") as update:
        written = export_cache(Cache.open(cache), out, form, k=k, progress=update)
    _stdout().print(f"{len(written)} written to {out}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory of everything it makes.")] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """The whole way on a real teacher and real text, on a laptop, without a hub."""
    from sparselogits.demo import run_demo

    result = run_demo(out)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
    else:
        _stdout().print(result.table())
        _stdout().print(result.remark(), soft_wrap=True)
        _stdout().print(f"report: {result.report}", soft_wrap=True)


def _stdout() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def main() -> None:
    """Entry point: run a command and turn what it raises into a message and an exit code."""
    debug = "--debug" in sys.argv
    warnings.showwarning = _show_warning
    try:
        app()
    except SystemExit as stop:  # how typer ends, a usage error (2) or Ctrl-C (130) included
        if stop.code == INTERRUPTED:
            _say_interrupted()
        raise
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(INTERRUPTED)
    except SparseLogitsError as error:
        if debug:
            raise
        messages.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


def _say_interrupted() -> None:
    messages.print("\ninterrupted; what was finished is kept. The same command goes on from there.")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SparseLogitsWarning):
        messages.print(f"[yellow]note:[/] {escape(str(message))}", soft_wrap=True)
