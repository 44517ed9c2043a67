"""Define `sparselogits info`, which prints the contents and origin of a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from sparselogits.cli.options import CacheArgument, Json, print_json, print_train_command
from sparselogits.console import results, styled
from sparselogits.untrusted import printable
from sparselogits.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from sparselogits.store import CacheSample, CacheStatistics, Histogram

_BY_TEXT: dict[str, Callable[[CacheStatistics], str]] = {
    "windows": lambda facts: f"{facts.windows:,}",
    "entries/token": lambda facts: f"{facts.entries_per_position:.2f}",
    "bits/entry": lambda facts: f"{facts.bits_per_entry:.2f}",
    "bytes/token": lambda facts: f"{facts.bytes_per_token:.2f}",
    "loss": lambda facts: f"{facts.mean_teacher_loss:.3f}",
    "entropy": lambda facts: f"{facts.mean_teacher_entropy:.3f}",
}
"""Functions that format the cells of each column in the table of texts, by the column's title."""


def info(
    cache: CacheArgument,
    sample: int = typer.Option(
        16, help="Number of row groups to read for the histograms. 0 omits them.", min=0
    ),
    as_json: Json = False,
) -> None:
    """Show the contents of a cache, its origin, and histograms of its targets."""
    print_info(cache, as_json, sampled=sample)
    if not as_json:
        print_train_command(cache)


def print_info(
    root: str, as_json: bool, *, sampled: int = 0, text: dict[str, object] | None = None
) -> None:
    """Print the statistics and the origin of a cache, as text or as JSON.

    Args:
        root: folder or URL of the cache.
        as_json: whether to print JSON.
        sampled: number of row groups to read for histograms; 0 for no histograms.
        text: facts about the source text to add to the JSON.
    """
    from sparselogits.caching import names_of_texts
    from sparselogits.store import Cache, sample_cache
    from sparselogits.store.texts import named_texts

    opened = Cache.open(root)
    texts, by_text = named_texts(opened.storage), {}
    facts, facts_of_texts = opened.statistics_by_text(texts)
    if len(texts) > 1:
        names = names_of_texts(root)
        for number, (one, own) in enumerate(zip(texts, facts_of_texts, strict=True)):
            by_text[f"{number}: {names.get(one.fingerprint, one.fingerprint[:12])}"] = own
    sample = sample_cache(opened, sampled) if sampled and facts.windows else None
    if as_json:
        shown = {
            "path": str(root),
            "fingerprint": opened.identity.fingerprint,
            "identity": opened.identity.to_json(),
            "statistics": _as_json(facts),
        }
        if by_text:
            shown["texts"] = {name: _as_json(own) for name, own in by_text.items()}
        if sample is not None:
            shown["sample"] = asdict(sample)
        if text is not None:
            shown["text"] = text
        print_json(shown)
        return
    identity = opened.identity
    windows = f"{counted(facts.windows, 'window')} of {identity.window_length:,} tokens"
    padded = ""
    if identity.packing.get("kind") == "documents":
        windows, padded = f"{windows}, one document per window", "; padding counts as tokens"
    console = results()
    for name, value in (
        ("cache", str(root)),
        ("teacher", identity.teacher_in_words()),
        ("sampler", identity.sampler_in_words()),
        *([("objective", identity.predicts.in_words())] if identity.objective else []),
        ("windows", windows),
        ("tokens", f"{facts.tokens:,}{padded}"),
        ("entries", f"{facts.entries:,}, {facts.entries_per_position:.2f} per token"),
        ("size", f"{facts.bytes_on_disk:,} bytes in {counted(facts.shards, 'shard')}"),
        ("bits per entry", f"{facts.bits_per_entry:.2f}"),
        ("bytes per token", f"{facts.bytes_per_token:.2f}, the text's own tokens included{padded}"),
        ("teacher's loss", f"{facts.mean_teacher_loss:.3f} nats"),
        ("teacher's entropy", f"{facts.mean_teacher_entropy:.3f} nats"),
        ("identity", identity.fingerprint),
    ):
        # lines instead of a table, because a table truncates values in a pipe
        console.print(styled(f"{name:<18}", "dim", f" {value}"), soft_wrap=True)
    if by_text:
        _print_texts(console, by_text)
    if sample is not None:
        _print_histograms(console, sample)


def _as_json(facts: CacheStatistics) -> dict[str, float]:
    """Return statistics and the ratios computed from them as JSON values."""
    return asdict(facts) | {
        "entries_per_position": facts.entries_per_position,
        "bits_per_entry": facts.bits_per_entry,
        "bytes_per_token": facts.bytes_per_token,
    }


def _print_texts(console: Console, by_text: dict[str, CacheStatistics]) -> None:
    """Print a table with the statistics of each text."""
    table = Table("text", *_BY_TEXT, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, facts in by_text.items():
        table.add_row(Text(printable(name)), *(shown(facts) for shown in _BY_TEXT.values()))
    console.print()
    console.print(table)


def _print_histograms(console: Console, sample: CacheSample) -> None:
    """Print three histograms, side by side if the terminal is wide enough."""
    total = counted(sample.of, "window")
    part = "all" if sample.windows == sample.of else f"a sample, {sample.windows:,}"
    console.print(styled(f"\nfrom {part} of {total}", "dim"))
    length = 8 if console.width < 100 else 14
    block = "█" if console.encoding.lower().startswith("utf") else "#"

    def lines(histogram: Histogram, label: Callable[[float, float], str]) -> str:
        return "\n".join(_bars(histogram, label, block=block, length=length))

    columns = {
        "entries per position": lines(sample.entries, _whole),
        "entries by weight": lines(sample.weights, lambda a, _: f"{10**a:.1g} +"),
        "windows by entropy, nats": lines(sample.entropy, lambda a, _: f"{a:.2f} +"),
    }
    if console.width >= 78:
        grid = Table(*columns, box=None, pad_edge=False)
        grid.add_row(*columns.values())
        console.print(grid)
        return
    for title, drawn in columns.items():
        console.print(styled(title, "bold", f"\n{drawn}"))


def _bars(
    histogram: Histogram, label: Callable[[float, float], str], *, block: str, length: int
) -> list[str]:
    """Return the lines of a bar chart with labels and percentages."""
    most, total = max(histogram.counts, default=0) or 1, sum(histogram.counts) or 1
    labels = [label(a, b) for a, b in pairwise(histogram.edges)]
    width = max(map(len, labels), default=0)
    return [
        f"{name:>{width}} {block * round(length * count / most):<{length}} {count / total:>4.0%}"
        for name, count in zip(labels, histogram.counts, strict=True)
    ]


def _whole(first: float, past: float) -> str:
    """Return the label of a bin of integers from `first` to `past` - 1."""
    return f"{first:.0f}" if past - first == 1 else f"{first:.0f}-{past - 1:.0f}"
