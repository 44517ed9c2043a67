"""Several teachers as one: exact expectations, weights per window, and what is refused."""

import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sparselogits import CacheDataset, SparseTargets, decode
from sparselogits.data import WindowRequest, collate, rounds_for_entries
from sparselogits.data.mixture import divided
from sparselogits.errors import (
    CacheCorruptionError,
    IdentityMismatchError,
    InvalidArgumentError,
    InvalidTargetsError,
    SparseLogitsError,
)
from sparselogits.identity import Identity
from sparselogits.samplers import Sampler, Systematic, TopK, window_uniforms
from sparselogits.store import Cache, WindowRecord, codec_for
from sparselogits.store.texts import TextSpan, claim_text

LENGTH, VOCABULARY, WINDOWS, ROUNDS = 6, 9, 4, 12
TEXTS = (TextSpan("a" * 64, 0, 3), TextSpan("b" * 64, 3, 1))


def distributions(teacher: int, window: int) -> torch.Tensor:
    """float64 [L, V]; some ids have no probability."""
    rng = np.random.default_rng([teacher, window])
    p = rng.dirichlet(np.full(VOCABULARY, 0.6), LENGTH)
    p[:, teacher] = 0
    return torch.from_numpy(p / p.sum(1, keepdims=True))


def text(window: int) -> np.ndarray:
    return np.random.default_rng([99, window]).integers(0, VOCABULARY, LENGTH).astype(np.int32)


def loss(teacher: int, window: int) -> float:
    return 2.0 + (teacher == window % 3)


def make_cache(
    root: Path,
    number: int,
    *,
    sampler: Sampler | None = None,
    uniforms: Callable[[int], torch.Tensor] | None = None,
    windows: int = WINDOWS,
    change: Callable[[WindowRecord], WindowRecord] = lambda record: record,
    provenance: dict[str, Any] | None = None,
    vocab_size: int = VOCABULARY,
    length: int = LENGTH,
    **identity: Any,
) -> Path:
    """Write the cache of a teacher whose distributions are known."""
    sampler = Systematic(ROUNDS) if sampler is None else sampler
    settings: dict[str, Any] = {
        "teacher": {"name": f"teacher {number}", "weights": str(number) * 64, "dtype": "float32"},
        "tokenizer": "1" * 64,
        "vocab_size": vocab_size,
        "token_mask": "all",
        "window_length": length,
        "windows_per_shard": 3,
        "packing": {"separator_id": 0, "reset_attention": False},
        "sampler": {"name": sampler.name, **sampler.parameters()},
        "seed": number,
        "temperature": 1.0,
        "codec": codec_for(sampler),
    }
    cache = Cache.create(root, Identity(**(settings | identity)))
    for span in TEXTS:
        claim_text(cache.storage, span)
    for first in range(0, windows, 3):
        records = []
        for window in range(first, min(first + 3, windows)):
            logits = torch.full((LENGTH, vocab_size), -torch.inf, dtype=torch.float64)
            logits[:, :VOCABULARY] = distributions(number, window).log()
            own = window_uniforms(number, window, LENGTH, sampler.uniforms_per_position)
            targets = sampler(logits, own if uniforms is None else uniforms(window))
            made = WindowRecord(
                window,
                text(window)[:length],
                np.array([0], np.int32),
                None,
                targets[:length],
                loss(number, window),
                0.5 * number,
            )
            records.append(change(made))
        cache.commit(records, provenance or {})
    return root


@pytest.fixture
def three(tmp_path) -> list[Path]:
    return [make_cache(tmp_path / name, teacher) for teacher, name in enumerate("abc")]


# -- the sum of targets ----------------------------------------------------------------------------


@st.composite
def ragged(draw: st.DrawFn) -> tuple[list[SparseTargets], list[float]]:
    """One to four targets of up to five positions, over vocabularies of different sizes."""
    positions = draw(st.integers(1, 5))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        vocabulary = draw(st.integers(3, 8))
        rounds = draw(st.integers(1, 6))
        drawn = draw(st.booleans())
        ids, counts, lengths = [], [], []
        for _ in range(positions):
            picked = draw(
                st.lists(st.integers(0, vocabulary - 1), min_size=rounds, max_size=rounds)
            )
            found, times = np.unique(picked, return_counts=True)
            ids += found.tolist()
            counts += times.tolist()
            lengths.append(len(found))
        parts.append(
            SparseTargets(
                torch.tensor(ids),
                torch.tensor(counts).float() / rounds,
                torch.tensor([0, *itertools.accumulate(lengths)]),
                vocabulary,
                counts=torch.tensor(counts, dtype=torch.int32) if drawn else None,
                rounds=rounds if drawn else None,
            )
        )
    weights = draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=len(parts), max_size=len(parts))
    )
    return parts, weights if any(weights) else [1.0] * len(parts)


