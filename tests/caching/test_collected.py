"""Test caches imported from collected Top-K logprobs, and the errors for invalid rows."""

import json
import math
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.caching import import_collected
from sparselogits.caching.collected import _WindowCutter
from sparselogits.caching.collected_rows import read_row
from sparselogits.errors import CacheError, CorpusError, InvalidArgumentError, InvalidTargetsError
from sparselogits.losses.criterion import require_rule_for
from sparselogits.samplers import TopK, from_parameters
from sparselogits.store import Cache, export, verify
from sparselogits.targets import SparseTargets
from tests.conftest import PADDED_VOCABULARY, tiny_llama, write_lines
from tests.store.draws import identity, records

V = PADDED_VOCABULARY
LENGTH, K = 32, 6
ROUNDING = 2 ** (1 / 32) / 2 - 0.5 + 1e-6  # half a step between two levels

Row = dict[str, Any]


@cache
def teacher() -> torch.nn.Module:
    return tiny_llama()


def teachers_targets(tokens: torch.Tensor, k: int = K) -> SparseTargets:
    """The likeliest tokens of the tiny teacher after each of `tokens`."""
    with torch.no_grad():
        logits = teacher()(tokens[None]).logits[0]
    return TopK(k)(logits, torch.empty(len(tokens), 0))


def sequences(count: int, length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, V, (length,), generator=generator) for _ in range(count)]


def listed(tokens: torch.Tensor) -> Row:
    ids, weights = teachers_targets(tokens).padded()
    logs = weights.double().log()
    return {"input_ids": tokens.tolist(), "topk_ids": ids.tolist(), "topk_logprobs": logs.tolist()}


def served(tokens: torch.Tensor) -> Row:
    """As vLLM answers with prompt_logprobs=K: the true token stands there too, listed or not."""
    row = listed(tokens)
    with torch.no_grad():
        logs = teacher()(tokens[None]).logits[0].double().log_softmax(-1)
    elements: list[Any] = [None]
    for j, true in enumerate(row["input_ids"][1:]):
        element = {str(true): {"logprob": float(logs[j, true]), "rank": 9, "decoded_token": "x"}}
        for i, x in zip(row["topk_ids"][j], row["topk_logprobs"][j], strict=True):
            element[str(i)] = {"logprob": x, "rank": 1, "decoded_token": "x"}
        elements.append(element)
    return {"prompt_token_ids": row["input_ids"], "prompt_logprobs": elements}


def write(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        write_lines(path, rows)
    return path


def same_targets(found: SparseTargets, expected: SparseTargets, rtol: float = 5e-6) -> None:
    """Ids exactly; weights went through a logarithm in float32 at worst, or were rounded."""
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.offsets, expected.offsets)
    torch.testing.assert_close(found.weights, expected.weights, rtol=rtol, atol=0)


@pytest.fixture
def imported(tmp_path, tokenizer) -> Cache:
    data = write(tmp_path / "rows.jsonl", [listed(tokens) for tokens in sequences(6)])
    return import_collected(str(data), tokenizer, tmp_path / "c", vocab_size=V).cache


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_become_the_teachers_own_targets(tmp_path, tokenizer, suffix):
    texts = sequences(5)
    data = write(tmp_path / f"rows.{suffix}", [listed(tokens) for tokens in texts])
    options = {"vocab_size": V, "windows_per_shard": 2}
    report = import_collected(str(data), tokenizer, tmp_path / "c", exact_weights=True, **options)
    rounded = import_collected(str(data), tokenizer, tmp_path / "rounded", **options).cache
    assert (report.rows, report.tokens_dropped) == (5, 0)
    assert report.cache.finished() == [(0, 2), (2, 4), (4, 5)]
    for i, tokens in enumerate(texts):
        record = report.cache.read(i)
        assert record.tokens.tolist() == tokens.tolist()
        assert record.mask is None
        same_targets(record.targets, teachers_targets(tokens))
        same_targets(rounded.read(i).targets, teachers_targets(tokens), ROUNDING)
    assert verify(report.cache).ok


def test_what_was_exported_is_imported_as_it_was(tmp_path, tokenizer, imported):
    export(imported, tmp_path / "out", "topk", k=K + 3)  # padded by three
    again = import_collected(str(tmp_path / "out"), tokenizer, tmp_path / "again", vocab_size=V)
    assert len(again.cache) == len(imported) == 6
    for i in range(6):
        assert np.array_equal(again.cache.read(i).tokens, imported.read(i).tokens)
        same_targets(again.cache.read(i).targets, imported.read(i).targets)


