"""Test verify, repair, merge, export and append on real files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sparselogits.corpus import Window, fingerprint
from sparselogits.errors import CacheError, IdentityMismatchError, InvalidArgumentError
from sparselogits.store import Cache, WindowRecord, export, merge, repair, verify
from sparselogits.store.shard.writer import encode_shard
from sparselogits.targets import SparseTargets
from tests.store.draws import KINDS, identity, record, records


def build(root: Path, *starts: int, kind: str = "counts", rows: int = 20) -> Cache:
    cache = Cache.create(root, identity(kind))
    for start in starts:
        cache.commit(records(kind, start, start + rows), {})
    return cache


def flat(lists: list[list[float]]) -> list[float]:
    return [value for part in lists for value in part]


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_cache_verifies(tmp_path, kind):
    calls: list[tuple[int, int]] = []
    report = verify(build(tmp_path, 0, 20, kind=kind), progress=lambda *c: calls.append(c))
    assert report.ok
    assert [shard.checked for shard in report.shards] == [20, 20]
    assert calls == [(1, 2), (2, 2)]


def forge(
    root: Path, bad: WindowRecord, kind: str, provenance: dict[str, Any] | None = None
) -> str:
    """A shard whose checksums all hold around a window that is none; what `verify` says of it."""
    cache = Cache.create(root, identity(kind))
    name, data = encode_shard(cache.identity, [bad], provenance or {})
    cache.storage.create(name, data)
    report = verify(cache)
    assert not report.ok
    return str(report.damaged[0].error)


def test_what_checksums_do_not_see_is_seen(tmp_path):
    whole = record("float32", 0)
    first = int(whole.targets.offsets[1])
    emptied = SparseTargets(
        whole.targets.ids[first:],
        whole.targets.weights[first:],
        (whole.targets.offsets - first).clamp_min(0),
        1000,
    )
    said = forge(tmp_path / "a", replace(whole, targets=emptied), "float32")
    assert "position 0 has a target but no entries" in said
    beyond = replace(whole, tokens=whole.tokens + np.int32(1000))
    assert "outside the vocabulary of 1000 ids" in forge(tmp_path / "b", beyond, "float32")
    light = record("threshold", 0)
    below = SparseTargets(
        light.targets.ids, light.targets.weights * 0.9, light.targets.offsets, 1000
    )
    said = forge(tmp_path / "c", replace(light, targets=below), "threshold")
    assert "weights from 0.045" in said
    other = {"corpus": fingerprint([window_of(record("counts", 1))])}
    assert "rows have corpus" in forge(tmp_path / "d", record("counts", 0), "counts", other)


def window_of(r: WindowRecord) -> Window:
    return Window(r.window_index, r.tokens, r.document_starts, r.mask)


def test_the_text_of_a_shard_is_what_its_provenance_says(tmp_path):
    cache = Cache.create(tmp_path, identity())
    made = records("counts", 0, 20)
    cache.commit(made, {"corpus": fingerprint([window_of(r) for r in made])})
    assert verify(cache).ok


def test_gaps_are_reported(tmp_path):
    report = verify(build(tmp_path, 20), stop=60)
    assert report.missing == ((0, 20), (40, 60))
    assert not report.ok


def test_a_sample_reads_less(tmp_path):
    report = verify(build(tmp_path, 0), sample=1)
    assert report.ok
    assert report.shards[0].checked == 8
    assert verify(Cache.open(tmp_path), sample=0).shards[0].checked == 0


def test_repair_sets_aside_and_the_next_build_fills(tmp_path):
    cache = build(tmp_path, 0, 20, 40)
    path = tmp_path / "shards/windows-000000000020-000000000040.parquet"
    whole = path.read_bytes()
    for _ in range(2):  # the second time, the name in `damaged` is taken
        flip(path, 5000)
        damaged = path.read_bytes()
        report = verify(cache)
        assert [shard.windows for shard in report.damaged] == [(20, 40)]
        assert "rows from" in str(report.damaged[0].error) or "pages" in str(
            report.damaged[0].error
        )
        done = repair(cache)
        assert done.rebuild == ((20, 40),)
        assert (tmp_path / done.set_aside[0][1]).read_bytes() == damaged
        assert cache.finished() == [(0, 20), (40, 60)]
        cache.commit(records("counts", 20, 40), {})
        assert path.read_bytes() == whole
    assert verify(cache).ok
    assert len(list((tmp_path / "damaged").iterdir())) == 2


def test_a_shard_removed_since_the_report_is_not_moved(tmp_path):
    cache = build(tmp_path, 0, 20)
    path = tmp_path / "shards/windows-000000000020-000000000040.parquet"
    flip(path, 5000)
    report = verify(cache)
    path.unlink()
    done = repair(cache, report)
    assert (done.set_aside, done.rebuild) == ((), ((20, 40),))


def test_merge_copies_bytes_and_goes_on(tmp_path):
    a, b = build(tmp_path / "a", 0, 40), build(tmp_path / "b", 20, 40)
    report = merge([a, b], tmp_path / "c")
    assert report.copied == ((0, 20), (20, 40), (40, 60))
    merged = Cache.open(tmp_path / "c")
    assert verify(merged).ok
    name = "shards/windows-000000000020-000000000040.parquet"
    assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert merge([a, b], tmp_path / "c").copied == ()
    flip(tmp_path / "c" / name, 5000)
    report = merge([a, b], tmp_path / "c")
    assert report.copied == ((20, 40),)
    assert [old for old, _ in report.set_aside] == [name]
    assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_merge_refuses_strangers_overlaps_and_damage(tmp_path):
    a = build(tmp_path / "a", 0)
    stranger = Cache.create(tmp_path / "s", identity(seed=9))
    with pytest.raises(IdentityMismatchError, match="seed"):
        merge([a, stranger], tmp_path / "c")
    with pytest.raises(CacheError, match="overlap"):
        merge([a, build(tmp_path / "o", 10)], tmp_path / "d")
    flip(a.root / "shards/windows-000000000000-000000000020.parquet", 3000)
    with pytest.raises(CacheError, match="CRC32C"):
        merge([a], tmp_path / "e")


def test_export_as_lists_gives_every_entry(tmp_path):
    cache = build(tmp_path / "c", 0, 20)
    paths = export(cache, tmp_path / "out", "lists")
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert [row["window_index"] for row in rows] == list(range(40))
    expected = record("counts", 33).targets
    assert flat(rows[33]["ids"]) == expected.ids.tolist()
    assert np.float32(flat(rows[33]["weights"])).tolist() == expected.weights.tolist()
    assert [len(ids) for ids in rows[33]["ids"]] == expected.entries_per_position.tolist()


def test_export_as_topk_takes_the_heaviest(tmp_path):
    cache = build(tmp_path / "c", 0, kind="float32")
    (path,) = export(cache, tmp_path / "out", "topk", k=3)
    row = pq.read_table(path).to_pylist()[4]
    ids, weights = record("float32", 4).targets.padded()
    best = weights.topk(3).values
    assert np.allclose(row["top_logprobs"], best.log().numpy())
    assert row["top_ids"][5] == ids.gather(1, weights.topk(3).indices)[5].tolist()


def test_export_refuses_what_it_cannot_do(tmp_path):
    cache = build(tmp_path / "c", 0)
    with pytest.raises(InvalidArgumentError, match="choose one of"):
        export(cache, tmp_path / "out", "csv")
    with pytest.raises(InvalidArgumentError, match="not empty"):
        export(cache, tmp_path / "c", "lists")
