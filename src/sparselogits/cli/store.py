"""`verify`, `repair`, `card`, `push`, `merge`, `export`: caches as they lie on disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sparselogits.cli.options import Json, stdout
from sparselogits.console import messages, stage


def verify(
    cache: Annotated[str, typer.Argument(help="Directory or URL of a cache.")],
    sample: Annotated[
        int | None, typer.Option(help="Decode only so many row groups a shard, for a quick look.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a cache and check every byte, checksum and invariant; exit code 2 if damaged."""
    from sparselogits.build import windows_of_texts
    from sparselogits.store import Cache
    from sparselogits.store import verify as verify_cache
    from sparselogits.store.place import is_url

    # a cache in an object store would have to fetch its whole text to know where it ends
    windows = None if is_url(cache) else windows_of_texts(Path(cache))
    opened = Cache.open(cache)
    with stage("verifying", "shards") as update:
        report = verify_cache(opened, sample=sample, stop=windows, progress=update)
    damaged = [shard for shard in report.shards if shard.error is not None]
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        for shard in damaged:
            stdout().print(f"[red]damaged[/] {escape(shard.name)}: {escape(str(shard.error))}")
        for start, stop in report.missing:
            stdout().print(f"missing windows {start}:{stop}")
        read = sum(shard.checked for shard in report.shards)
        stdout().print(f"{len(report.shards)} shards, {read} windows read, {len(damaged)} bad")
    if damaged:
        messages.print("`sparselogits repair` sets damaged shards aside; `cache` builds them again")
        raise typer.Exit(2)


def repair(
    cache: Annotated[str, typer.Argument(help="Directory or URL of a cache.")],
    as_json: Json = False,
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
        stdout().print(f"moved {escape(before)} to {escape(after)}")
    if report.rebuild:
        ranges = ", ".join(f"{start}:{stop}" for start, stop in report.rebuild)
        stdout().print(f"to build: windows {ranges}; the `cache` command of this cache does it")
    else:
        stdout().print("nothing to repair")


def card(
    cache: Annotated[str, typer.Argument(help="Directory or URL of a cache.")],
) -> None:
    """Print a dataset card with the cache's figures, for its README.md when it is published."""
    from sparselogits.store import Cache
    from sparselogits.store.card import dataset_card

    opened = Cache.open(cache)
    typer.echo(dataset_card(opened.identity, opened.statistics()), nl=False)


def push(
    cache: Annotated[str, typer.Argument(help="Directory of a cache.")],
    url: Annotated[str, typer.Argument(help="hf://datasets/ORG/NAME, s3://bucket/prefix, ...")],
    without_text: Annotated[
        bool, typer.Option("--without-text", help="Leave out the packed text, held-out documents.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a cache, with a dataset card, where others load it by its name."""
    from sparselogits.build import publish_text
    from sparselogits.build.text import packed_texts
    from sparselogits.store import Cache
    from sparselogits.store import push as push_cache

    with stage("pushing", "shards") as update:
        report = push_cache(Cache.open(cache), url, progress=update)
    if not without_text:
        for folder in packed_texts(Path(cache)):
            publish_text(url, folder)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    stdout().print(f"{len(report.copied)} shards put, {len(report.kept)} were there")
    stdout().print(f'read it with CacheDataset("{escape(url)}")', soft_wrap=True)


def merge(
    caches: Annotated[list[str], typer.Argument(help="Directories or URLs of one identity.")],
    out: Annotated[str, typer.Option(help="Directory or URL of the merged cache.")],
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
        stdout().print(f"{len(report.copied)} shards copied, {len(report.kept)} were there")


def export(
    cache: Annotated[str, typer.Argument(help="Directory or URL of a cache.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    form: Annotated[str, typer.Option("--format", help="lists, topk or datasets.")] = "lists",
    k: Annotated[int, typer.Option(help="Entries a token, for topk.")] = 50,
) -> None:
    """Write a cache in a form that other tools read."""
    from sparselogits.store import Cache
    from sparselogits.store import export as export_cache

    with stage("exporting", "windows") as update:
        written = export_cache(Cache.open(cache), out, form, k=k, progress=update)
    stdout().print(f"{len(written)} written to {out}", soft_wrap=True)