@given(ragged())
@settings(max_examples=60)
def test_a_sum_of_targets_is_the_sum_of_their_dense_forms(given):
    parts, weights = given
    mixed = SparseTargets.mixed(parts, weights)
    mixed.__post_init__(True)  # ascending ids, counts that sum to the rounds, sizes
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    assert mixed.vocab_size == max(part.vocab_size for part, _ in used)
    expected = torch.zeros(len(mixed), mixed.vocab_size)
    for part, weight in used:
        expected[:, : part.vocab_size] += weight * part.dense()
    torch.testing.assert_close(mixed.dense(), expected, rtol=1e-6, atol=1e-7)
    if all(part.rounds is not None for part, _ in used):
        assert mixed.rounds == sum(part.rounds for part, _ in used)
    else:
        assert mixed.counts is None


def test_parts_that_do_not_fit_are_refused():
    one = SparseTargets(torch.tensor([1]), torch.ones(1), torch.tensor([0, 1]), 4)
    two = SparseTargets.cat([one, one])
    for parts, weights in (([one, two], [0.5, 0.5]), ([one], [0.0]), ([], [])):
        with pytest.raises(InvalidTargetsError, match="same number of positions"):
            SparseTargets.mixed(parts, weights)


@given(
    rounds=st.integers(2, 14),
    shares=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    held=st.lists(st.integers(1, 9), min_size=3, max_size=3),
)
@settings(max_examples=80)
def test_rounds_are_divided_with_the_least_variance(rounds, shares, held):
    """Compared with every other division."""
    rounds, held = max(rounds, len(shares)), held[: len(shares)]
    weights = tuple(share / sum(shares) for share in shares)
    found = divided(rounds, weights, tuple(held))
    kept = min(rounds, sum(held))
    choices = itertools.product(*(range(1, most + 1) for most in held))

    def variance(division: Sequence[int]) -> float:
        return sum(w * w / n for w, n in zip(weights, division, strict=True))

    assert sum(found) == kept
    assert divided(rounds, (1.0,), (held[0],)) == (min(rounds, held[0]),)
    best = min(variance(c) for c in choices if sum(c) == kept)
    assert variance(found) == pytest.approx(best, rel=1e-12)


# -- expectation -----------------------------------------------------------------------------------

GRID = 4


def on_the_grid(teacher: int) -> torch.Tensor:
    """float64 [L, V], multiples of 1 / (ROUNDS * GRID).

    A systematic draw changes only where some ROUNDS * C_i + u is an integer, so GRID uniforms in
    the middle between these points stand for all uniforms.
    """
    rng = np.random.default_rng([7, teacher])
    units = rng.multinomial(ROUNDS * GRID, rng.dirichlet(np.full(VOCABULARY, 0.7)), LENGTH)
    return torch.from_numpy(units / (ROUNDS * GRID))


