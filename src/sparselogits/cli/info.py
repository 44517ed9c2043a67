"""Define `sparselogits info`, which prints the contents and origin of a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from sparselogits.cli.options import (
    DATA,
    MODEL,
    CacheArgument,
    Json,
    print_json,
    print_train_command_of,
)
from sparselogits.console import messages, results, styled
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.untrusted import printable
from sparselogits.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from sparselogits.store import Cache, CacheSample, CacheStatistics, Histogram, LabelStatistics

_BY_TEXT: dict[str, Callable[[CacheStatistics], str]] = {
    "windows": lambda facts: f"{facts.windows:,}",
    "entries/token": lambda facts: f"{facts.entries_per_position:.2f}",
    "bits/entry": lambda facts: f"{facts.bits_per_entry:.2f}",
    "bytes/token": lambda facts: f"{facts.bytes_per_token:.2f}",
    "loss": lambda facts: f"{facts.mean_teacher_loss:.3f}",
    "entropy": lambda facts: f"{facts.mean_teacher_entropy:.3f}",
}
"""Functions that format the cells of each column in the table of texts, by the column's title."""


_BY_LABEL: dict[str, tuple[str, str]] = {
    "tokens": ("tokens", ",d"),
    "entries/token": ("entries_per_position", ".2f"),
    "mass": ("mean_mass", ".3f"),
    "windows": ("windows", ",d"),
    "loss": ("mean_teacher_loss", ".3f"),
    "entropy": ("mean_teacher_entropy", ".3f"),
}
"""Name in `LabelStatistics.to_json` and format of each column in the table of labels."""

MOST_LABELS = 50
"""Largest number of labels with a separate row; the other labels share a row."""


def info(
    cache: CacheArgument,
    sample: int = typer.Option(
        16,
        help="Number of row groups (of 8 windows) to read for the histograms and for --by. 0 omits "
        "the histograms.",
        min=0,
    ),
    by: str | None = DATA(
        "Also show statistics of the targets by the value of this field in the records of --data, "
        "such as `source`, or `meta.source` for a field of an object.",
        shown="no such table",
    ),
    data: str | None = DATA(
        "Text from which the cache was built, for --by; the cache contains the text only, not the "
        "other fields of the records.",
        shown="none; required with --by",
    ),
    split: str = DATA("Split of a dataset to read, as when the cache was built.", "train"),
    tokenizer: str | None = MODEL(
        "Tokenizer with which the text was packed, for --by.", shown="the tokenizer in CACHE"
    ),
    as_json: Json = False,
) -> None:
    """Show the contents of a cache, its origin, and histograms of its targets."""
    labels = None
    if by is not None and data is not None and sample:
        labels = _by_label(cache, by, data, split, tokenizer, sample)
    elif by is not None or data is not None:
        raise InvalidArgumentError(
            "expected --by FIELD, --data TEXT and a --sample above 0 together; give all of them, "
            "or neither --by nor --data"
        )
    opened = print_info(cache, as_json, sampled=sample, labels=labels)
    if not as_json:
        print_train_command_of(opened, cache)


def _by_label(
    root: str, field: str, data: str, split: str, tokenizer: str | None, sampled: int
) -> dict[str | None, LabelStatistics]:
    """Return statistics of a sample of a cache by a field of the records of `data`.

    The dict is sorted by number of tokens, largest first. Only windows of one text are counted: the
    first text of the cache that matches `data`.
    """
    from sparselogits.caching import fetch_texts, opened_texts
    from sparselogits.corpus.labels import DocumentLabels
    from sparselogits.store import Cache, sampled_windows, statistics_by_label
    from sparselogits.store.storage.location import is_url
    from sparselogits.teacher.loading import TOKENIZER_FOLDER, load_tokenizer

    opened = Cache.open(root)
    texts = opened_texts(fetch_texts(root))
    if not texts:
        raise InvalidArgumentError(
            f"{root} has no packed text, which --by needs to find the documents of a window; give "
            "the cache as it was built, before it was merged or downloaded without its text"
        )
    kept = Path(root) / TOKENIZER_FOLDER
    if tokenizer is None and (is_url(root) or not kept.exists()):
        raise InvalidArgumentError(
            f"{root} contains no tokenizer; give the tokenizer of the teacher with --tokenizer"
        )
    packer = load_tokenizer(tokenizer or str(kept))
    for text in texts:
        corpus, first = text
        try:
            labels = DocumentLabels(corpus, data, field, tokenizer=packer, split=split)
            break
        except IdentityMismatchError:
            if text is texts[-1]:
                raise
    messages.print(f"reading the field {printable(field, 60)} of {printable(data)}")
    own = range(first, first + corpus.windows)
    found = statistics_by_label(
        (window for window in sampled_windows(opened, sampled) if window.window_index in own),
        lambda index: labels.of_window(index - first),
    )
    if not found.keys() - {None}:
        raise InvalidArgumentError(
            f"no document in the sample has a value in the field {field!r}; check its name (--by), "
            "or read more of the cache (--sample)"
        )
    return dict(sorted(found.items(), key=lambda item: -item[1].tokens))


