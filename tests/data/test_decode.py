"""Test that rows read by DuckDB, Polars, pandas, pyarrow and datasets decode to the targets."""

from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow.dataset
import pytest

from sparselogits import CacheDataset, SparseTargets, decode
from sparselogits.errors import CacheCorruptionError, CacheError, InvalidArgumentError
from tests.store.draws import record
from tests.store.test_tools import build

COLUMNS = "window_index, tokens, mask, targets"


def by_pyarrow(shards: Path) -> Any:
    return pyarrow.dataset.dataset(shards).to_table().to_pylist()[3]


def by_duckdb(shards: Path) -> Any:
    found = duckdb.sql(f"select {COLUMNS} from '{shards}/*.parquet' where window_index = 3")
    return found.to_arrow_table().to_pylist()[0]


def by_duckdb_and_pandas(shards: Path) -> Any:
    return duckdb.sql(f"select * from '{shards}/*.parquet' order by window_index").df().iloc[3]


def by_polars(shards: Path) -> Any:
    return polars.read_parquet(f"{shards}/*.parquet").row(3, named=True)


def by_datasets(shards: Path) -> Any:
    from datasets import Dataset

    files = [str(file) for file in sorted(shards.glob("*.parquet"))]
    return Dataset.from_parquet(files, cache_dir=str(shards.parent / "work"))[3]


READERS = [by_pyarrow, by_duckdb, by_duckdb_and_pandas, by_polars, by_datasets]


def same(a: SparseTargets, b: SparseTargets) -> bool:
    return (
        a.ids.equal(b.ids)
        and a.weights.equal(b.weights)
        and a.offsets.equal(b.offsets)
        and a.rounds == b.rounds
    )


@pytest.mark.parametrize("kind", ["counts", "counts+float32", "float32", "threshold"])
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_row_decodes_to_what_the_cache_holds(kind, read, tmp_path):
    cache = build(tmp_path / "c", 0, kind=kind)
    row = read(tmp_path / "c" / "shards")
    expected = record(kind, 3).targets
    for given in (tmp_path / "c", cache, CacheDataset(tmp_path / "c")):
        assert same(decode(row, given), expected)


def test_a_changed_row_is_refused(tmp_path):
    build(tmp_path / "c", 0)
    row = by_pyarrow(tmp_path / "c" / "shards")
    cache = CacheDataset(tmp_path / "c")
    swapped = row | {"tokens": [*row["tokens"][1:], row["tokens"][0]]}
    with pytest.raises(CacheCorruptionError, match="window 3 differs from what was written"):
        decode(swapped, cache)
    for block in (b"", row["targets"][:-3], row["targets"][:20] + b"\xff" * 40):
        bare = {name: row[name] for name in ("window_index", "tokens", "mask")}
        with pytest.raises(CacheCorruptionError, match="Read it again"):
            decode(bare | {"targets": block}, cache)
    with pytest.raises(CacheCorruptionError, match="the row has 3 mask values, expected"):
        decode(row | {"mask": [True] * 3}, cache)
    with pytest.raises(CacheCorruptionError):
        decode(row | {"tokens": [1 << 40] * len(row["tokens"])}, cache)


def test_what_a_row_lacks_is_named(tmp_path):
    build(tmp_path / "c", 0)
    row = by_pyarrow(tmp_path / "c" / "shards")
    with pytest.raises(InvalidArgumentError, match="lacks tokens, mask"):
        decode({name: row[name] for name in ("window_index", "targets")}, tmp_path / "c")
    with pytest.raises(InvalidArgumentError, match="lacks window_index"):
        decode({}, tmp_path / "c")
    with pytest.raises(CacheError, match="no shard"):
        decode(row | {"window_index": 10**6}, tmp_path / "c")
