"""The dataset card says what the cache holds, in figures that its own statistics give.

pytest tests/store/test_card.py
"""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.store import Cache


def test_a_card_with_the_figures_of_a_cache(cache: Path) -> None:
    done = CliRunner().invoke(app, ["card", str(cache)], catch_exceptions=False)
    _, front, text = done.stdout.split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"] == "shards/*.parquet"
    opened = Cache.open(cache)
    found = opened.statistics()
    for figure in (
        f"{found.windows:,} of 32 tokens",
        f"| entries a token | {found.entries_per_position:.2f} |",
        f"{found.bytes_per_token:.2f}, the text's own",
        f"| teacher's loss on the text | {found.mean_teacher_loss:.3f} nats",
        opened.identity.fingerprint,
    ):
        assert figure in text


def test_the_card_a_build_begins_with_has_no_figures(cache: Path) -> None:
    assert "entries a token" not in (cache / "README.md").read_text()