@pytest.mark.parametrize(
    ("weights", "rounds"),
    [((0.5, 0.5), None), ((0.75, 0.25), None), ((0.5, 0.5), 8), ((0.75, 0.25), 8), ((0.6, 0.4), 5)],
)
def test_the_expectation_is_the_mixture(tmp_path, monkeypatch, weights, rounds):
    """Exactly: over all uniforms of both draws, and over all choices of thinned rounds."""
    monkeypatch.setattr(f"{__name__}.distributions", lambda teacher, _: on_the_grid(teacher))
    draws: list[list[Path]] = []
    for teacher in range(2):
        draws.append([])
        for step in range(GRID):
            u = torch.full((LENGTH, 1), (step + 0.5) / GRID, dtype=torch.float64)
            draws[-1].append(
                make_cache(
                    tmp_path / f"{teacher}-{step}", teacher, uniforms=lambda _, u=u: u, windows=1
                )
            )
    kept = (ROUNDS, ROUNDS) if rounds is None else divided(rounds, weights, (ROUNDS, ROUNDS))
    cycle = np.lcm.reduce([ROUNDS // np.gcd(ROUNDS, n) for n in kept])
    total = torch.zeros(LENGTH, VOCABULARY, dtype=torch.float64)
    for first, second in itertools.product(*draws):
        dataset = CacheDataset([first, second], weights=weights, seed=3)
        for epoch in range(cycle):
            found = dataset[WindowRequest(0, epoch, rounds)]["targets"]
            assert found.rounds == sum(kept)
            found.__post_init__(True)
            total += found.dense().double()
    mean = total / (GRID * GRID * int(cycle))
    expected = weights[0] * on_the_grid(0) + weights[1] * on_the_grid(1)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)


def test_a_mixture_of_draws_can_be_thinned_like_one_draw(three):
    """All starts together are the mixture, although entries weigh different amounts per round."""
    targets = CacheDataset(three, weights=[0.2, 0.3, 0.5])[1]["targets"]
    assert targets.rounds == 3 * ROUNDS
    thinned = [targets.thin(9, start).dense() for start in range(4)]
    torch.testing.assert_close(torch.stack(thinned).mean(0), targets.dense())


def test_equal_teachers_of_one_seed_keep_different_rounds(tmp_path):
    """Half of the rounds of each of two equal draws are together the whole draw."""
    u = torch.full((LENGTH, 1), 0.3, dtype=torch.float64)
    same = {"uniforms": lambda _: u, "seed": 0}
    one = make_cache(tmp_path / "a", 1, **same)
    two = make_cache(tmp_path / "b", 1, **same, teacher={"name": "copy", "weights": "9" * 64})
    dataset = CacheDataset([one, two], weights=[0.5, 0.5])
    for epoch in range(3):
        found = dataset[WindowRequest(2, epoch, ROUNDS)]["targets"]
        torch.testing.assert_close(found.dense(), dataset[2]["targets"].dense())


# -- weights ---------------------------------------------------------------------------------------


def sum_of(paths: Sequence[Path], weights: Sequence[float], i: int) -> torch.Tensor:
    parts = [CacheDataset(path)[i]["targets"].dense() for path in paths]
    return sum(w * part for w, part in zip(weights, parts, strict=True))


def test_weights_are_per_cache_per_text_or_per_window(three):
    by_text = [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]]
    by_window = np.random.default_rng(0).dirichlet(np.ones(3), WINDOWS)
    for weights, expected in (
        (None, [[1 / 3] * 3] * WINDOWS),
        ([0.2, 0.8, 0.0], [[0.2, 0.8, 0.0]] * WINDOWS),
        (by_text, [by_text[0]] * 3 + [by_text[1]]),
        (by_window, by_window.tolist()),
    ):
        dataset = CacheDataset(three, weights=weights)
        for i in range(WINDOWS):
            item = dataset[i]
            torch.testing.assert_close(item["targets"].dense(), sum_of(three, expected[i], i))
            entropy = sum(w * 0.5 * teacher for teacher, w in enumerate(expected[i]))
            assert float(item["teacher_entropy"]) == pytest.approx(entropy)
            assert item["input_ids"].tolist() == text(i).tolist()


def test_the_best_teacher_of_a_window_is_the_only_one(three):
    dataset = CacheDataset(three, weights="best")
    assert dataset.teachers_per_window == 1
    assert dataset.rounds == ROUNDS
    for i in range(WINDOWS):
        best = min(range(3), key=lambda teacher: loss(teacher, i))
        alone, mixed = CacheDataset(three[best])[i], dataset[i]
        assert torch.equal(mixed["targets"].weights, alone["targets"].weights)
        assert torch.equal(mixed["targets"].ids, alone["targets"].ids)
        assert float(mixed["teacher_entropy"]) == 0.5 * best


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5, 0.6, 0.1], "sum is 1, found .*with the sum 1.2"),
        ([1.5, -0.5, 0.0], "non-negative numbers"),
        ([float("nan"), 0.5, 0.5], "non-negative numbers"),
        ([float("inf"), 0.0, 0.0], "non-negative numbers"),
        ([0.5, 0.5], r"shape \(2,\), but there are 3 caches"),
        ([[1.0, 0.0]], r"shape \(1, 2\), but there are 3 caches"),
        ([[1.0, 0.0, 0.0]] * 3, "3 rows; give 2 rows, one per text .*, or 4 rows, one per window"),
        ([[1.0, 0.0, 0.0], [1.0]], "rows of equal length"),
        (["a", "b", "c"], "give one number per cache"),
        ("worst", "unknown weights 'worst'"),
        ([], r"shape \(0,\)"),
    ],
)
def test_weights_that_are_no_shares_are_refused(three, weights, said):
    with pytest.raises(InvalidArgumentError, match=said):
        CacheDataset(three, weights=weights)


