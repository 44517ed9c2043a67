"""`sparselogits info`: what a cache holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from sparselogits.cli.options import Json, stdout


def info(
    cache: Annotated[str, typer.Argument(help="Directory or URL of a cache.")],
    as_json: Json = False,
) -> None:
    """Say what a cache holds and what it was made from."""
    print_info(cache, as_json)


def print_info(root: str, as_json: bool) -> None:
    """Print the facts of a cache, as a table or as JSON."""
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
    stdout().print(table, soft_wrap=True)
