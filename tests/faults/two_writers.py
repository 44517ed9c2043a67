"""Run two commands on one folder, started at random times: one text, or one clear error.

    python -m tests.faults.run --only two_writers

After each pair: every command exited with 0 or with one error message, and at least one with 0;
the cache verifies against its packed text, and names one text per window.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparselogits.caching import text_of_windows, windows_of_texts
from sparselogits.corpus import PackedCorpus
from sparselogits.corpus.source import open_source
from sparselogits.store import Cache, verify
from sparselogits.store.texts import named_texts
from tests.faults.commands import Bench, Child, run, start

APART = 0.6
"""Maximum seconds between the two starts; each command takes one or two seconds."""

Pair = Callable[[Bench, Path], tuple[tuple[str, ...], tuple[str, ...]]]


def _cache_cache(bench: Bench, at: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return bench.cache(0, at / "c"), bench.cache(1, at / "c")


def _append_append(bench: Bench, at: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    bench.copy(bench.built(), at / "c")
    return bench.cache(1, at / "c", "--append"), bench.cache(2, at / "c", "--append")


def _cache_repair(bench: Bench, at: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    bench.copy(bench.built(), at / "c")
    first, second, *_ = sorted((at / "c/shards").iterdir())
    first.write_bytes(first.read_bytes()[:-100])
    second.unlink()
    return bench.cache(0, at / "c"), ("repair", str(at / "c"))


def _push_append(bench: Bench, at: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    bench.copy(bench.built(), at / "c")
    return ("push", str(at / "c"), f"file://{at}/pushed"), bench.cache(1, at / "c", "--append")


def _train_train(bench: Bench, at: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    bench.copy(bench.built(), at / "c")
    return bench.train(at / "c", at / "run"), bench.train(at / "c", at / "run")


PAIRS: dict[str, Pair] = {
    "cache/cache": _cache_cache,
    "append/append": _append_append,
    "cache/repair": _cache_repair,
    "push/append": _push_append,
    "train/train": _train_train,
}


def two_writers(folder: Path, starts: int, seed: int = 0) -> dict[str, Any]:
    """Run every pair a number of times, and return the number of outcomes of each kind."""
    bench = Bench.make(folder)
    found: dict[str, Any] = {}
    for name, pair in PAIRS.items():
        outcomes: Counter[str] = Counter()
        for number in range(starts):
            chance = random.Random(f"{seed}/{name}/{number}")
            at = folder / "pair"
            at.mkdir()
            outcomes[_one(name, pair, bench, at, chance)] += 1
            shutil.rmtree(at)
        found[name] = dict(sorted(outcomes.items()))
    return found


def _one(name: str, pair: Pair, bench: Bench, at: Path, chance: random.Random) -> str:
    words = pair(bench, at)
    begin, apart = time.monotonic() + 0.1, chance.uniform(-APART, APART)
    children = [
        start(words[0], at / "log-0", begin + max(0.0, apart)),
        start(words[1], at / "log-1", begin + max(0.0, -apart)),
    ]
    for child in children:
        child.wait()
    for child in children:
        require_clean(child)
    codes = [child.code for child in children]
    said = "\n".join(child.said for child in children)
    assert 0 in codes, said
    if name == "cache/cache":
        assert sorted(map(int, codes)) == [0, 2], said
        winner = bench.texts[codes.index(0)]
        corpus = PackedCorpus.open(at / "c/corpus")
        assert corpus.source_fingerprint == open_source(winner).fingerprint
    for cache in (at / "c", at / "pushed"):
        if cache.exists():
            _require_sound(cache, whole=name in ("cache/cache", "append/append", "train/train"))
    if name == "cache/repair":
        again = run(words[0], at / "log-2")
        assert again.code == 0, again.said
        _require_sound(at / "c", whole=True)
    if name == "train/train":
        assert (at / "run/model/model.safetensors").exists()
        again = run(words[0], at / "log-2")
        assert again.code == 0, again.said
    return "both done" if codes == [0, 0] else "one done, one refused"


def require_clean(child: Child) -> None:
    """Check that a command succeeded, or ended with one error message."""
    said = child.said
    assert child.code in (0, 2), f"{child.words} ended by {child.code}: {said}"
    assert "Traceback" not in said, said
    assert "bug:" not in said, said
    if child.code == 2:
        assert said.count("error:") == 1, said


def _require_sound(cache: Path, *, whole: bool) -> None:
    opened = Cache.open(cache)
    report = verify(opened, stop=windows_of_texts(cache), text_of=text_of_windows(cache))
    damaged = [f"{shard.name}: {shard.error}" for shard in report.damaged]
    assert not damaged, damaged
    assert not (whole and report.missing), report.missing
    texts = named_texts(opened.storage)
    assert texts
    assert not any(a.overlaps(b) for a in texts for b in texts if a != b)
    left = [path for path in cache.rglob("*") if path.name.startswith(".tmp-")]
    assert not left, left