def test_a_mixture_of_one_is_the_cache(three):
    alone, listed = CacheDataset(three[0]), CacheDataset([three[0]], weights=[1.0])
    assert listed.identity == alone.identity
    assert torch.equal(listed[1]["targets"].weights, alone[1]["targets"].weights)
    with pytest.raises(InvalidArgumentError, match="list of caches is empty"):
        CacheDataset([])


def test_a_mixture_knows_caches_and_weights_by_its_fingerprint(three):
    def fingerprint(paths: list[Path], weights: Any) -> str:
        return CacheDataset(paths, weights=weights).identity.fingerprint

    found = [
        fingerprint(three, None),
        fingerprint(three, "best"),
        fingerprint(three, [0.5, 0.25, 0.25]),
        fingerprint(three, [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]),
        fingerprint(three[:2], None),
        CacheDataset(three[0]).identity.fingerprint,
    ]
    assert len(set(found)) == len(found)
    assert fingerprint(three, [0.5, 0.25, 0.25]) == found[2]
    dataset = CacheDataset(three[:2], weights=[0.25, 0.75])
    assert "teacher 0.25 x teacher 0, 0.75 x teacher 1 (float32))" in repr(dataset)


# -- rounds ----------------------------------------------------------------------------------------


def test_a_mixture_keeps_the_rounds_it_is_asked_for(three):
    dataset = CacheDataset(three, weights=[0.5, 0.25, 0.25])
    assert dataset.rounds == 3 * ROUNDS
    for rounds in (3, 4, 13, 36, 50):
        assert dataset[WindowRequest(0, 0, rounds)]["targets"].rounds == min(rounds, 36)
    with pytest.raises(InvalidArgumentError, match="use at least 3 rounds"):
        dataset[WindowRequest(0, 0, 2)]
    budget = rounds_for_entries(dataset, 4.0)
    assert 4 <= budget < 36
    assert rounds_for_entries(dataset, 1.0) == 3


def test_a_mixture_with_a_truncated_cache_cannot_be_thinned(tmp_path):
    caches = [make_cache(tmp_path / f"{t}", t, sampler=TopK(3)) for t in range(2)]
    dataset = CacheDataset(caches)
    assert not dataset.unbiased
    assert dataset.rounds is None
    torch.testing.assert_close(dataset[0]["targets"].dense(), sum_of(caches, [0.5, 0.5], 0))


def test_workers_read_a_mixture_as_the_main_process_does(three):
    dataset = CacheDataset(three, weights=[0.5, 0.25, 0.25])
    requests = [WindowRequest(i, 1, 8) for i in range(WINDOWS)]
    expected = collate([dataset[r] for r in requests])
    again = pickle.loads(pickle.dumps(dataset))
    for batches in (
        DataLoader(again, sampler=requests, batch_size=4, collate_fn=collate, num_workers=2),
        [collate([again[r] for r in requests])],
    ):
        for batch in batches:
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in expected)


# -- what does not fit -----------------------------------------------------------------------------


def other_text(record: WindowRecord) -> WindowRecord:
    return replace(record, tokens=(record.tokens + 1).astype(np.int32) % VOCABULARY)


def other_mask(record: WindowRecord) -> WindowRecord:
    targets = SparseTargets.cat(
        [
            record.targets[: LENGTH - 1],
            SparseTargets(
                torch.empty(0, dtype=torch.int64),
                torch.empty(0),
                torch.tensor([0, 0]),
                VOCABULARY,
                counts=torch.empty(0, dtype=torch.int32),
                rounds=ROUNDS,
            ),
        ]
    )
    return replace(record, mask=np.arange(LENGTH) < LENGTH - 1, targets=targets)


def other_documents(record: WindowRecord) -> WindowRecord:
    return replace(record, document_starts=np.array([2], np.int32))