def test_document_starts_of_an_export_are_imported(tmp_path, tokenizer):
    """Attention restarts there; without them a student would see more context than the teacher."""
    cache = Cache.create(
        tmp_path / "c", identity("float32", packing={"separator": 0, "reset_attention": True})
    )
    cache.commit(records("float32", 0, 4), {})
    export(cache, tmp_path / "out", "topk", k=8)
    again = import_collected(str(tmp_path / "out"), tokenizer, tmp_path / "d", vocab_size=1000)
    assert again.cache.identity.packing["reset_attention"]
    found = [again.cache.read(i).document_starts.tolist() for i in range(4)]
    given = [cache.read(i).document_starts.tolist() for i in range(4)]
    assert found == [sorted({0, *starts}) for starts in given]
    assert max(map(len, found)) > 1


def test_document_starts_are_validated(tmp_path, tokenizer):
    plain = listed(sequences(1)[0])
    for number, (starts, message) in enumerate(
        [
            ([[LENGTH]], f"document_starts contains {LENGTH}"),
            ([[-1]], "document_starts contains -1"),
            ([[1.5]], "document_starts are not all whole numbers"),
            (["7"], "document_starts contains '7'; expected a list"),
            ([None, [3]], "the first row has none"),
        ]
    ):
        rows = [plain | {"document_starts": own} for own in starts]
        data = write(tmp_path / f"{number}.jsonl", rows)
        with pytest.raises(InvalidTargetsError, match=message):
            import_collected(str(data), tokenizer, tmp_path / "c", vocab_size=V)


def test_vllms_rows_belong_to_the_position_before(tmp_path, tokenizer):
    texts = sequences(3)
    with torch.no_grad():  # a true token that is among the K likeliest, as in any real text
        texts[0][20] = teacher()(texts[0][None, :20]).logits[0, -1].argmax()
    data = write(tmp_path / "rows.jsonl", [served(tokens) for tokens in texts])
    found = import_collected(str(data), tokenizer, tmp_path / "c", vocab_size=V).cache
    assert found.identity.sampler == {"name": "topk", "k": K}
    for i, tokens in enumerate(texts):
        record = found.read(i)
        expected = teachers_targets(tokens)[: LENGTH - 1]
        same_targets(record.targets[: LENGTH - 1], expected, ROUNDING)
        assert record.present().tolist() == [True] * (LENGTH - 1) + [False]
    assert verify(found).ok


def test_a_map_of_parquet_and_bare_logprobs_are_read_alike(tmp_path, tokenizer):
    elements = [None, [(7, -0.5), (3, -1.5)], [(9, -0.1)], []]
    kind = pa.list_(pa.map_(pa.int32(), pa.float64()))
    columns = {"input_ids": pa.array([[1, 2, 3, 4]]), "prompt_logprobs": pa.array([elements], kind)}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    bare = [e and {str(i): x for i, x in e} for e in elements]
    write(tmp_path / "rows.jsonl", [{"input_ids": [1, 2, 3, 4], "prompt_logprobs": bare}])
    for suffix in ("parquet", "jsonl"):
        data = str(tmp_path / f"rows.{suffix}")
        report = import_collected(data, tokenizer, tmp_path / suffix, vocab_size=V, k=5)
        record = report.cache.read(0)
        assert record.targets.ids.tolist() == [3, 7, 9]
        assert record.targets.offsets.tolist() == [0, 2, 3, 3, 3]
        assert np.allclose(record.targets.weights, np.exp([-1.5, -0.5, -0.1]), rtol=ROUNDING)


