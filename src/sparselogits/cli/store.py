"""Define the commands that manage caches: verify, repair, card, push, merge, export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sparselogits.cli.options import (
    OUTPUT,
    CacheArgument,
    Json,
    print_json,
    print_next,
    print_train_command_of,
)
from sparselogits.console import messages, results, stage, styled
from sparselogits.wording import counted

if TYPE_CHECKING:
    from sparselogits.store import MergeReport


def verify(
    cache: CacheArgument,
    sample: int | None = typer.Option(
        None,
        help="Number of row groups to decode per file, for a quick check.",
        show_default="all row groups",
        min=0,
    ),
    as_json: Json = False,
) -> None:
    """Check every byte of a cache, or with --sample a part of it; exit with code 2 if damaged."""
    from sparselogits.caching import text_of_windows, windows_of_texts
    from sparselogits.store import Cache
    from sparselogits.store import verify as verify_cache
    from sparselogits.store.storage.location import is_url

    # for a cache in an object store, the whole text would have to be downloaded
    windows = text_of = None
    if not is_url(cache):
        windows, text_of = windows_of_texts(Path(cache)), text_of_windows(Path(cache))
    opened = Cache.open(cache)
    with stage("verifying", "shards") as update:
        report = verify_cache(opened, sample=sample, stop=windows, text_of=text_of, progress=update)
    damaged = [shard for shard in report.shards if shard.error is not None]
    if as_json:
        print_json(asdict(report))
    else:
        for shard in damaged:
            results().print(styled("damaged", "red", f" {shard.name}: {shard.error}"))
        for start, stop in report.missing:
            results().print(f"missing windows {start}:{stop}")
        read = sum(shard.checked for shard in report.shards)
        shards, found = counted(len(report.shards), "shard"), len(damaged) or "none"
        results().print(f"{counted(read, 'window')} read in {shards}, {found} of them damaged")
    if not damaged:
        if not as_json:
            print_train_command_of(opened, cache)
        return
    messages.print(
        "`sparselogits repair` moves damaged shards out of the cache, and `sparselogits cache` "
        "builds them again"
    )
    if not as_json:
        print_next("repair", cache)
    raise typer.Exit(2)


def repair(cache: CacheArgument, as_json: Json = False) -> None:
    """Move damaged files out of a cache, without deleting them, and list the windows to rebuild."""
    from sparselogits.caching import text_of_windows
    from sparselogits.store import Cache
    from sparselogits.store import repair as repair_cache
    from sparselogits.store.storage.location import is_url

    text_of = None if is_url(cache) else text_of_windows(Path(cache))
    opened = Cache.open(cache)
    with stage("verifying", "shards") as update:
        report = repair_cache(opened, text_of=text_of, progress=update)
    if as_json:
        print_json(asdict(report))
        return
    for before, after in report.set_aside:
        results().print(f"moved {before} to {after}")
    if report.rebuild:
        ranges = ", ".join(f"{start}:{stop}" for start, stop in report.rebuild)
        results().print(f"windows to rebuild: {ranges}")
        print_next(
            otherwise="the `sparselogits cache` command that built the cache; it builds only these"
        )
    else:
        results().print("nothing to repair")
        print_train_command_of(opened, cache)


def card(cache: CacheArgument) -> None:
    """Print a dataset card with the statistics of a cache, for its README.md."""
    from sparselogits.store import Cache
    from sparselogits.store.tools.card import dataset_card

    opened = Cache.open(cache)
    typer.echo(dataset_card(opened.identity, opened.statistics()), nl=False)
    print_next("push", cache, "hf://datasets/ORG/NAME")


def push(
    cache: str = typer.Argument(help="Folder of a cache.", metavar="CACHE"),
    url: str = typer.Argument(
        help="URL to publish the cache at: hf://datasets/ORG/NAME, s3://bucket/prefix, ...",
        metavar="URL",
    ),
    without_text: bool = typer.Option(
        False,
        "--without-text",
        help="Do not publish the packed text, which includes the held-out documents.",
    ),
    as_json: Json = False,
) -> None:
    """Publish a cache with a dataset card on the Hugging Face hub or in an object store."""
    from sparselogits.caching import publish_text
    from sparselogits.caching.text import packed_texts
    from sparselogits.store import Cache
    from sparselogits.store import push as push_cache

    opened = Cache.open(cache)
    with stage("pushing", "shards") as update:
        report = push_cache(opened, url, progress=update)
    if not without_text:
        for folder in packed_texts(Path(cache)):
            publish_text(url, folder)
    if as_json:
        print_json(asdict(report))
        return
    results().print(_copied(report, "pushed"))
    results().print(f'read it with CacheDataset("{url}")', soft_wrap=True)
    print_train_command_of(opened, url)


def merge(
    caches: list[str] = typer.Argument(
        help="Folders or URLs of caches built with the same settings.", metavar="CACHE..."
    ),
    out: str = OUTPUT("Folder or URL of the merged cache.", ...),
    as_json: Json = False,
) -> None:
    """Merge caches that contain different windows of the same text."""
    from sparselogits.store import Cache
    from sparselogits.store import merge as merge_caches

    with stage("merging", "shards") as update:
        report = merge_caches([Cache.open(path) for path in caches], out, progress=update)
    if as_json:
        print_json(asdict(report))
    else:
        results().print(_copied(report, "copied"))
        print_next("verify", out)


def export(
    cache: CacheArgument,
    out: Path = OUTPUT("Output folder; it must be new or empty.", ...),
    form: str = OUTPUT(
        "lists: Parquet with lists of ids and weights per token. topk: Parquet with the ids of the "
        "largest weights per token and their log-weights. weighted: Parquet with target tokens and "
        "weights of shape (N, K), for a weighted cross-entropy such as Tinker's. distillkit, "
        "axolotl: Top-K lists in the form of that trainer. datasets: a folder for "
        "datasets.load_from_disk with the columns of lists.",
        "lists",
        "--format",
    ),
    k: int | None = OUTPUT(
        "Entries per token, for --format topk, distillkit and axolotl.", shown="50"
    ),
    alpha: float = OUTPUT("Share of the true next token in the weights of --format weighted.", 0.0),
) -> None:
    """Write a cache in a format that other tools read without sparselogits."""
    from sparselogits.store import Cache
    from sparselogits.store import export as export_cache

    with stage("exporting", "windows") as update:
        written = export_cache(Cache.open(cache), out, form, k=k, alpha=alpha, progress=update)
    if form == "datasets":
        results().print(f"a datasets folder written to {out}", soft_wrap=True)
        print_next(otherwise=f'datasets.load_from_disk("{out}") in Python')
    else:
        results().print(f"{counted(len(written), 'file')} written to {out}", soft_wrap=True)
        print_next(
            otherwise=f'polars.read_parquet("{out}/*.parquet") in Python, or any other reader'
        )


def _copied(report: MergeReport, done: str) -> str:
    """Format how many shards were copied, and how many already existed."""
    copied, kept = counted(len(report.copied), "shard"), len(report.kept)
    return f"{copied} {done}, {kept} {'was' if kept == 1 else 'were'} there already"
