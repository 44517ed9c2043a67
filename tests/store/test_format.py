"""Test that golden caches are read by the library and by the specification.

Golden caches are never rewritten. A new format version gets a folder of its own:
`python -m tests.store.test_format VERSION` writes tests/golden/store/vVERSION, the caches of one
version of the codec.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from sparselogits.store import Cache, WindowRecord, verify
from tests.store.draws import KINDS, identity, records
from tests.store.plain_reader import read_cache

GOLDEN = Path(__file__).parents[1] / "golden/store"
CACHES = sorted(path.parent for path in GOLDEN.glob("*/*/cache.json"))


def figures(record: WindowRecord) -> dict[str, np.ndarray]:
    targets = record.targets
    return {
        "window_index": np.array(record.window_index),
        "tokens": record.tokens,
        "document_starts": record.document_starts,
        "mask": np.zeros(0, np.bool_) if record.mask is None else record.mask,
        "ids": targets.ids.numpy(),
        "weights": targets.weights.numpy(),
        "offsets": targets.offsets.numpy(),
        "counts": np.zeros(0) if targets.counts is None else targets.counts.numpy(),
        "teacher": np.array([record.teacher_loss, record.teacher_entropy], np.float32),
    }


def write_golden(version: int) -> None:
    for kind in (k for k in KINDS if identity(k).codec["version"] == version):
        root = GOLDEN / f"v{version}" / kind
        cache = Cache.create(root, identity(kind))
        arrays = {}
        for start, stop in ((0, 9), (9, 12)):
            cache.commit(records(kind, start, stop), {"made": "for the golden files"})
            for record in records(kind, start, stop):
                for part, value in figures(record).items():
                    arrays[f"{record.window_index}.{part}"] = value
        np.savez_compressed(root / "expected.npz", **arrays)


def test_there_are_golden_caches() -> None:
    assert {path.name for path in CACHES} == set(KINDS)


@pytest.mark.parametrize("root", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_caches_still_read(root: Path) -> None:
    cache, expected = Cache.open(root), np.load(root / "expected.npz")
    assert len(cache) == 12
    for i in range(len(cache)):
        for part, value in figures(cache.read(i)).items():
            assert np.array_equal(value, expected[f"{i}.{part}"]), (i, part)
    assert verify(cache).ok


@pytest.mark.parametrize("root", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_reader_from_the_specification_agrees(root: Path) -> None:
    cache, windows = Cache.open(root), read_cache(root)
    assert len(windows) == len(cache)
    for i, row in enumerate(windows):
        record = cache.read(i)
        targets = record.targets
        counts = [None] * targets.entries if targets.counts is None else targets.counts.tolist()
        told = zip(
            targets.positions.tolist(),
            targets.ids.tolist(),
            targets.weights.tolist(),
            counts,
            strict=True,
        )
        assert row["targets"] == list(told)
        assert row["tokens"] == record.tokens.tolist()


if __name__ == "__main__":
    write_golden(int(sys.argv[1]))
