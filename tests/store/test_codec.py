"""Test the codec on targets of samplers, extreme shapes, and random sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselogits.errors import CacheError, InvalidTargetsError
from sparselogits.samplers import (
    Multinomial,
    Sampler,
    Systematic,
    Threshold,
    TopK,
    TopP,
    Uniform,
    window_uniforms,
)
from sparselogits.store import codec_for
from sparselogits.store.bounds import DamageError
from sparselogits.store.codec import BlockDecoder, TargetCodec, TargetWindow
from sparselogits.store.codec.columns import ColumnDecoder, encode_column
from sparselogits.targets import SparseTargets

SAMPLERS: list[tuple[Sampler, str]] = [
    (Systematic(21), "counts"),
    (Systematic(1), "counts"),
    (Systematic(50, proposal_exponent=0.8), "counts+float32"),
    (Multinomial(7), "counts"),
    (Multinomial(50), "counts"),
    (Uniform(9), "counts+float32"),
    (TopK(12), "float32"),
    (TopP(0.9, 40), "float32"),
    (Threshold(0.05), "threshold"),
]


def require_round_trip(codec: TargetCodec, windows: list[TargetWindow]) -> None:
    tables, blocks = codec.encode(windows)
    decoder = BlockDecoder(codec, tables)
    for i, window in enumerate(windows):
        found = decoder.decode(i, blocks[i], window.tokens, window.present)
        require_same(found, window.targets)
    if len({len(window.tokens) for window in windows}) == 1:
        tokens, present = (
            np.stack([getattr(w, n) for w in windows]) for n in ("tokens", "present")
        )
        together = decoder.decode_run(0, blocks, tokens, present)
        require_same(together, SparseTargets.cat([window.targets for window in windows]))


def require_same(found: SparseTargets, expected: SparseTargets) -> None:
    for part in ("ids", "weights", "offsets", "counts"):
        a, b = getattr(found, part), getattr(expected, part)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b), part
            assert a.dtype == b.dtype


@pytest.mark.parametrize(("sampler", "weights"), SAMPLERS, ids=lambda v: str(v))
@pytest.mark.parametrize("scale", [0.2, 2.0, 30.0])  # near-uniform to one-hot teachers
def test_what_samplers_draw_comes_back(sampler, weights, scale):
    V, L = 700, 40
    generator = torch.Generator().manual_seed(3)
    windows = []
    for index in range(3):
        logits = scale * torch.randn(L, V, generator=generator)
        logits[:, 600:] = -torch.inf
        uniforms = window_uniforms(0, index, L, sampler.uniforms_per_position)
        tokens = torch.randint(0, 600, (L,), generator=generator).to(torch.int32).numpy()
        windows.append(TargetWindow(sampler(logits, uniforms), tokens, np.ones(L, np.bool_)))
    tau = sampler.stores.tau
    identity = codec_for(sampler, exact_weights=True)
    assert identity == {"name": "inverted-lists", "version": 1} | {
        key: value
        for key, value in (("weights", weights), ("rounds", sampler.rounds), ("tau", tau))
        if value is not None
    }
    require_round_trip(TargetCodec.from_identity(identity, V), windows)
    identity = codec_for(sampler)
    assert identity["version"] == (1 if weights == "counts" else 2)
    codec = TargetCodec.from_identity(identity, V)
    rounded = [replace(w, targets=codec.rounded(w.targets, 0, i)) for i, w in enumerate(windows)]
    require_round_trip(codec, rounded)


def sets(rows: list[dict[int, int]], vocab_size: int, rounds: int) -> SparseTargets:
    """Targets of given counts."""
    ids = [i for row in rows for i in sorted(row)]
    counts = np.array([row[i] for row in rows for i in sorted(row)], np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return SparseTargets(
        torch.tensor(ids, dtype=torch.int64),
        torch.from_numpy(counts.astype(np.float32) / np.float32(rounds)),
        torch.from_numpy(offsets.astype(np.int64)),
        vocab_size,
        counts=torch.from_numpy(counts),
        rounds=rounds,
    )


@st.composite
def window(draw: st.DrawFn, vocab_size: int, rounds: int) -> TargetWindow:
    L = draw(st.integers(1, 12))
    ids = st.integers(0, vocab_size - 1)
    tokens = np.array(draw(st.lists(ids, min_size=L, max_size=L)), np.int32)
    present = np.array(draw(st.lists(st.booleans(), min_size=L, max_size=L)))
    rows = []
    for carrying in present:
        row: dict[int, int] = {}
        for i in draw(st.lists(ids, min_size=rounds, max_size=rounds)) if carrying else []:
            row[i] = row.get(i, 0) + 1
        rows.append(row)
    return TargetWindow(sets(rows, vocab_size, rounds), tokens, present)


@settings(max_examples=150)
@given(st.data())
def test_any_sets_come_back(data):
    V, rounds = data.draw(st.sampled_from([1, 2, 6, 131072, 262144])), data.draw(st.integers(1, 6))
    windows = data.draw(st.lists(window(V, rounds), min_size=1, max_size=3))
    require_round_trip(TargetCodec("counts", V, rounds), windows)


def test_long_windows_over_large_vocabularies():
    """Position and id no longer fit 32 bits together."""
    L, V, rounds = 20000, 262144, 3
    generator = np.random.default_rng(0)
    ids = generator.choice(V, (L, rounds), replace=True)
    rows = []
    for row in ids.tolist():
        rows.append({i: row.count(i) for i in row})
    tokens = generator.integers(0, V, L).astype(np.int32)
    whole = TargetWindow(sets(rows, V, rounds), tokens, np.ones(L, np.bool_))
    require_round_trip(TargetCodec("counts", V, rounds), [whole])


def test_a_block_for_other_tokens_is_not_read_as_sound():
    """Tokens are part of what a block depends on; the row's checksum keeps them together."""
    rows = [{1: 2, 5: 1}, {0: 3}, {2: 1, 3: 1, 4: 1}]
    codec, present = TargetCodec("counts", 6, 3), np.ones(3, np.bool_)
    tokens = np.array([1, 5, 0], np.int32)
    tables, blocks = codec.encode([TargetWindow(sets(rows, 6, 3), tokens, present)])
    decoder = BlockDecoder(codec, tables)
    with pytest.raises(DamageError):
        decoder.decode(0, blocks[0], tokens, np.array([True, True, False]))


