"""Exports for other trainers, compared entry by entry with the cache they were made from."""

import math
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from sparselogits.caching import import_collected
from sparselogits.errors import InvalidArgumentError, StorageError
from sparselogits.losses import sparse_cross_entropy
from sparselogits.store import Cache, WindowRecord, export
from tests.conftest import PADDED_VOCABULARY
from tests.store.draws import LENGTH, identity, record, records

V, WINDOWS = 1000, 9


def build(root: Path, kind: str = "counts", *, reset: bool = False) -> Cache:
    packing = {"separator": 0, "reset_attention": reset}
    cache = Cache.create(root, identity(kind, packing=packing))
    cache.commit(records(kind, 0, WINDOWS), {})
    return cache


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def learnt(window: WindowRecord, position: int, *, reset: bool) -> bool:
    """Whether a position that has a next token in the window predicts it."""
    if reset and position + 1 in window.document_starts:
        return False
    return window.mask is None or bool(window.mask[position])


def entries(window: WindowRecord, position: int) -> dict[int, float]:
    own = window.targets[position : position + 1]
    return dict(zip(own.ids.tolist(), own.weights.tolist(), strict=True))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_weights_are_targets_mixed_with_the_true_token(alpha, reset, tmp_path):
    cache = build(tmp_path / "c", reset=reset)
    export(cache, tmp_path / "out", "weighted", alpha=alpha)
    rows = rows_of(tmp_path / "out")
    assert [row["window_index"] for row in rows] == list(range(WINDOWS))
    for number, row in enumerate(rows):
        window = record("counts", number)
        assert row["input_tokens"] == window.tokens[:-1].tolist()
        widths = {len(part) for part in (*row["target_tokens"], *row["weights"])}
        assert len(widths) == 1, "a trainer takes (N, K)"
        for position in range(LENGTH - 1):
            found: dict[int, float] = {}
            pairs = zip(row["target_tokens"][position], row["weights"][position], strict=True)
            for token, weight in pairs:
                found[token] = found.get(token, 0.0) + weight
            expected: dict[int, float] = {}
            if learnt(window, position, reset=reset):
                expected = {i: (1 - alpha) * w for i, w in entries(window, position).items()}
                true = int(window.tokens[position + 1])
                expected[true] = expected.get(true, 0.0) + alpha
            expected = {i: w for i, w in expected.items() if w}
            found = {i: w for i, w in found.items() if w}
            assert found == pytest.approx(expected, rel=1e-6)


def test_weighted_cross_entropy_is_the_loss(tmp_path):
    """-sum w log p over the exported tensors is the loss of this library, summed."""
    export(build(tmp_path / "c"), tmp_path / "out", "weighted", alpha=0.3)
    for number, row in enumerate(rows_of(tmp_path / "out")):
        window = record("counts", number)
        logits = torch.randn(LENGTH, V, generator=torch.Generator().manual_seed(number)).double()
        labels = torch.from_numpy(np.append(window.tokens[1:], -100).astype(np.int64))
        labels[torch.from_numpy(~window.present())] = -100
        ids, weights = window.targets.padded()
        options: dict[str, Any] = {"alpha": 0.3, "reduction": "sum"}
        expected = sparse_cross_entropy(logits, ids, weights, labels=labels, **options)
        logs = logits[:-1].log_softmax(-1)
        picked = logs.gather(1, torch.tensor(row["target_tokens"]))
        found = -(picked * torch.tensor(row["weights"]).double()).sum()
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def numbers_of(data: list[int], bits: int, count: int) -> list[int]:
    """Whole numbers of so many bits, most significant first."""
    text = "".join(format(byte, "08b") for byte in data)
    return [int(text[bits * i : bits * (i + 1)], 2) for i in range(count)]


def test_distillkit_reads_the_heaviest_entries(tmp_path):
    k = 6
    packing = {"separator": 0}
    cache = Cache.create(tmp_path / "c", identity("float32", packing=packing))
    plain = [own for own in records("float32", 0, 12) if own.mask is None]
    windows = [replace(own, window_index=i) for i, own in enumerate(plain)]
    cache.commit(windows, {})
    *_, settings = export(cache, tmp_path / "out", "distillkit", k=k)
    values = yaml.safe_load(settings.read_text())
    assert (values["d"], values["k"], values["exact_k"]) == (V, k, k)
    bits = math.ceil(math.log2(V))
    for window, row in zip(windows, rows_of(tmp_path / "out"), strict=True):
        assert row["input_ids"] == window.tokens[:-1].tolist()
        assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == LENGTH - 1
        for position in range(LENGTH - 1):
            ids = numbers_of(row["bytepacked_indices"][position], bits, k)
            logs = np.frombuffer(bytes(row["compressed_logprobs"][position]), "<f4")
            assert (np.diff(logs) <= 0).all()
            assert len(set(ids)) == k
            best = sorted(entries(window, position).items(), key=lambda item: -item[1])[:k]
            found = dict(zip(ids, np.exp(logs.astype(np.float64)), strict=True))
            assert {i: w for i, w in found.items() if w > 0} == pytest.approx(dict(best), rel=1e-5)


