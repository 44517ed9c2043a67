"""Test that the dataset card agrees with the statistics of the cache."""

import yaml
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.store import Cache
from sparselogits.store.records import CacheStatistics
from sparselogits.store.tools.card import dataset_card
from tests.store.draws import identity


def test_a_card_with_the_figures_of_a_cache(cache):
    done = CliRunner().invoke(app, ["card", str(cache)], catch_exceptions=False)
    _, front, text = done.stdout.split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"] == "shards/*.parquet"
    opened = Cache.open(cache)
    found = opened.statistics()
    for figure in (
        f"{found.windows:,} of 32 tokens",
        f"| entries per token | {found.entries_per_position:.2f} |",
        f"{found.bytes_per_token:.2f}, including",
        f"| mean loss of the teacher | {found.mean_teacher_loss:.3f} nats",
        opened.identity.fingerprint,
    ):
        assert figure in text


def test_the_card_a_build_begins_with_has_no_figures(cache):
    assert "entries per token" not in (cache / "README.md").read_text()


def test_a_hostile_name_stays_text_in_a_card():
    """The card is Markdown that a hub renders: what a stranger wrote is quoted, never markup."""
    name = "`x` | [a](javascript:b)\n# x\n```\n<script>alert(1)</script>\x1b[2J\u202e"
    card = dataset_card(
        identity(teacher={"name": name, "dtype": name}, sampler={"name": name, name: name}),
        CacheStatistics(1, 2, 3, 3, 4, 5, 1, 0.0, 0.0),
    )
    assert all(c.isprintable() or c == "\n" for c in card)
    lines = card.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# A cache of sparse teacher targets"
    ]
    fences = [line for line in lines if line.startswith("```")]
    assert fences == ["```python", "```", "```json", "```"]
    shown = [line for line in lines if "<script>" in line and not line.startswith(" ")]
    assert len(shown) == 2
    for line in shown:  # inside one pair of backticks, where neither Markdown nor HTML is read
        before, quoted, after = line.split("`")
        assert "<script>" in quoted
        assert "<" not in before + after
        assert line.count("|") in (0, 3)