def test_rows_of_any_length_are_packed_and_attention_restarts(tmp_path, tokenizer):
    texts = [tokens[:n] for tokens, n in zip(sequences(4), (10, 30, 5, 25), strict=True)]
    data = write(tmp_path / "rows.jsonl", [listed(tokens) for tokens in texts])
    with pytest.raises(InvalidArgumentError, match=r"rows.jsonl, line 2 has 30 tokens.*--window"):
        import_collected(str(data), tokenizer, tmp_path / "c", vocab_size=V)
    report = import_collected(str(data), tokenizer, tmp_path / "c", vocab_size=V, window=16)
    assert report.tokens_dropped == 70 - 4 * 16
    whole = torch.cat(texts).tolist()
    expected = SparseTargets.cat([teachers_targets(tokens) for tokens in texts])
    for i in range(4):
        record = report.cache.read(i)
        assert record.tokens.tolist() == whole[16 * i : 16 * (i + 1)]
        same_targets(record.targets, expected[16 * i : 16 * (i + 1)], ROUNDING)
    starts = [report.cache.read(i).document_starts.tolist() for i in range(4)]
    assert starts == [[0, 10], [], [8, 13], []]
    labels = CacheDataset(tmp_path / "c")[0]["shift_labels"]
    assert labels[9] == -100
    assert labels[8] == whole[9]


def test_a_long_stream_keeps_less_than_a_window():
    def rows() -> Any:
        for n in range(1, 200):
            tokens = list(range(n))
            row = {"input_ids": tokens, "topk_ids": [[1]] * n, "topk_logprobs": [[-1.0]] * n}
            yield read_row(row, str, V, 1), str

    cutter, seen = _WindowCutter(64, whole_rows=False), 0
    for window in cutter.windows(rows()):
        seen += len(window)
        assert window.ids.base is None, "a view keeps the whole row alive"
    assert seen + cutter.left == 199 * 100
    assert cutter.left < 64


