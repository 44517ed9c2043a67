"""Test that DuckDB and Polars read the same values as this library; see docs/guide.md."""

from pathlib import Path

import duckdb
import numpy as np
import polars
import pytest

from sparselogits.store import Cache, export
from sparselogits.store.records import WindowRecord


@pytest.fixture(scope="module")
def records(cache) -> list[WindowRecord]:
    opened = Cache.open(cache)
    return [opened.read(i) for i in range(len(opened))]


@pytest.fixture(scope="module")
def lists(cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "lists"
    export(Cache.open(cache), folder, "lists")
    return folder


def test_duckdb_reads_tokens_and_figures_of_the_shards(cache, records):
    query = "select window_index, tokens, teacher_loss, teacher_entropy from read_parquet($1)"
    rows = duckdb.execute(f"{query} order by 1", [str(cache / "shards" / "*.parquet")]).fetchall()
    assert len(rows) == len(records) > 0
    for (index, tokens, loss, entropy), record in zip(rows, records, strict=True):
        assert index == record.window_index
        assert tokens == list(record.tokens)
        assert (loss, entropy) == (record.teacher_loss, record.teacher_entropy)


def flat(records: list[WindowRecord]) -> tuple[np.ndarray, np.ndarray]:
    """All entries in the order of windows and positions: ids and weights."""
    ids = np.concatenate([record.targets.ids.numpy() for record in records])
    return ids, np.concatenate([record.targets.weights.numpy() for record in records])


def test_duckdb_reads_exported_targets(lists, records):
    found = duckdb.execute(
        "select flatten(ids), flatten(weights) from read_parquet($1) order by window_index",
        [str(lists / "*.parquet")],
    ).fetchall()
    ids, weights = flat(records)
    assert np.array_equal(np.concatenate([row[0] for row in found]), ids)
    assert np.array_equal(np.concatenate([row[1] for row in found]).astype(np.float32), weights)


def test_polars_reads_exported_targets(lists, records):
    entries = (
        polars.scan_parquet(lists / "*.parquet")
        .sort("window_index")
        .select("ids", "weights")
        .explode("ids", "weights")
        .explode("ids", "weights")
        .drop_nulls()  # positions without an entry
        .collect()
    )
    ids, weights = flat(records)
    assert np.array_equal(entries["ids"].to_numpy(), ids)
    assert np.array_equal(entries["weights"].to_numpy(), weights)