def print_info(
    root: str,
    as_json: bool,
    *,
    sampled: int = 0,
    text: dict[str, object] | None = None,
    labels: Mapping[str | None, LabelStatistics] | None = None,
) -> Cache:
    """Print the statistics and the origin of a cache, as text or as JSON; return the open cache.

    Args:
        root: folder or URL of the cache.
        as_json: whether to print JSON.
        sampled: number of row groups to read for histograms; 0 for no histograms.
        text: facts about the source text to add to the JSON.
        labels: statistics of a sample by label, most tokens first.
    """
    from sparselogits.caching import names_of_texts
    from sparselogits.store import Cache, sample_cache
    from sparselogits.store.texts import named_texts
    from sparselogits.store.tools.sample import GROUPS

    opened = Cache.open(root)
    texts, by_text = named_texts(opened.storage), {}
    facts, facts_of_texts = opened.statistics_by_text(texts)
    if len(texts) > 1:
        names = names_of_texts(root)
        for number, (one, own) in enumerate(zip(texts, facts_of_texts, strict=True)):
            by_text[f"{number}: {names.get(one.fingerprint, one.fingerprint[:12])}"] = own
    identity = opened.identity
    padded = identity.packing.get("kind") == "documents"
    # how many tokens are padding is known only from the windows themselves
    read = sampled or (GROUPS if padded else 0)
    sample = sample_cache(opened, read) if read and facts.windows else None
    if as_json:
        shown: dict[str, object] = {
            "path": str(root),
            "fingerprint": opened.identity.fingerprint,
            "identity": opened.identity.to_json(),
            "statistics": _as_json(facts),
        }
        if padded and sample is not None:
            shown["text_share"] = sample.text_share
            shown["bytes_per_text_token"] = facts.bytes_per_token / sample.text_share
        if by_text:
            shown["texts"] = {name: _as_json(own) for name, own in by_text.items()}
        if sampled and sample is not None:
            shown["sample"] = asdict(sample)
        if text is not None:
            shown["text"] = text
        if labels is not None:
            rows, rest = _largest(labels)
            shown["by"] = [{"value": name, **own.to_json()} for name, own in rows]
            if rest is not None:
                shown["by_other"] = {"values": len(labels) - len(rows), **rest.to_json()}
        print_json(shown)
        return opened
    windows = f"{counted(facts.windows, 'window')} of {identity.window_length:,} tokens"
    per_token, of_text = facts.bytes_per_token, ""
    tokens = f"{facts.tokens:,}"
    if padded and sample is not None:
        windows = f"{windows}, one document per window"
        about = "" if sample.windows == sample.of else "about "
        tokens += f", {about}{sample.text_share:.1%} of them text and the others padding"
        per_token /= sample.text_share
        of_text = f" (padding not counted{about and ', estimated'})"
    console = results()
    for name, value in (
        ("cache", str(root)),
        ("teacher", identity.teacher_in_words()),
        ("sampler", identity.sampler_in_words()),
        *([("objective", identity.predicts.in_words())] if identity.objective else []),
        ("windows", windows),
        ("tokens", tokens),
        (
            "entries",
            f"{facts.entries:,}, {facts.entries_per_position:.2f} per position with a target",
        ),
        ("size", f"{facts.bytes_on_disk:,} bytes in {counted(facts.shards, 'shard')}"),
        ("bits per entry", f"{facts.bits_per_entry:.2f}"),
        ("bytes per token", f"{per_token:.2f}, the text's own tokens included{of_text}"),
        ("teacher's loss", f"{facts.mean_teacher_loss:.3f} nats"),
        ("teacher's entropy", f"{facts.mean_teacher_entropy:.3f} nats"),
        ("identity", identity.fingerprint),
    ):
        # lines instead of a table, because a table truncates values in a pipe
        console.print(styled(f"{name:<18}", "dim", f" {value}"), soft_wrap=True)
    if by_text:
        _print_texts(console, by_text)
    if labels is not None:
        _print_labels(console, labels)
    if sampled and sample is not None:
        _print_histograms(console, sample)
    return opened


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


def _largest(
    labels: Mapping[str | None, LabelStatistics],
) -> tuple[list[tuple[str | None, LabelStatistics]], LabelStatistics | None]:
    """Return the labels to show, and the sum of the others; None if there are no others."""
    from sparselogits.store import LabelStatistics

    rows = list(labels.items())
    if len(rows) <= MOST_LABELS:
        return rows, None
    rest = LabelStatistics()
    for _, own in rows[MOST_LABELS:]:
        rest += own
    return rows[:MOST_LABELS], rest


def _print_labels(console: Console, labels: Mapping[str | None, LabelStatistics]) -> None:
    """Print a table with the statistics of each label, and notes on what the columns mean."""
    rows, rest = _largest(labels)
    named = [("(no value)" if name is None else _one_line(name), own) for name, own in rows]
    if rest is not None:
        named.append((f"({len(labels) - len(rows):,} other values)", rest))
    table = Table("value", *_BY_LABEL, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, own in named:
        facts = own.to_json()
        cells = ((facts[key], style) for key, style in _BY_LABEL.values())
        table.add_row(
            Text(name), *("-" if value is None else f"{value:{style}}" for value, style in cells)
        )
    console.print(
        styled("\nby value, in the sample; windows, loss and entropy: windows of one value", "dim")
    )
    console.print(table)


def _one_line(text: str) -> str:
    """Return a label as one line of printable characters; two quotes for an empty label."""
    return printable(text, 40).replace("\n", "\\n").replace("\t", "\\t") or '""'


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