def test_it_is_biased_and_nobody_takes_it_for_more(imported, tmp_path):
    identity = imported.identity
    assert identity.teacher["engine"] == "imported"
    assert identity.teacher["weights"] == "unknown"
    sampler = from_parameters(identity.sampler)
    assert not sampler.unbiased
    require_rule_for("ghost", unbiased=sampler.unbiased)  # the rules for missing mass are open
    dataset = CacheDataset(imported.root)
    arguments = TrainingArguments(
        **{"output_dir": str(tmp_path / "run"), "max_steps": 1, "report_to": "none"},
        **{"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1},
    )
    with pytest.raises(InvalidArgumentError, match="not drawn in rounds"):
        SparseKDTrainer(tiny_llama(), arguments, train_dataset=dataset, rounds=3)
    trainer = SparseKDTrainer(
        tiny_llama(seed=2), arguments, train_dataset=dataset, missing_mass="ghost"
    )
    assert not trainer.objective.unbiased, "no KL may be reported"
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_the_figures_bound_the_teachers_own(imported):
    for i, tokens in enumerate(sequences(6)):
        with torch.no_grad():
            logs = teacher()(tokens[None]).logits[0].double().log_softmax(-1)
        entropy = float(-(logs.exp() * logs).sum(-1).mean())
        loss = float(-logs[:-1].gather(1, tokens[1:, None]).mean())
        record = imported.read(i)
        assert 0 < record.teacher_entropy < entropy
        assert 0 < record.teacher_loss < loss


GOOD: Row = {
    "input_ids": [5, 6, 7],
    "topk_ids": [[1, 2], [3, 4], []],
    "topk_logprobs": [[-1.0, -2.0], [-0.5, -3.0], []],
}
BAD = {
    "NaN": ({"topk_logprobs": [[-1.0, math.nan], [-0.5, -3.0], []]}, "position 0 has the logprob"),
    "positive": ({"topk_logprobs": [[-1.0, -2.0], [0.5, -3.0], []]}, "position 1 has the logprob"),
    "id": ({"topk_ids": [[1, 2], [3, V], []]}, f"id {V} is outside the vocabulary of {V}"),
    "negative id": ({"topk_ids": [[1, 2], [3, -1], []]}, "id -1 is outside"),
    "token": ({"input_ids": [5, 6, V]}, f"token id {V} is outside"),
    "twice": ({"topk_ids": [[1, 2], [3, 3], []]}, "position 1 has the id 3 more than once"),
    "mass": ({"topk_logprobs": [[-0.1, -0.2], [-0.5, -3.0], []]}, "probabilities of position 0"),
    "pair": ({"topk_ids": [[1, 2], [3], []]}, "position 1 has 1 ids and 2 logprobs"),
    "length": ({"topk_ids": [[1, 2], [3, 4]]}, "topk_ids has 2 elements; expected 3"),
    "column": ({"labels": [1, 2, 3]}, "the columns are .*labels; expected one of input_ids"),
    "fraction": ({"topk_ids": [[1.5, 2], [3, 4], []]}, "ids are not all whole numbers"),
    "no list": ({"topk_ids": [1, 2, 3]}, "topk_ids contains 1; expected a list"),
}
SERVED_BAD = {
    "first": ([{"1": -1.0}, {"2": -1.0}], "starts with logprobs"),
    "key": ([None, {"x": -1.0}], "has the key 'x'"),
    "shape": ([None, {"1": {"rank": 1}}], "logprobs are not all numbers"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_leaves_nothing(tmp_path, tokenizer, case, suffix):
    changes, said = BAD[case]
    rows = [GOOD, GOOD, GOOD | changes]
    if suffix == "parquet" and case in ("column", "fraction", "no list"):
        rows = [GOOD | changes] * 3  # a file has one schema
    write(tmp_path / f"rows.{suffix}", rows)
    first = len({json.dumps(row) for row in rows}) == 1
    place = {"jsonl": "line 3", "parquet": f"row group {0 if first else 1}, row 0"}[suffix]
    with pytest.raises(InvalidTargetsError, match=f"rows.{suffix}, {place}: .*{said}"):
        import_collected(
            str(tmp_path / f"rows.{suffix}"),
            tokenizer,
            tmp_path / "c",
            vocab_size=V,
            windows_per_shard=1,
        )
    assert [path.name for path in tmp_path.iterdir()] == [f"rows.{suffix}"]


@pytest.mark.parametrize("case", SERVED_BAD)
def test_a_bad_answer_of_a_server_is_named(tmp_path, tokenizer, case):
    elements, said = SERVED_BAD[case]
    write(tmp_path / "rows.jsonl", [{"input_ids": [1, 2], "prompt_logprobs": elements}])
    with pytest.raises(InvalidTargetsError, match=f"rows.jsonl, line 1: .*{said}"):
        import_collected(str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "c", vocab_size=V, k=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_ids": [5, 6, True]}, "token ids are not all whole numbers"),
        ({"topk_ids": [[1, 2], [3, True], []]}, "ids are not all whole numbers"),
        ({"topk_logprobs": [[-1.0, -2.0], [False, -20.0], []]}, "logprobs are not all numbers"),
    ],
)
def test_booleans_are_no_numbers(changes, said):
    with pytest.raises(InvalidTargetsError, match=f"here: {said}"):
        read_row(GOOD | changes, lambda: "here", V, 2)


def test_what_is_there_is_left_alone(tmp_path, tokenizer, imported):
    with pytest.raises(InvalidArgumentError, match="not empty"):
        import_collected(str(tmp_path / "rows.jsonl"), tokenizer, tmp_path / "c", vocab_size=V)
    assert verify(imported).ok


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"vocab_size": 100}, InvalidArgumentError, "more than the vocabulary size of 100"),
        ({"vocab_size": V, "window": 5000}, CorpusError, "too few for a window of 5000"),
        ({"vocab_size": V, "out": "s3://there/c"}, CacheError, "is a URL"),
        ({"vocab_size": V, "window": 0}, InvalidArgumentError, "window.*0"),
        ({"vocab_size": V, "k": 0}, InvalidArgumentError, "k.*0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, tokenizer, arguments, kind, said):
    data = write(tmp_path / "rows.jsonl", [GOOD])
    settings = {"out": tmp_path / "c"} | arguments
    with pytest.raises(kind, match=said):
        import_collected(str(data), tokenizer, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_command(tmp_path, teacher_folder, line):
    data = write(tmp_path / "rows.jsonl", [served(tokens) for tokens in sequences(2)])
    words = ["import", data, "--tokenizer", teacher_folder, "--vocab-size", V]
    code, out, _ = line(*words, "--out", tmp_path / "c", "--teacher", "served", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["identity"]["teacher"]["name"] == "served"
    assert shown["statistics"]["windows"] == 2
    _, _, err = line(*words, "--out", tmp_path / "few")
    told = shlex.split(err.strip().splitlines()[-1].removeprefix("Next: sparselogits "))
    told[told.index("my-run")] = str(tmp_path / "run")
    trained = line(*told, "--device", "cpu")
    assert trained.code == 0, trained.err  # a batch is no larger than the cache
