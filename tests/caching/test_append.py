"""Test adding text to a cache: new windows, unchanged files, resuming, other settings."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sparselogits.caching import (
    BuildReport,
    CacheRequest,
    build_caches,
    place_of_text,
    shard_ranges,
    windows_of_texts,
)
from sparselogits.cli import app
from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.errors import (
    CacheError,
    CorpusError,
    IdentityMismatchError,
    InvalidArgumentError,
    SparseLogitsError,
)
from sparselogits.samplers import Systematic
from sparselogits.store import Cache, verify
from sparselogits.store.cache import same_record
from sparselogits.store.texts import named_texts
from sparselogits.teacher import load_teacher

Add = Callable[..., BuildReport]
TEXTS = ["The first text. " * 120, "Another one, later. " * 90, "And a third. " * 150]


@pytest.fixture(scope="module")
def add(teacher_folder, tokenizer) -> Add:
    """Build a text into a cache, as the command does."""
    engine = load_teacher(str(teacher_folder), tokenizer=tokenizer)

    def run(cache: Path, text: Path, *, append: bool = True, **changes: object) -> BuildReport:
        source = open_source(text)
        packing = packing_for(tokenizer, window_length=changes.pop("window", 16))
        place = place_of_text(cache, source, packing, append=append)
        corpus = pack(source, tokenizer, packing, place.folder, vocab_size=engine.vocab_size)
        return build_caches(
            engine,
            corpus,
            [CacheRequest(cache, Systematic(6), seed=int(changes.pop("seed", 0)))],
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            batch=4,
            windows_per_shard=8,
            first_window=place.first_window,
            **changes,
        )

    return run


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{i}.txt" for i in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "shards").iterdir()}


def test_appended_windows_follow_and_nothing_is_rewritten(tmp_path, texts, add):
    root, held = tmp_path / "cache", 0
    for number, text in enumerate(texts):
        before = shards(root) if number else {}
        inodes = {p.name: p.stat().st_ino for p in (root / "shards").iterdir()} if number else {}
        report = add(root, text, append=number > 0)
        assert report.windows_built == len(Cache.open(root)) - held > 8
        assert report.windows_found == 0
        held = len(Cache.open(root))
        assert {name: shards(root)[name] for name in before} == before
        assert {name: (root / "shards" / name).stat().st_ino for name in inodes} == inodes
    cache = Cache.open(root)
    assert windows_of_texts(root) == held
    assert verify(cache, stop=windows_of_texts(root)).ok
    assert [cache.window_index(i) for i in range(held)] == list(range(held))
    lengths = [stop - start for start, stop in cache.finished()]
    assert sum(length < 8 for length in lengths) >= 2  # each text may end in a short shard


def test_info_has_a_row_per_text(tmp_path, texts, add):
    """Compared with sums over the windows; the rows together are the cache."""
    cache = tmp_path / "cache"
    for text in texts:
        add(cache, text, append=text != texts[0])
    said = CliRunner().invoke(app, ["info", str(cache), "--json"])
    found = json.loads(said.stdout)
    opened = Cache.open(cache)
    records = [opened.read(i) for i in range(len(opened))]
    spans = named_texts(opened.storage)
    assert list(found["texts"]) == [f"{n}: {text.name}" for n, text in enumerate(texts)]
    for own, span in zip(found["texts"].values(), spans, strict=True):
        mine = [r for r in records if span.holds((r.window_index, r.window_index + 1))]
        assert own["windows"] == len(mine) == span.windows
        assert own["entries"] == sum(r.targets.entries for r in mine)
        mean = sum(r.teacher_loss for r in mine) / len(mine)
        assert own["mean_teacher_loss"] == pytest.approx(mean, rel=1e-5)
    for key in ("windows", "entries", "shards", "bytes_on_disk"):
        assert sum(own[key] for own in found["texts"].values()) == found["statistics"][key]
    table = CliRunner().invoke(app, ["info", str(cache)]).stdout
    assert all(f"{n}: {text.name}" in table for n, text in enumerate(texts))


def test_an_appended_text_is_found_again_and_resumed(tmp_path, texts, add):
    root = tmp_path / "cache"
    for number, text in enumerate(texts):
        add(root, text, append=number > 0)
    whole = shards(root)
    (lost,) = [name for name in whole if name == sorted(whole)[-1]]
    (root / "shards" / lost).unlink()
    second = sorted(whole)[len(whole) // 2]
    (root / "shards" / second).unlink()
    assert not verify(
        Cache.open(root), stop=windows_of_texts(root)
    ).ok  # the last one is missed too
    reports = [add(root, text) for text in texts]
    assert sum(report.windows_built for report in reports) <= 16
    assert shards(root) == whole
    corpora = ["corpus", "corpus-0001", "corpus-0002"]
    assert sorted(path.name for path in root.glob("corpus*")) == corpora


def test_another_text_without_append_is_refused_with_the_way_on(tmp_path, texts, add):
    root = tmp_path / "cache"
    add(root, texts[0], append=False)
    before = shards(root)
    with pytest.raises(IdentityMismatchError, match="--append"):
        add(root, texts[1], append=False)
    assert shards(root) == before
    assert add(root, texts[0], append=False).windows_built == 0


def test_equal_text_appended_draws_other_noise_than_before(tmp_path, texts, add):
    """Uniforms are keyed by the window's number in the cache, not in its text."""
    root = tmp_path / "cache"
    add(root, texts[0], append=False)
    twice = tmp_path / "twice.txt"
    twice.write_text(TEXTS[0] + " ")
    add(root, twice)
    cache = Cache.open(root)
    first = len(cache) // 2
    assert np.array_equal(cache.read(0).tokens, cache.read(first).tokens)
    moved = replace(cache.read(first), window_index=0)
    assert not same_record(cache.read(0), moved)