def test_an_export_for_distillkit_is_imported_as_it_was(cache, tmp_path, tokenizer):
    """Sampled entries, fewer than k at most positions: padding has no probability."""
    opened = Cache.open(cache)
    export(opened, tmp_path / "out", "distillkit", k=20)
    options: dict[str, Any] = {"vocab_size": PADDED_VOCABULARY, "exact_weights": True}
    again = import_collected(str(tmp_path / "out"), tokenizer, tmp_path / "c", **options).cache
    assert len(again) == len(opened)
    for number in range(len(opened)):
        before, after = opened.read(number), again.read(number)
        assert np.array_equal(before.tokens[:-1], after.tokens)
        dense = [before.targets[:-1].dense(), after.targets.dense()]
        assert torch.allclose(*dense, rtol=1e-5, atol=1e-12)


def test_distillkit_has_no_place_for_masked_positions(tmp_path):
    with pytest.raises(InvalidArgumentError, match="window 2 has positions without a target"):
        export(build(tmp_path / "c"), tmp_path / "out", "distillkit", k=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reset", [False, True])
def test_axolotl_reads_the_targets_of_the_token_that_a_position_predicts(reset, tmp_path):
    """As the section "Target alignment" of the README of Axolotl's KD plugin defines it."""
    k = 30
    cache = build(tmp_path / "c", reset=reset)
    export(cache, tmp_path / "out", "axolotl", k=k)
    for number, row in enumerate(rows_of(tmp_path / "out")):
        window = record("counts", number)
        assert row["input_ids"] == window.tokens.tolist()
        assert row["attention_mask"] == [1] * LENGTH
        assert row["labels"][0] == -100
        assert row["target_mask"][-1] == [0] * k
        starts = {0, *window.document_starts.tolist()} if reset else {0}
        since = [max(s for s in starts if s <= j) for j in range(LENGTH)]
        assert row["position_ids"] == [j - s for j, s in enumerate(since)]
        for position in range(LENGTH - 1):
            used = learnt(window, position, reset=reset)
            true = int(window.tokens[position + 1])
            assert row["labels"][position + 1] == (true if used else -100)
            assert len(set(row["target_token_ids"][position])) == k
            expected = entries(window, position) if used else {}
            assert likely(row, position) == pytest.approx(expected, rel=1e-5)


def likely(row: dict[str, Any], position: int) -> dict[int, float]:
    """Probability of each id that the target mask of a position includes."""
    columns = ("target_token_ids", "target_logprobs", "target_mask")
    triples = zip(*(row[name][position] for name in columns), strict=True)
    return {i: math.exp(x) for i, x, kept in triples if kept}


def test_axolotl_reads_probabilities_that_sum_to_one_over_the_list(tmp_path):
    """As its own loader writes them; others would give its KL divergence a minimum below 0."""
    cache = Cache.create(tmp_path / "c", identity("float32"))
    cache.commit(records("float32", 0, WINDOWS), {})
    export(cache, tmp_path / "out", "axolotl", k=3)
    for number, row in enumerate(rows_of(tmp_path / "out")):
        window = record("float32", number)
        for position in range(LENGTH - 1):
            if not learnt(window, position, reset=False):
                continue
            heaviest = sorted(entries(window, position).items(), key=lambda item: -item[1])[:3]
            mass = sum(weight for _, weight in heaviest)
            expected = {i: weight / mass for i, weight in heaviest}
            assert likely(row, position) == pytest.approx(expected, rel=1e-5)


def test_a_file_that_does_not_fit_is_an_error_of_the_storage(tmp_path):
    """`datasets` hides the error when it writes the rows again as Arrow, without compression."""
    cache = build(tmp_path / "c")
    (lists,) = export(cache, tmp_path / "lists", "lists")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (lists.stat().st_size, before[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            export(cache, tmp_path / "out", "datasets")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "lists"}


@pytest.mark.parametrize("form", ["lists", "topk", "weighted"])
def test_rows_say_where_attention_restarts(form, tmp_path):
    for reset in (False, True):
        export(build(tmp_path / f"c{reset}", reset=reset), tmp_path / f"{form}{reset}", form)
    assert all("document_starts" not in row for row in rows_of(tmp_path / f"{form}False"))
    for number, row in enumerate(rows_of(tmp_path / f"{form}True")):
        assert row["document_starts"] == record("counts", number).document_starts.tolist()


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("weighted", {"alpha": 1.5}, "alpha from 0 to 1"),
        ("weighted", {"alpha": math.nan}, "alpha from 0 to 1"),
        ("axolotl", {"k": V + 1}, "cannot export 1001 different ids"),
        ("topk", {"k": 0}, "k of at least 1"),
        ("weighted", {"k": 8}, "which has all entries of a position"),
        ("lists", {"k": 50}, "which has all entries of a position"),
        ("axolotl", {"alpha": 0.1}, "targets are those of the teacher alone"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(form, options, message, tmp_path):
    cache = build(tmp_path / "c")
    with pytest.raises(InvalidArgumentError, match=message):
        export(cache, tmp_path / "out", form, **options)