OTHER = {"tokenizer": "2" * 64}
RECORDED = {"ids": "5" * 64, "added": {"8": "<end>"}, "roles": {"eos": "<end>"}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 5}, "window_length is 6 in .*a and 5 in .*b"),
        ({"temperature": 2.0}, "temperature is 1.0 in .* and 2.0"),
        ({"packing": {"separator_id": 1, "reset_attention": False}}, "packing.separator_id is 0"),
        ({"sampler": TopK(3)}, "unbiased is True in .* and False"),
        ({"windows": 3}, "has the windows 0 to 3, but .*b has 0 to 2"),
        ({"change": other_text}, "window 0 differs in its text between .*a and .*b"),
        ({"change": other_mask}, "window 0 differs in its loss mask"),
        ({"change": other_documents}, "window 0 differs in its documents"),
        ({"tokenizer": "2" * 64}, "cache at .*b .*is not the tokenizer of the cache at .*a"),
        (
            {"tokenizer": "2" * 64, "provenance": {"tokenizer": RECORDED | {"ids": "6" * 64}}},
            "its ids mean other tokens",
        ),
        (
            OTHER | {"provenance": {"tokenizer": RECORDED | {"added": {"8": "<stop>"}}}},
            "id 8 is '<stop>' here and '<end>' in the cache",
        ),
        (OTHER | {"provenance": {"tokenizer": {"ids": 3, "added": 4, "roles": 5}}}, "mean other"),
    ],
)
def test_caches_that_do_not_fit_are_refused_by_name(tmp_path, options, said):
    first = make_cache(tmp_path / "a", 0, provenance={"tokenizer": RECORDED})
    second = make_cache(tmp_path / "b", 1, **options)
    with pytest.raises(IdentityMismatchError, match=said):
        CacheDataset([first, second])


@pytest.mark.parametrize("added", [RECORDED["added"], "7" * 64])
def test_tokenizers_that_differ_in_nothing_but_their_files_fit(tmp_path, added):
    """Thousands of added tokens are recorded as a hash."""
    told = {"tokenizer": RECORDED | {"added": added}}
    first = make_cache(tmp_path / "a", 0, provenance=told)
    second = make_cache(tmp_path / "b", 1, provenance=told, tokenizer="2" * 64)
    assert len(CacheDataset([first, second])) == WINDOWS


def test_heads_with_other_padding_fit(tmp_path):
    first = make_cache(tmp_path / "a", 0)
    second = make_cache(tmp_path / "b", 1, vocab_size=VOCABULARY + 3)
    dataset = CacheDataset([first, second])
    assert dataset.identity.vocab_size == VOCABULARY + 3
    assert dataset[0]["targets"].dense().shape == (LENGTH, VOCABULARY + 3)


def test_a_cache_named_twice_is_refused(three, tmp_path):
    copy = make_cache(tmp_path / "copy", 0)
    for other in (three[0], copy):
        with pytest.raises(InvalidArgumentError, match=r"contain the same targets.*--seed"):
            CacheDataset([three[0], three[1], other])
    again = make_cache(tmp_path / "again", 0, seed=5)  # another draw of the same teacher
    assert CacheDataset([three[0], again]).teachers_per_window == 2


def test_caches_of_one_identity_and_other_text_are_refused_for_their_text(three, tmp_path):
    other = make_cache(tmp_path / "other", 0, change=other_text)
    with pytest.raises(IdentityMismatchError, match="window 0 differs in its text"):
        CacheDataset([three[0], other])


def test_text_that_differs_in_one_window_is_found_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("sparselogits.data.mixture._COMPARED_WINDOWS", 1)

    def change(record: WindowRecord) -> WindowRecord:
        return other_text(record) if record.window_index == 1 else record

    caches = [make_cache(tmp_path / "a", 0), make_cache(tmp_path / "b", 1, change=change)]
    dataset = CacheDataset(caches)
    assert dataset[0]["input_ids"].tolist() == text(0).tolist()
    with pytest.raises(IdentityMismatchError, match="window 1 differs in its text"):
        dataset[1]


def test_a_damaged_cache_is_named(three):
    shard = next((three[1] / "shards").glob("windows-000000000003-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(CacheCorruptionError, match=shard.name):
        CacheDataset(three)[3]
    (three[2] / "cache.json").write_text("{}")
    with pytest.raises(SparseLogitsError, match=str(three[2])):
        CacheDataset(three)


def test_rows_of_a_mixture_are_decoded_one_cache_at_a_time(three):
    with pytest.raises(InvalidArgumentError, match="open one of them"):
        decode({"window_index": 0}, CacheDataset(three))
