"""Targets for a draft vocabulary: exact expectations, files of other tools, and what is refused."""

import itertools
import json
import os
import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparselogits import CacheDataset, SparseTargets
from sparselogits.allowances import allowing
from sparselogits.data import DraftVocabulary, WindowRequest, collate, teacher_mass
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.samplers import Multinomial, Systematic, TopK
from sparselogits.store import Cache
from tests.conftest import tiny_llama
from tests.data.test_mixture import (
    GRID,
    LENGTH,
    ROUNDS,
    VOCABULARY,
    WINDOWS,
    make_cache,
    on_the_grid,
    ragged,
    text,
)
from tests.store.draws import identity, record

DRAFT = DraftVocabulary(torch.tensor([1, 3, 4, 8]), VOCABULARY)


def summed(p: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Return the probabilities of the ids and of the rest, one id at a time."""
    columns = [p[:, i] for i in ids]
    return torch.stack([*columns, sum(p[:, i] for i in range(p.shape[1]) if i not in ids)], 1)


@given(ragged(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_an_image_is_the_product_with_the_matrix_of_the_map(given, random) -> None:
    for targets in given[0]:
        size = random.randint(1, targets.vocab_size)
        image = torch.tensor([random.randrange(size) for _ in range(targets.vocab_size)])
        found = targets.mapped(image, size)
        found.__post_init__(True)  # ascending ids, counts that sum to the rounds
        matrix = torch.nn.functional.one_hot(image, size).float()
        torch.testing.assert_close(found.dense(), targets.dense() @ matrix)
        assert found.rounds == targets.rounds
        assert (found.counts is None) == (targets.counts is None)


@pytest.mark.parametrize("rounds", [None, 8, 5])
@pytest.mark.parametrize("first", ["thinned", "restricted"])
def test_the_expectation_is_the_restricted_distribution(
    tmp_path, monkeypatch, rounds, first
) -> None:
    """Exactly: over all uniforms of a systematic draw, and over all choices of thinned rounds."""
    monkeypatch.setattr("tests.data.test_mixture.distributions", lambda *_: on_the_grid(0))
    cycle = 1 if rounds is None else ROUNDS // np.gcd(ROUNDS, rounds)
    total = torch.zeros(LENGTH, len(DRAFT) + 1, dtype=torch.float64)
    for step in range(GRID):
        u = torch.full((LENGTH, 1), (step + 0.5) / GRID, dtype=torch.float64)
        root = make_cache(tmp_path / f"{step}", 0, uniforms=lambda _, u=u: u, windows=1)
        dataset = CacheDataset(root, draft=DRAFT, seed=3)
        for epoch in range(cycle):
            if first == "thinned" or rounds is None:
                found = dataset[WindowRequest(0, epoch, rounds)]["targets"]
            else:
                found = dataset[0]["targets"].thin(rounds, epoch)
            assert found.rounds == (rounds or ROUNDS)
            found.__post_init__(True)
            total += found.dense().double()
    expected = summed(on_the_grid(0), [1, 3, 4, 8])
    torch.testing.assert_close(total / (GRID * cycle), expected, rtol=0, atol=1e-6)


def test_the_expectation_of_independent_rounds_is_the_restricted_distribution() -> None:
    """Exactly: three rounds, each with ten uniforms that stand for all, in all combinations."""
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    tenths = [(step + 0.5) / 10 for step in range(10)]
    uniforms = torch.tensor(list(itertools.product(tenths, repeat=3)), dtype=torch.float64)
    targets = Multinomial(3)(p.log().expand(len(uniforms), -1), uniforms)
    found = DraftVocabulary(torch.tensor([0, 2]), 4).restrict(targets)
    found.__post_init__(True)
    mean = found.dense().double().mean(0, keepdim=True)
    torch.testing.assert_close(mean, summed(p, [0, 2]), rtol=0, atol=1e-6)


def test_truncated_targets_keep_their_mass(tmp_path) -> None:
    root = make_cache(tmp_path / "top", 0, sampler=TopK(4))
    whole, restricted = CacheDataset(root), CacheDataset(root, draft=DRAFT)
    assert not restricted.unbiased
    for i in range(WINDOWS):
        expected = summed(whole[i]["targets"].dense(), [1, 3, 4, 8])
        torch.testing.assert_close(restricted[i]["targets"].dense(), expected)


def test_labels_are_restricted_and_inputs_are_not(tmp_path) -> None:
    dataset = CacheDataset(make_cache(tmp_path / "one", 0), draft=DRAFT)
    whole = CacheDataset(tmp_path / "one")
    for i in range(WINDOWS):
        item = dataset[i]
        assert item["input_ids"].tolist() == text(i).tolist()
        names = {-100: -100, 1: 0, 3: 1, 4: 2, 8: 3}
        labels = [names.get(label, 4) for label in whole[i]["shift_labels"].tolist()]
        assert item["shift_labels"].tolist() == labels
        assert "teacher_entropy" not in item  # it is that of the whole distribution
    batch = collate([dataset[i] for i in range(2)])
    assert int(batch["target_ids"].max()) <= 4
    torch.testing.assert_close(batch["target_weights"].sum(-1), torch.ones(2, LENGTH))


def test_the_identity_names_the_vocabulary(tmp_path) -> None:
    root = make_cache(tmp_path / "one", 0)
    turned = DraftVocabulary(DRAFT.ids.flip(0), VOCABULARY)
    assert turned != DRAFT
    assert DraftVocabulary(DRAFT.ids.clone(), VOCABULARY) == DRAFT
    datasets = [CacheDataset(root, draft=each) for each in (None, DRAFT, turned)]
    assert len({dataset.identity.fingerprint for dataset in datasets}) == 3
    assert datasets[1].identity.vocab_size == len(DRAFT) + 1
    assert pickle.loads(pickle.dumps(datasets[1])).draft == DRAFT


def test_ids_in_any_order_and_padding_rows_have_a_class() -> None:
    draft = DraftVocabulary(torch.tensor([5, 0]), 6)
    assert draft.classes_of(torch.tensor([0, 5, 1, 6, 99])).tolist() == [1, 0, 2, 2, 2]
    targets = SparseTargets(
        torch.tensor([0, 5, 7]), torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0, 3]), 8
    )
    assert draft.restrict(targets).dense().tolist() == [[0.25, 0.5, 0.25]]


def test_a_mixture_is_restricted_like_one_cache(tmp_path) -> None:
    roots = [make_cache(tmp_path / name, teacher) for teacher, name in enumerate("ab")]
    mixed = CacheDataset(roots, weights=[0.25, 0.75], draft=DRAFT)
    for i in range(WINDOWS):
        parts = [CacheDataset(root)[i]["targets"].dense() for root in roots]
        expected = summed(0.25 * parts[0] + 0.75 * parts[1], [1, 3, 4, 8])
        torch.testing.assert_close(mixed[i]["targets"].dense(), expected)


# -- the choice of ids -----------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=9),
    st.integers(1, 9),
    st.sets(st.integers(0, 8), max_size=3),
)
def test_the_most_frequent_ids_cover_the_most(frequencies, size, keep) -> None:
    keep = {i for i in keep if i < len(frequencies)}
    size = min(max(size, len(keep), 1), len(frequencies))
    found = DraftVocabulary.most_frequent(torch.tensor(frequencies), size, keep=sorted(keep))
    ids = found.ids.tolist()
    assert ids == sorted(ids)
    assert keep <= set(ids)
    choices = (c for c in itertools.combinations(range(len(frequencies)), size) if keep <= set(c))
    best = max(sum(frequencies[i] for i in choice) for choice in choices)
    assert sum(frequencies[i] for i in ids) == best
    if sum(frequencies):
        assert found.coverage(torch.tensor(frequencies)) == pytest.approx(best / sum(frequencies))


def test_ties_and_unused_ids_are_taken_from_the_smallest() -> None:
    found = DraftVocabulary.most_frequent(np.array([0, 0, 5, 0, 2, 2]), 4, keep=[3])
    assert found.ids.tolist() == [2, 3, 4, 5]
    assert DraftVocabulary.most_frequent(np.array([0, 0, 5, 0, 2, 2]), 5).ids.tolist() == [
        *(0, 1, 2),
        *(4, 5),
    ]


def test_the_mass_of_the_teacher_is_the_sum_of_the_targets(tmp_path) -> None:
    root = make_cache(tmp_path / "one", 0)
    dataset = CacheDataset(root)
    expected = sum(dataset[i]["targets"].dense().double().sum(0) for i in range(WINDOWS))
    torch.testing.assert_close(teacher_mass(Cache.open(root)), expected)
    middle = dataset[WINDOWS // 2]["targets"].dense().double().sum(0)
    torch.testing.assert_close(teacher_mass(Cache.open(root), windows=1), middle)


@pytest.mark.parametrize(
    ("size", "keep", "said"),
    [
        (0, [], "choose a size from 1 to 4"),
        (5, [], "choose a size from 1 to 4"),
        (1, [0, 2], "choose a size from 2 to 4"),
        (3, [4], "give ids of this vocabulary"),
        (3, [-1], "give ids of this vocabulary"),
        (3, [10**20], "give ids of this vocabulary"),  # larger than an int64
    ],
)
def test_impossible_choices_are_refused(size, keep, said) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        DraftVocabulary.most_frequent(torch.ones(4), size, keep=keep)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.tensor([1, 1]), "some occur twice"),
        (torch.tensor([1, 6]), "ids 1 to 6, but the teacher's vocabulary has 6 ids"),
        (torch.tensor([-1, 2]), "ids -1 to 2"),
        (torch.tensor([], dtype=torch.int64), "at least one id"),
        (torch.tensor([1.0]), "float32"),
        (torch.tensor([[1]]), r"shape \(1, 1\)"),
    ],
)
def test_ids_that_are_no_subset_are_refused(ids, said) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        DraftVocabulary(ids, 6)


def test_a_vocabulary_of_another_teacher_is_refused(tmp_path) -> None:
    root = make_cache(tmp_path / "one", 0)
    with pytest.raises(InvalidArgumentError, match="has the id 9, but the teacher"):
        CacheDataset(root, draft=DraftVocabulary(torch.tensor([1, 9]), 12))
    CacheDataset(root, draft=DraftVocabulary(torch.tensor([1, 8]), 12))  # only padding is absent
    few = int(CacheDataset(root)[0]["shift_labels"].max())
    small = CacheDataset(root, draft=DraftVocabulary(torch.tensor([0]), few))
    with pytest.raises(InvalidArgumentError, match=f"the text has the id {few}, but the draft"):
        small[0]


def test_frequencies_that_cannot_be_written_cause_no_warning() -> None:
    frequencies = np.array([3, 1, 2])
    frequencies.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draft = DraftVocabulary.most_frequent(frequencies, 2)
        assert draft.coverage(frequencies) == pytest.approx(5 / 6)
    assert draft.ids.tolist() == [0, 2]


# -- files -----------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 40), min_size=1, max_size=20))
@settings(max_examples=20)
def test_files_follow_the_rule_of_speculators(tmp_path_factory, ids) -> None:
    """Compared with d2t and t2d written one id at a time."""
    folder = tmp_path_factory.mktemp("draft")
    draft = DraftVocabulary(torch.tensor(sorted(ids)), 41)
    draft.save(folder / "npy")
    draft.save(folder / "one.safetensors")
    d2t = [target - place for place, target in enumerate(sorted(ids))]
    t2d = [target in ids for target in range(41)]
    arrays = [np.load(folder / "npy" / name) for name in ("d2t.npy", "t2d.npy")]
    assert [a.dtype.name for a in arrays] == ["int64", "bool"]
    assert [a.tolist() for a in arrays] == [d2t, t2d]
    tensors = load_file(folder / "one.safetensors")
    assert (tensors["d2t"].tolist(), tensors["t2d"].tolist()) == (d2t, t2d)
    assert DraftVocabulary.load(folder / "npy") == draft
    assert DraftVocabulary.load(folder / "one.safetensors") == draft


def test_the_weights_of_a_drafter_have_its_vocabulary(tmp_path) -> None:
    tensors = {"d2t": DRAFT.d2t.int(), "t2d": DRAFT.t2d, "fc.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert DraftVocabulary.load(tmp_path) == DRAFT
    turned = DraftVocabulary(torch.tensor([4, 1]), 6)
    turned.save(tmp_path / "turned.safetensors")
    assert DraftVocabulary.load(tmp_path / "turned.safetensors").ids.tolist() == [4, 1]


def test_truth_values_may_be_stored_as_bytes(tmp_path) -> None:
    DRAFT.save(tmp_path / "npy")
    np.save(tmp_path / "npy" / "t2d.npy", DRAFT.t2d.numpy().astype(np.uint8))
    save_file({"d2t": DRAFT.d2t, "t2d": DRAFT.t2d.byte()}, tmp_path / "one.safetensors")
    assert DraftVocabulary.load(tmp_path / "npy") == DRAFT
    assert DraftVocabulary.load(tmp_path / "one.safetensors") == DRAFT


def test_another_vocabulary_is_not_replaced(tmp_path) -> None:
    for name in ("one.safetensors", "folder"):
        DRAFT.save(tmp_path / name)
        DRAFT.save(tmp_path / name)
        with pytest.raises(InvalidArgumentError, match="another draft vocabulary"):
            DraftVocabulary(torch.tensor([2]), VOCABULARY).save(tmp_path / name)
        assert DraftVocabulary.load(tmp_path / name) == DRAFT


def test_an_interrupted_save_is_completed(tmp_path) -> None:
    """A full disk asks to start the same command again, so half of the pair must not prevent it."""
    for left in ("d2t", "t2d"):
        DRAFT.save(tmp_path / left)
        (tmp_path / left / ("t2d.npy" if left == "d2t" else "d2t.npy")).unlink()
        with pytest.raises(InvalidArgumentError, match="cannot be read as a draft vocabulary"):
            DraftVocabulary(torch.tensor([2]), VOCABULARY).save(tmp_path / left)
        DRAFT.save(tmp_path / left)
        assert DraftVocabulary.load(tmp_path / left) == DRAFT


def test_names_of_other_formats_become_no_folders(tmp_path) -> None:
    for name in ("map.pt", "map.npy"):
        with pytest.raises(InvalidArgumentError, match=r"ends in \.safetensors"):
            DRAFT.save(tmp_path / name)
    DRAFT.save(tmp_path / "MAP.SafeTensors")
    assert (tmp_path / "MAP.SafeTensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["MAP.SafeTensors"]


def test_ids_to_keep_are_added_to_the_separator(tmp_path, line) -> None:
    """A drafter without the separator of documents would never end a text."""
    cache = Cache.create(tmp_path / "c", identity("counts", packing={"separator_id": 999}))
    cache.commit([record("counts", 0)], {})
    words = ("--size", 5, "--by", "teacher", "--out", tmp_path / "d.safetensors")
    found = line("draft-vocabulary", tmp_path / "c", *words, "--keep", 998)
    assert found.code == 0
    assert DraftVocabulary.load(tmp_path / "d.safetensors").ids.tolist()[-2:] == [998, 999]
    assert "a smaller --size is sufficient" not in found.err


@pytest.mark.parametrize(
    ("d2t", "t2d", "said"),
    [
        ([1, 3], [False, True, False, True], "d2t has the ids themselves"),
        ([0, 0], [False, True, False, True], "all zeros"),
        ([1, 1], [False, True, True, True], "2 draft ids to .* the 3 that t2d marks"),
        ([1, 9], [False, True, True, False], "each once"),
        ([1, -1], [False, True, True, False], "each once"),  # one id twice
        ([0.0, 1.0], [False, True, True, False], "float"),
        ([1, 1], [0, 1, 1, 0], "expected d2t int64"),
        ([1, 1], torch.tensor([0, 1, 2, 0], dtype=torch.uint8), "t2d bool, or uint8 of 0 and 1"),
        ([[1, 1]], [False, True, True, False], "expected d2t int64"),
        ([], [False, False], r"shape \(0,\)"),
        ([2**63 - 1, 2], [False, True, True, False], "each once"),  # overflows
        ([-1, 1], [False, True, True, False], "each once"),
    ],
)
def test_maps_that_contradict_each_other_are_refused(tmp_path, d2t, t2d, said) -> None:
    offsets = torch.tensor(d2t) if d2t else torch.tensor(d2t, dtype=torch.int64)
    save_file({"d2t": offsets, "t2d": torch.as_tensor(t2d)}, tmp_path / "bad.safetensors")
    with pytest.raises(InvalidArgumentError, match=said):
        DraftVocabulary.load(tmp_path / "bad.safetensors")


def damage(folder, kind: str) -> str:
    """Damage one file of a saved vocabulary, and return what the message has to contain."""
    d2t, t2d = folder / "d2t.npy", folder / "t2d.npy"
    if kind == "cut":
        d2t.write_bytes(d2t.read_bytes()[:-3])
        return "bytes of data for 4 values"
    if kind == "pickle":
        np.save(t2d, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        return "not that of a vector"
    if kind == "huge":
        header = t2d.read_bytes().replace(b"(9,)", b"(9999999999999,)".ljust(4))
        t2d.write_bytes(header)
        return "t2d.npy cannot be read"
    if kind == "text":
        d2t.write_text("not an array")
        return "d2t.npy cannot be read"
    if kind == "pipe":
        t2d.unlink()
        os.mkfifo(t2d)
        return "pipe"
    t2d.unlink()
    return "t2d.npy cannot be read"


@pytest.mark.parametrize("kind", ["cut", "pickle", "huge", "text", "pipe", "missing"])
def test_damaged_arrays_are_refused(tmp_path, kind) -> None:
    DRAFT.save(tmp_path / "draft")
    said = damage(tmp_path / "draft", kind)
    with pytest.raises(InvalidArgumentError, match=said):
        DraftVocabulary.load(tmp_path / "draft")


def test_files_without_a_vocabulary_are_refused(tmp_path) -> None:
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    os.mkfifo(tmp_path / "pipe.safetensors")
    save_file({"t2d": torch.ones(2, dtype=torch.bool)}, tmp_path / "half.safetensors")
    for name, said in (
        (".", "lacks the tensors d2t and t2d"),
        ("half.safetensors", "lacks the tensors d2t, which"),
        ("cut.safetensors", "cannot be read as a draft vocabulary"),
        ("pipe.safetensors", "pipe"),
        ("nothing", "No such file"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            DraftVocabulary.load(tmp_path / name)


def written(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with a header and data that need not fit."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


MARKS = bytes([1, 1, 1, 1, 0, 0, 0, 0, 0])
FORGED = {
    **{
        f"d2t as {kind}": written(
            {
                "d2t": entry(kind, [4], 0, 4 * size),
                "t2d": entry("BOOL", [9], 4 * size, 4 * size + 9),
            },
            bytes(4 * size) + MARKS,
        )
        for kind, size in {"I16": 2, "U64": 8, "BF16": 2, "F8_E4M3": 1, "C64": 8, "BOOL": 1}.items()
    },
    **{
        f"t2d as {kind}": written(
            {"d2t": entry("I64", [4], 0, 32), "t2d": entry(kind, [9], 32, 32 + 9 * size)},
            bytes(32 + 9 * size),
        )
        for kind, size in {"U8": 1, "I64": 8, "F8_E8M0": 1}.items()
    },
    "matrix": written(
        {"d2t": entry("I64", [2, 2], 0, 32), "t2d": entry("BOOL", [9], 32, 41)}, bytes(32) + MARKS
    ),
    "scalar": written(
        {"d2t": entry("I64", [], 0, 8), "t2d": entry("BOOL", [9], 8, 17)}, bytes(8) + MARKS
    ),
    "unknown type": written(
        {"d2t": entry("F6_E2M3", [8], 0, 6), "t2d": entry("BOOL", [9], 6, 15)}, bytes(6) + MARKS
    ),
    "negative shape": written(
        {"d2t": entry("I64", [-4], 0, 32), "t2d": entry("BOOL", [9], 32, 41)}
    ),
    "huge shape": written({"d2t": entry("I64", [2**60], 0, 32), "t2d": entry("BOOL", [9], 32, 41)}),
    "no description": written({"d2t": "x", "t2d": entry("BOOL", [9], 32, 41)}, bytes(41)),
    "deep": written(b"[" * 90_000),
    "huge header": struct.pack("<Q", 2**40) + b"{}",
    "empty": b"",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_tensors_are_refused(tmp_path, name) -> None:
    (tmp_path / "draft.safetensors").write_bytes(FORGED[name])
    with pytest.raises(InvalidArgumentError, match=r"draft\.safetensors"):
        DraftVocabulary.load(tmp_path / "draft.safetensors")


@pytest.mark.parametrize("kind", ["d2t", "t2d"])
@pytest.mark.parametrize("size", [2**25, 2**38])
def test_sizes_beyond_any_vocabulary_are_refused_unread(tmp_path, kind, size) -> None:
    """Files with holes, which take no space on the disk."""
    shapes = {"d2t": 4, "t2d": 9} | {kind: size}
    stop = 8 * shapes["d2t"]
    header = {
        "d2t": entry("I64", [shapes["d2t"]], 0, stop),
        "t2d": entry("BOOL", [shapes["t2d"]], stop, stop + shapes["t2d"]),
    }
    path = tmp_path / "draft.safetensors"
    path.write_bytes(written(header))
    os.truncate(path, path.stat().st_size + stop + shapes["t2d"])
    with pytest.raises(InvalidArgumentError, match=r"more than 16,777,216|mmap"):
        DraftVocabulary.load(path)
    DRAFT.save(tmp_path / "folder")
    os.truncate(tmp_path / "folder" / f"{kind}.npy", size * 8)
    with pytest.raises(InvalidArgumentError, match=rf"{kind}\.npy cannot be read.*more than"):
        DraftVocabulary.load(tmp_path / "folder")


def test_marks_that_are_neither_zero_nor_one_count_once(tmp_path) -> None:
    header = {"d2t": entry("I64", [4], 0, 32), "t2d": entry("BOOL", [9], 32, 41)}
    marks = bytes([2, 255, 7, 3, 0, 0, 0, 0, 0])
    (tmp_path / "odd.safetensors").write_bytes(written(header, bytes(32) + marks))
    assert DraftVocabulary.load(tmp_path / "odd.safetensors").ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "header",
    [
        *("(" * 9000, "-" * 9000 + "1", "1" + "+1j" * 3000, "{[]: 1}", "{" + "[" * 90 + "]" * 90),
        *(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': (4,), }}" for kind in (
            ">i8", "<u8", "<f8", "|O", "|S8", "<i8,<i8", "(2,)<i8", "<M8[s]")),
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-4,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 2), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (5,), }",
    ],
    ids=lambda header: header[:60],
)  # fmt: skip
def test_forged_headers_of_arrays_are_refused(tmp_path, header) -> None:
    """numpy parses such a header as an expression, and fails in five ways."""
    DRAFT.save(tmp_path)
    text = header.encode() + b"\n"
    made = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(32)
    (tmp_path / "d2t.npy").write_bytes(made)
    with pytest.raises(InvalidArgumentError, match=r"d2t\.npy cannot be read"):
        DraftVocabulary.load(tmp_path)


def test_two_vocabularies_in_a_folder_have_to_agree(tmp_path) -> None:
    DRAFT.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    DRAFT.save(weights)
    assert DraftVocabulary.load(tmp_path) == DRAFT
    weights.unlink()
    save_file({"fc.weight": torch.ones(3, 2)}, weights)  # the weights may lack it
    assert DraftVocabulary.load(tmp_path) == DRAFT
    for other in (
        DraftVocabulary(torch.tensor([1, 3, 4, 7]), VOCABULARY),
        DraftVocabulary(DRAFT.ids, VOCABULARY + 1),
        DraftVocabulary(DRAFT.ids.flip(0), VOCABULARY),
    ):
        weights.unlink()
        other.save(weights)
        with pytest.raises(InvalidArgumentError, match="two draft vocabularies that differ"):
            DraftVocabulary.load(tmp_path)
    (tmp_path / "d2t.npy").unlink()
    with pytest.raises(InvalidArgumentError, match=r"d2t\.npy cannot be read"):
        DraftVocabulary.load(tmp_path)  # half a vocabulary is not replaced by another one
    (tmp_path / "t2d.npy").unlink()
    assert DraftVocabulary.load(tmp_path) == other
    with pytest.raises(InvalidArgumentError, match="another draft vocabulary"):
        DRAFT.save(tmp_path)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    DRAFT.save(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"model\.safetensors cannot be read"):
        DraftVocabulary.load(tmp_path)


@pytest.mark.parametrize("names", [("d2t.npy", "t2d.npy"), ("model.safetensors",)])
def test_links_out_of_the_folder_are_refused(tmp_path, names) -> None:
    """Those of the hub cache, whose files are blobs, are followed."""
    DRAFT.save(tmp_path / "blobs")
    DRAFT.save(tmp_path / "blobs" / "model.safetensors")
    for folder in (tmp_path / "snapshots" / "1", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).symlink_to(tmp_path / "blobs" / name)
    assert DraftVocabulary.load(tmp_path / "snapshots" / "1") == DRAFT
    with pytest.raises(InvalidArgumentError, match=r"is a link to .*outside of its folder"):
        DraftVocabulary.load(tmp_path / "elsewhere")
    with allowing("linked-weights"), pytest.warns(SparseLogitsWarning, match="is a link to"):
        assert DraftVocabulary.load(tmp_path / "elsewhere") == DRAFT
    for target in ("/dev/zero", tmp_path / "nothing", names[0]):
        path = tmp_path / "elsewhere" / names[0]
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(InvalidArgumentError):
            DraftVocabulary.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        np.array([1, 2]),
        torch.tensor([1, 2], device="meta"),
        torch.tensor([1, 2]).to_sparse(),
        torch.tensor([1.0, 2.0]),
        torch.tensor(3),
        None,
    ],
    ids=lambda own: f"{type(own).__name__} {getattr(own, 'layout', '')}",
)
def test_ids_that_are_no_vector_on_the_cpu_are_refused(ids) -> None:
    with pytest.raises(InvalidArgumentError, match="vector of at least one id, int64, on the CPU"):
        DraftVocabulary(ids, 9)


@pytest.mark.parametrize(
    "frequencies",
    [torch.ones(3, 3), torch.tensor(3.0), torch.tensor([1.0, torch.nan]), np.array([1.0, -1.0])],
)
def test_frequencies_that_are_no_counts_are_refused(frequencies) -> None:
    with pytest.raises(InvalidArgumentError, match="vector of finite numbers"):
        DraftVocabulary.most_frequent(frequencies, 1)


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_head_begins_with_the_rows_of_the_model(tied) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    draft = DraftVocabulary(torch.arange(0, 300, 3), 512)
    tokens = torch.arange(20)[None]
    before, embedded = model(tokens).logits[0], model.get_input_embeddings().weight.clone()
    head = draft.give_head(model)
    assert model.get_output_embeddings() is head
    after = model(tokens).logits[0]
    assert after.shape[1] == len(draft) + 1
    torch.testing.assert_close(after[:, :-1], before[:, draft.ids])
    outside = [i for i in range(512) if i not in set(draft.ids.tolist())]
    torch.testing.assert_close(after[:, -1], before[:, outside].mean(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(model.get_input_embeddings().weight, embedded)
    head.weight.data.add_(1.0)
    assert torch.equal(model.get_input_embeddings().weight, embedded)


def test_a_trained_head_is_served_without_the_rest() -> None:
    """By the rule of vLLM: logits of draft id d are those of the id d + d2t[d]."""
    model = tiny_llama()
    head = DraftVocabulary(torch.tensor([7, 40, 41]), 512).give_head(model)
    draft = DraftVocabulary(torch.tensor([7, 40, 41]), 512)
    tensors = draft.checkpoint_tensors(head)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    served = torch.full((5, 512), -torch.inf)
    targets = torch.arange(3) + tensors["d2t"]
    served[:, targets] = states @ tensors["lm_head.weight"].T
    torch.testing.assert_close(served, draft.logits_of_ids(head(states), 512))
    assert tensors["t2d"].nonzero().flatten().tolist() == [7, 40, 41]
    with pytest.raises(InvalidArgumentError, match="520 rows, expected at least 600"):
        DraftVocabulary(torch.tensor([7]), 600).give_head(tiny_llama())


def test_systematic_entries_are_fewer_after_restriction(tmp_path) -> None:
    root = make_cache(tmp_path / "one", 0, sampler=Systematic(ROUNDS))
    whole, restricted = CacheDataset(root), CacheDataset(root, draft=DRAFT)
    assert all(
        bool((b["targets"].entries_per_position <= a["targets"].entries_per_position).all())
        for a, b in ((whole[i], restricted[i]) for i in range(WINDOWS))
    )