def test_what_differs_is_refused(tmp_path, texts, add):
    root = tmp_path / "cache"
    with pytest.raises(CacheError, match="cannot append"):
        add(root, texts[1])
    add(root, texts[0], append=False)
    before = shards(root)
    with pytest.raises(IdentityMismatchError, match="window_length"):
        add(root, texts[1], window=32)
    assert not (root / "corpus-0001").exists()
    with pytest.raises(SparseLogitsError, match="seed"):
        add(root, texts[2], seed=1)
    assert shards(root) == before


def test_shards_of_appended_text_start_at_its_first_window():
    assert shard_ranges(10, 4, first_window=7) == [(7, 11), (11, 15), (15, 17)]
    assert shard_ranges(10, 4, (11, 17), first_window=7) == [(11, 15), (15, 17)]
    with pytest.raises(InvalidArgumentError, match="7 plus multiples of 4"):
        shard_ranges(10, 4, (8, 12), first_window=7)
    with pytest.raises(InvalidArgumentError, match="7:17"):
        shard_ranges(10, 4, (0, 4), first_window=7)


def test_a_shard_has_at_least_one_window():
    for number in (0, -1, True, 2.0, math.nan):
        with pytest.raises(InvalidArgumentError, match=r"windows_per_shard is .* of at least 1"):
            shard_ranges(10, number)


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"source": null}', '{"source": ["a"]}', '{"source": {"fingerprint": 3}}'],
)
def test_a_packed_text_whose_description_names_no_text_is_reported(content, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "cache" / "corpus").mkdir(parents=True)
    (tmp_path / "cache" / "corpus" / "corpus.json").write_text(content)
    source, packing = open_source(tmp_path / "a.txt"), packing_for(tokenizer, window_length=16)
    for append in (False, True):
        with pytest.raises(CorpusError, match=r"corpus\.json is damaged .* expected a JSON object"):
            place_of_text(tmp_path / "cache", source, packing, append=append)
