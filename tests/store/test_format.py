"""Test that golden caches are read by the library and by the specification.

Golden caches are never rewritten. A new version gets a folder of its own:
`python -m tests.store.test_format NAME` writes tests/golden/store/NAME: v1 and v2 hold the causal
caches of a version of the codec, masked those with corrupted inputs.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from sparselogits.store import Cache, WindowRecord, verify
from tests.store.draws import KINDS, MASKED, identity, records
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
        "inputs": np.zeros(0, np.int32) if record.inputs is None else record.inputs,
        "rate": np.array(record.rate or 0, np.float32),
    }


def group(kind: str) -> str:
    return "masked" if kind in MASKED else f"v{identity(kind).codec['version']}"


def write_golden(name: str) -> None:
    for kind in (k for k in KINDS if group(k) == name):
        root = GOLDEN / name / kind
        cache = Cache.create(root, identity(kind))
        arrays = {}
        for start, stop in ((0, 9), (9, 12)):
            cache.commit(records(kind, start, stop), {"made": "for the golden files"})
            for record in records(kind, start, stop):
                for part, value in figures(record).items():
                    arrays[f"{record.window_index}.{part}"] = value
        np.savez_compressed(root / "expected.npz", **arrays)


def test_there_are_golden_caches():
    assert {path.name for path in CACHES} == set(KINDS)


@pytest.mark.parametrize("root", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_caches_still_read(root):
    cache, expected = Cache.open(root), np.load(root / "expected.npz")
    assert len(cache) == 12
    for i in range(len(cache)):
        found = figures(cache.read(i))
        for part, value in found.items():
            # caches of older versions were recorded without what they do not have
            default = np.zeros_like(value)
            assert np.array_equal(value, expected.get(f"{i}.{part}", default)), (i, part)
    assert verify(cache).ok


@pytest.mark.parametrize("root", CACHES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_reader_from_the_specification_agrees(root):
    cache, windows = Cache.open(root), read_cache(root)
    assert len(windows) == len(cache)
    for i, row in enumerate(windows):
        record = cache.read(i)
        targets = record.targets
        counts = [None] * targets.entries if targets.counts is None else targets.counts.tolist()
        parts = (targets.positions, targets.ids, targets.weights)
        told = zip(*(part.tolist() for part in parts), counts, strict=True)
        assert row["targets"] == list(told)
        assert row["tokens"] == record.tokens.tolist()
        if record.inputs is not None:
            hidden = dict(zip(np.flatnonzero(record.mask).tolist(), row["inputs"], strict=True))
            found = [hidden.get(p, token) for p, token in enumerate(row["tokens"])]
            assert found == record.inputs.tolist()
            assert row["rate"] == record.rate


if __name__ == "__main__":
    write_golden(sys.argv[1])
