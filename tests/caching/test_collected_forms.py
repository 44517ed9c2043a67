"""Caches of other trainers, packed here by their layouts, come out as the teacher's own targets."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from numpy.typing import NDArray

from sparselogits.caching import import_collected
from sparselogits.caching.collected_forms import DistillKitPacking
from sparselogits.errors import CorpusError, InvalidTargetsError, RecipeError, SparseLogitsWarning
from sparselogits.store import Cache, verify
from tests.caching.test_collected import LENGTH, V, same_targets, sequences, teachers_targets
from tests.conftest import tiny_llama, write_lines

K = 12
Array = NDArray[Any]


def top(tokens: torch.Tensor, k: int = K) -> tuple[Array, Array]:
    """Ids and logprobs of the k likeliest tokens after each token, the likeliest first."""
    with torch.no_grad():
        logs = tiny_llama()(tokens[None]).logits[0].double().log_softmax(-1)
    values, ids = logs.topk(k, dim=-1)
    return ids.numpy(), values.numpy()


# An independent writer of DistillKit's layout


def bits_of(numbers: Array, bits: int) -> bytes:
    """Big-endian bits of each number, one after another, filled up with zeros to a byte."""
    text = "".join(format(int(number), f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def term(name: int | str, places: Array) -> Array:
    return places**name if isinstance(name, int) else getattr(np, name)(places)


def pack_position(logs: Array, settings: dict[str, Any]) -> bytes:
    """One position, in numbers of float32 or float16."""
    kinds = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
    values = np.array(logs, np.float64)
    if settings.get("delta_encoding", True):
        values = np.append(values[:1], np.diff(values))
    exact, rest = values[: settings["exact_k"]], values[settings["exact_k"] :]
    out = exact.astype(kinds[settings.get("exact_dtype", "float32")]).tobytes()
    if terms := settings.get("polynomial_terms"):
        places = np.arange(len(rest), dtype=np.float64)
        if settings.get("normalize_t"):
            places = np.linspace(0, 1, len(rest))
        matrix = np.stack([term(name, places) for name in terms], -1)
        kind = kinds[settings.get("term_dtype", "float32")]
        coefficients = np.linalg.lstsq(matrix, rest, rcond=None)[0].astype(kind)
        out += coefficients.tobytes()
        rest = rest - matrix @ coefficients.astype(np.float64)
    for own in settings["residual_bins"]:
        part, rest = rest[: own["num_elements"]], rest[own["num_elements"] :]
        bits = own["element_bits"]
        scale = np.abs(part).max() / (1 if bits == 1 else 2 ** (bits - 1)) or 1.0
        scale = np.array(scale, kinds[own["scale_dtype"]])
        out += scale.tobytes()
        if bits == 1:
            numbers = (part > 0).astype(int)
        else:
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            numbers = np.clip(np.round(part / float(scale)), low, high).astype(int) - low
        out += bits_of(numbers, bits)
    return out


def packed_row(tokens: torch.Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """As captured from prompt_logprobs: nothing for the first token, so one position fewer."""
    ids, logs = top(tokens, settings["k"])
    bits = math.ceil(math.log2(settings["d"]))
    return {
        "input_ids": tokens.tolist(),
        "compressed_logprobs": [list(pack_position(row, settings)) for row in logs[:-1]],
        "bytepacked_indices": [list(bits_of(row, bits)) for row in ids[:-1]],
    }


def write_packed(
    folder: Path, settings: dict[str, Any], texts: list[torch.Tensor] | None = None
) -> Path:
    folder.mkdir()
    rows = [packed_row(tokens, settings) for tokens in texts or sequences(2)]
    kinds = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, kinds), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    return folder


LOSSLESS = {"d": V, "k": K, "exact_k": K, "residual_bins": []}
BIN = {"scale_dtype": "float16", "element_bits": 8, "num_elements": 4}
PACKINGS: dict[str, tuple[dict[str, Any], float]] = {
    "exact": (LOSSLESS, 1e-5),
    "exact, no deltas": (LOSSLESS | {"delta_encoding": False}, 1e-6),
    "half": (LOSSLESS | {"exact_dtype": "float16", "delta_encoding": False}, 5e-3),
    "other vocabulary": (LOSSLESS | {"d": 2 * V + 3}, 1e-5),
    "bins": (LOSSLESS | {"exact_k": 4, "residual_bins": [BIN, BIN | {"element_bits": 11}]}, 3e-2),
    "polynomial": (
        LOSSLESS
        | {
            "exact_k": 4,
            "delta_encoding": False,
            "polynomial_terms": [0, 1, 2, "sqrt"],
            "residual_bins": [BIN | {"num_elements": 8}],
        },
        2e-2,
    ),
    "normalised places": (
        LOSSLESS
        | {
            "exact_k": 2,
            "delta_encoding": False,
            "polynomial_terms": [0, 1, "exp"],
            "normalize_t": True,
            "residual_bins": [BIN | {"element_bits": 1}],
        },
        0.3,
    ),
}


def imported(data: Path, out: Path, tokenizer: Any, **options: Any) -> Cache:
    options = {"vocab_size": V, "exact_weights": True, "teacher": "ours"} | options
    return import_collected(str(data), tokenizer, out, **options).cache


@pytest.mark.parametrize("name", PACKINGS)
def test_packed_rows_become_the_teachers_targets(name, tmp_path, tokenizer):
    settings, tolerance = PACKINGS[name]
    folder = write_packed(tmp_path / "data", settings)
    cache = imported(folder, tmp_path / "c", tokenizer)
    assert cache.identity.sampler == {"name": "topk", "k": K}
    for number, tokens in enumerate(sequences(2)):
        record = cache.read(number)
        assert record.tokens.tolist() == tokens.tolist()
        expected = teachers_targets(tokens, K)[: LENGTH - 1]
        same_targets(record.targets[: LENGTH - 1], expected, tolerance)
        assert record.present().tolist() == [True] * (LENGTH - 1) + [False]
        # the tail is kept as a number: what the list lacks
        lacking = 1 - record.targets.mass()[: LENGTH - 1]
        assert torch.allclose(lacking, 1 - expected.mass(), atol=tolerance)
    assert verify(cache).ok


def test_bits_are_unpacked_as_they_were_packed():
    rng = np.random.default_rng(0)
    for bits in (1, 3, 7, 8, 9, 17, 24):
        packing = DistillKitPacking(d=2**bits, k=13, exact_k=13)
        numbers = rng.integers(0, 2**bits, (70, 13))
        packed = np.stack([np.frombuffer(bits_of(row, bits), np.uint8) for row in numbers])
        assert packing.id_bits == bits
        assert packed.shape[1] == packing.id_bytes
        assert np.array_equal(packing.ids(packed), numbers)


def test_settings_may_be_named_and_must_fit(tmp_path, tokenizer):
    folder = write_packed(tmp_path / "data", LOSSLESS)
    settings = (folder / "compression_config.yaml").rename(tmp_path / "settings.yaml")
    with pytest.raises(InvalidTargetsError, match=r"settings are unknown\. Put compression_"):
        imported(folder, tmp_path / "a", tokenizer)
    cache = imported(folder, tmp_path / "b", tokenizer, compression=settings)
    assert len(cache) == 2
    settings.write_text(yaml.safe_dump(LOSSLESS | {"k": 11, "exact_k": 11}))
    with pytest.raises(InvalidTargetsError, match="48 to 48 bytes per position, expected"):
        imported(folder, tmp_path / "c", tokenizer, compression=settings)
    settings.write_text("k: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        imported(folder, tmp_path / "d", tokenizer, compression=settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0},
        {"k": 10**9},
        {"d": 1},
        {"exact_k": K + 1},
        {"polynomial_terms": [10**9]},
        {"polynomial_terms": ["__import__"]},
        {"residual_bins": [BIN | {"num_elements": 4}]},
        {"exact_dtype": "int8"},
        {"more": 1},
    ],
    ids=str,
)
def test_hostile_settings_are_refused(wrong, tmp_path, tokenizer):
    folder = write_packed(tmp_path / "data", LOSSLESS)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(LOSSLESS | wrong))
    with pytest.raises(CorpusError, match="has invalid settings of DistillKit's packing"):
        imported(folder, tmp_path / "c", tokenizer)


def test_approximated_masses_above_one_are_scaled(tmp_path, tokenizer):
    settings = {"d": V, "k": 2, "exact_k": 2, "residual_bins": [], "delta_encoding": False}
    folder = tmp_path / "data"
    folder.mkdir()

    def row(p: float, q: float) -> dict[str, Any]:
        logs = np.log([p, q])
        return {
            "input_ids": [5, 6],
            "compressed_logprobs": [list(pack_position(logs, settings))],
            "bytepacked_indices": [list(bits_of(np.array([3, 9]), math.ceil(math.log2(V))))],
        }

    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "rows.jsonl").write_text(json.dumps(row(0.78, 0.26)) + "\n")
    cache = imported(folder, tmp_path / "c", tokenizer)
    assert np.allclose(cache.read(0).targets.weights, [0.75, 0.25], atol=1e-6)
    (folder / "rows.jsonl").write_text(json.dumps(row(0.9, 0.3)) + "\n")
    with pytest.raises(InvalidTargetsError, match=r"sum to 1\.2000; expected at most 1"):
        imported(folder, tmp_path / "d", tokenizer)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_lines(path, rows)
    return path


def test_lists_of_probabilities_are_read(tmp_path, tokenizer):
    rows = []
    for tokens in sequences(2):
        ids, logs = top(tokens)
        row = {"input_ids": tokens.tolist(), "index": ids.tolist()}
        rows.append(row | {"exp_logits": np.exp(logs).tolist()})
    cache = imported(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "c", tokenizer)
    for number, tokens in enumerate(sequences(2)):
        same_targets(cache.read(number).targets, teachers_targets(tokens, K))
    rows[1]["exp_logits"][3] = [7.5] * K
    with pytest.raises(InvalidTargetsError, match="line 2: the exp_logits of position 3 sum to 90"):
        imported(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "d", tokenizer)
    rows[1]["exp_logits"][3] = [-0.5, *[0.1] * (K - 1)]
    with pytest.raises(InvalidTargetsError, match=r"smallest is -0\.5; expected numbers from 0"):
        imported(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "d", tokenizer)
    rows[1]["exp_logits"][3] = ["0.05"] * K
    with pytest.raises(InvalidTargetsError, match="line 2: exp_logits are not all numbers"):
        imported(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "d", tokenizer)


def test_positions_without_logprobs_have_no_target_in_any_form(tmp_path, tokenizer):
    """An element that is null, and a packed row of one token, which predicts nothing."""
    (tokens,) = sequences(1)
    ids, logs = top(tokens)
    row = {"input_ids": tokens.tolist(), "index": ids.tolist(), "exp_logits": np.exp(logs).tolist()}
    row["index"][3] = row["exp_logits"][3] = None
    cache = imported(write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "c", tokenizer)
    assert cache.read(0).present().tolist() == [i != 3 for i in range(LENGTH)]
    data = write_packed(tmp_path / "data", LOSSLESS, [tokens[:1], tokens])
    packed = imported(data, tmp_path / "d", tokenizer, k=K, window=LENGTH).read(0)
    assert packed.tokens.tolist() == [tokens[0], *tokens[:-1].tolist()]
    assert packed.present().tolist() == [i > 0 for i in range(LENGTH)]
    same_targets(packed.targets[1:], teachers_targets(tokens, K)[: LENGTH - 1])


def test_logits_without_a_normaliser_are_refused_or_taken_for_all(tmp_path, tokenizer):
    rows = []
    for tokens in sequences(2):
        ids, logs = top(tokens)
        row = {"tokens": tokens.tolist(), "top_k_indices": ids.tolist()}
        row |= {"top_k_logits": (logs + 17.25).tolist(), "inputs_position": list(range(LENGTH))}
        rows.append(row | {"targets_segmentation": [1] * (LENGTH - 2) + [0, 0]})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InvalidTargetsError, match=r"without their normaliser.*--allow unnorm"):
        imported(data, tmp_path / "c", tokenizer)
    with pytest.warns(SparseLogitsWarning, match="without their normaliser") as warned:
        cache = imported(data, tmp_path / "c", tokenizer, allow=["unnormalised-logits"])
    assert len(warned) == 1
    assert cache.identity.packing["rows"] == "as collected, normalised over the listed ids"
    for number, tokens in enumerate(sequences(2)):
        record = cache.read(number)
        expected = teachers_targets(tokens, K)[: LENGTH - 2]
        mass = expected.mass().repeat_interleave(K)
        assert torch.equal(record.targets[: LENGTH - 2].ids, expected.ids)
        assert torch.allclose(record.targets.weights, expected.weights / mass, rtol=1e-4)
        assert record.present().tolist() == [True] * (LENGTH - 2) + [False] * 2


def test_a_record_of_a_whole_batch_is_named(tmp_path, tokenizer):
    rows = [(tokens.tolist(), *(part.tolist() for part in top(tokens))) for tokens in sequences(2)]
    names = ("tokens", "top_k_indices", "top_k_logits")
    batch = dict(zip(names, (list(column) for column in zip(*rows, strict=True)), strict=True))
    data = write_rows(tmp_path / "rows.jsonl", [batch])
    with (
        pytest.raises(InvalidTargetsError, match=r"line 1: tokens is a list of 2 lists, as in a "),
        pytest.warns(SparseLogitsWarning),
    ):
        imported(data, tmp_path / "c", tokenizer, allow=["unnormalised-logits"])


@pytest.mark.parametrize("first", [0, 1])
def test_rows_with_and_without_a_normaliser_do_not_mix(first, tmp_path, tokenizer):
    """The identity says of all rows whether they were normalised over the listed ids."""
    rows = []
    for tokens in sequences(2):
        ids, logs = (part.tolist() for part in top(tokens))
        row = {"tokens": tokens.tolist()}
        rows.append([row | {"topk_ids": ids, "topk_logprobs": logs}])
        rows[-1].append(row | {"top_k_indices": ids, "top_k_logits": logs})
    mixed = [rows[0][first], rows[1][1 - first]]
    data = write_rows(tmp_path / "rows.jsonl", mixed)
    with (
        pytest.raises(InvalidTargetsError, match="line 2: only one of this row and the first row"),
        pytest.warns(SparseLogitsWarning) if first else nullcontext(),
    ):
        imported(data, tmp_path / "c", tokenizer, allow=["unnormalised-logits"])
    assert not (tmp_path / "c").exists()


def test_the_older_packing_is_refused(tmp_path, tokenizer):
    row = {"input_ids": [1, 2], "packed_indices": [[1]], "exact_values": [[0.5]], "coeffs": [[]]}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InvalidTargetsError, match="DistillKit's old layout, which stores"):
        imported(data, tmp_path / "c", tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressed_logprobs": [[0] * 48] * 5}, "32 tokens, but 5 positions with values and 31 "),
        ({"compressed_logprobs": [[0] * 47] * 31}, "47 to 47 bytes per position"),
        ({"compressed_logprobs": [[256] * 48] * 31}, "values other than bytes"),
        ({"compressed_logprobs": [["7"] * 48] * 31}, "compressed_logprobs are not all whole"),
        ({"compressed_logprobs": 7}, "is not a list of lists"),
        ({"compressed_logprobs": [[255] * 48] * 31}, "has the logprob nan"),
        ({"bytepacked_indices": [[255] * 15] * 31}, "is outside the vocabulary|more than once"),
        ({"input_ids": 5}, "no list of input_ids"),
    ],
    ids=str,
)
def test_damaged_packed_rows_are_named(changes, message, tmp_path, tokenizer):
    row = packed_row(sequences(1)[0], LOSSLESS)
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(LOSSLESS))
    data = write_rows(tmp_path / "rows.jsonl", [row, row | changes])
    with pytest.raises(InvalidTargetsError, match=rf"rows\.jsonl, line 2: .*({message})"):
        imported(data, tmp_path / "c", tokenizer)