def test_weights_that_are_not_counts_are_refused():
    target = sets([{1: 2, 5: 1}], 6, 3)
    off = SparseTargets(
        target.ids, target.weights * 1.01, target.offsets, 6, counts=target.counts, rounds=3
    )
    codec = TargetCodec("counts", 6, 3)
    one = np.ones(1, np.bool_)
    with pytest.raises(InvalidTargetsError, match="count / rounds"):
        codec.encode([TargetWindow(off, np.zeros(1, np.int32), one)])
    with pytest.raises(InvalidTargetsError, match="7 rounds"):
        TargetCodec("counts", 6, 7).encode([TargetWindow(target, np.zeros(1, np.int32), one)])


def test_an_unknown_codec_is_refused():
    with pytest.raises(CacheError, match="Install the version"):
        TargetCodec.from_identity({"name": "inverted-lists", "version": 3, "weights": "counts"}, 9)


@pytest.mark.parametrize("mode", range(1, 256))
def test_tables_of_another_mode_are_refused_before_pcodec_sees_them(mode):
    (_, table), *_ = encode_column([np.arange(9, dtype=np.uint32)]).tables
    ColumnDecoder(np.uint32, [(0, table)])
    with pytest.raises(DamageError, match=f"begins with the byte {mode:#04x}, expected 0x00"):
        ColumnDecoder(np.uint32, [(0, bytes([mode]) + table[1:])])
