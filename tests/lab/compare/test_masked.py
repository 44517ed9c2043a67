"""Test comparisons of a tiny masked teacher: training, evaluation, resuming, refusals."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from sparselogits.corpus import PackedCorpus
from sparselogits.corruption import Corruption
from sparselogits.errors import InvalidArgumentError, RecipeError, ShrinkError
from sparselogits.lab.compare import Results, compare, parse_compare_recipe, read_results
from sparselogits.lab.report.comparison import report_page
from sparselogits.store import Cache
from sparselogits.train.trainer import SparseKDTrainer
from tests.masked_models import VOCABULARY, bert_tokenizer, tiny_bert, write_short_texts

METHODS: list[Any] = [
    "ce",
    "full",
    "reverse_kl",
    {"sampler": "topk", "k": 12},
    {"sampler": "multinomial", "budget": 12},
    {"sampler": "systematic", "budget": 12},
]
NEW, PRUNED = "new", "every second layer"


@pytest.fixture(scope="module")
def values(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("masked")
    options = {"num_hidden_layers": 4, "initializer_range": 0.1}
    tiny_bert(vocab_size=VOCABULARY, **options).save_pretrained(folder / "bert")
    bert_tokenizer().save_pretrained(folder / "bert")
    return {
        "teacher": str(folder / "bert"),
        "data": str(write_short_texts(text, folder / "text.jsonl")),
        "out": str(folder / "out"),
        "window": 32,
        "holdout": 0.2,
        "heldout_windows": 4,
        "mask_rate": 0.3,
        "mask_units": "spans",
        "students": {
            NEW: {"hidden_size": 16, "layers": 1, "heads": 2},
            PRUNED: {"from": "teacher", "drop_layers": [1, 3]},
        },
        "training": {
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "max_steps": 6,
        },
        "seeds": [0],
        "resamples": 20,
        "methods": METHODS,
    }


@pytest.fixture(scope="module")
def results(values: dict[str, Any]) -> Results:
    return compare(parse_compare_recipe(values, source="test"))


def test_every_method_trains_students_of_the_teachers_kind(
    results: Results, values: dict[str, Any]
) -> None:
    assert results.complete, [run.message for run in results.runs]
    out = Path(values["out"])
    for run in results.runs:
        config = json.loads((out / str(run.folder) / "model" / "config.json").read_text())
        assert config["architectures"] == ["BertForMaskedLM"]
        sizes = [config[n] for n in ("num_hidden_layers", "hidden_size", "intermediate_size")]
        assert sizes == ([1, 16, 24] if run.student == NEW else [2, 32, 48])
    (start,) = (folder for folder in (out / "students").iterdir() if "second" in folder.name)
    pruned = AutoModelForMaskedLM.from_pretrained(start).state_dict()
    teacher = AutoModelForMaskedLM.from_pretrained(values["teacher"]).state_dict()
    for ours, theirs in ((0, 0), (1, 2)):
        name = "bert.encoder.layer.{}.output.dense.weight"
        assert torch.equal(pruned[name.format(ours)], teacher[name.format(theirs)])


def test_all_caches_hide_the_same_tokens(results: Results, values: dict[str, Any]) -> None:
    caches = [Cache.open(path) for path in (Path(values["out"]) / "caches").iterdir()]
    assert len(caches) == 4  # of the three samplers, and the one from which CE reads labels
    objectives = {json.dumps(cache.identity.objective, sort_keys=True) for cache in caches}
    assert len(objectives) == 1
    objective = results.settings["objective"]
    assert [objective[name] for name in ("rate", "units", "span")] == [0.3, "spans", 3.0]
    first, *others = (cache.read(0) for cache in caches)
    assert all((other.inputs == first.inputs).all() for other in others)


def test_metrics_are_those_of_the_masked_positions(
    results: Results, values: dict[str, Any]
) -> None:
    """Loss, perplexity, KL and agreement by a calculation of its own, in float64."""
    out = Path(values["out"])
    (run,) = (r for r in results.runs if (r.method, r.student) == ("full KD", PRUNED))
    student = AutoModelForMaskedLM.from_pretrained(out / str(run.folder) / "model").eval()
    teacher = AutoModelForMaskedLM.from_pretrained(values["teacher"]).eval()
    corpus = PackedCorpus.open(out / "corpus")
    corruption = Corruption.of_tokenizer(
        bert_tokenizer(), VOCABULARY, rate=0.3, units="spans", span=3.0
    )
    tokens = len(bert_tokenizer())
    loss, kl, agreements, positions = 0.0, 0.0, 0, 0
    for window in corpus.read_holdout(0, 4):
        corrupted = corruption(window.tokens, window.index, held_out=True)
        ids = torch.from_numpy(corrupted.inputs).long()[None]
        chosen = torch.from_numpy(corrupted.chosen)
        with torch.no_grad():
            q = student(ids).logits[0, chosen].double().log_softmax(1)
            p = teacher(ids).logits[0, chosen, :tokens].double().log_softmax(1)
        labels = torch.from_numpy(window.tokens).long()[chosen]
        loss -= float(q.gather(1, labels[:, None]).sum())
        kl += float((p.exp() * (p - q[:, :tokens])).sum())
        agreements += int((p.argmax(1) == q.argmax(1)).sum())
        positions += int(chosen.sum())
    assert run.figures["loss"] == pytest.approx(loss / positions, rel=1e-4)
    assert run.figures["perplexity"] == pytest.approx(math.exp(loss / positions), rel=1e-4)
    assert run.figures["kl"] == pytest.approx(kl / positions, rel=1e-3)
    assert run.figures["agreement"] == pytest.approx(agreements / positions, abs=1e-6)


def test_the_page_says_what_is_predicted(results: Results) -> None:
    page = report_page(results)
    assert "masked: 0.3 of the tokens is predicted" in page
    assert "acceptance" not in page
    assert "agreement %" in page
    assert re.search(r"from \d+\.\d entries per masked token \(\d", page)


def test_interrupted_in_a_run_it_ends_with_the_same_students(
    results: Results, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    training = values["training"] | {"save_steps": 2}
    own = values | {"out": str(out), "training": training, "methods": ["full", METHODS[4]]}
    own["students"] = {NEW: values["students"][NEW]}
    steps = 0
    step = SparseKDTrainer.training_step

    def stops(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 10:  # in the second run, after its checkpoint of step 2
            raise KeyboardInterrupt
        return step(self, *arguments, **options)

    recipe = parse_compare_recipe(own, source="test")
    with monkeypatch.context() as patch:
        patch.setattr(SparseKDTrainer, "training_step", stops)
        with pytest.raises(KeyboardInterrupt):
            compare(recipe)
    assert [run.status for run in read_results(out).runs] == ["done", "not run"]
    assert list(out.glob("runs/*/checkpoints/checkpoint-2"))
    resumed = compare(recipe)
    # what the uninterrupted comparison measured
    whole = {(run.method, run.student): run for run in results.runs}
    for run in resumed.runs:
        assert run.figures == whole[run.method, NEW].figures
        assert run.curve == whole[run.method, NEW].curve
    shutil.rmtree(out)


def test_distilberts_way_with_a_window_per_document(values: dict[str, Any], tmp_path: Path) -> None:
    changes = {
        "out": str(tmp_path / "out"),
        "window": 48,
        "packing": "documents",
        "students": {"half": {"from": "teacher", "layers": 2, "layer_score": "spaced"}},
        "training": values["training"] | {"max_steps": 2},
        "methods": ["ce", {"method": "full", "alpha": 0.3, "cosine": 0.5}, METHODS[-1]],
        "gradients": {"windows": 2, "batch_windows": [2], "draws": 2},
    }
    found = compare(parse_compare_recipe(values | changes, source="test"))
    assert found.complete, [run.message for run in found.runs]
    assert {run.method for run in found.runs} >= {"full KD, alpha 0.3, cosine 0.5"}
    measured = {row.method: row.gradient for row in found.methods if row.gradient is not None}
    assert set(measured) == {"CE", "systematic 12"}, [row.gradient_failure for row in found.methods]
    assert all(0 < own.sizes[0].angle.mean < 180 for own in measured.values())
    for path in (tmp_path / "out" / "caches").iterdir():
        assert Cache.open(path).identity.packing["kind"] == "documents"


def test_layers_are_ranked_on_masked_text_and_the_untrained_student_is_measured(
    values: dict[str, Any], tmp_path: Path
) -> None:
    own = values | {"out": str(tmp_path / "out"), "methods": ["none"]}
    own["students"] = {"half": {"from": "teacher", "layers": 2, "intermediate_size": 24}}
    (run,) = compare(parse_compare_recipe(own, source="test")).runs
    assert run.status == "done", run.message
    (start,) = (tmp_path / "out" / "students").iterdir()
    config = AutoModelForMaskedLM.from_pretrained(start).config
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 24)


def test_another_masking_is_another_cache_and_is_refused(
    results: Results, values: dict[str, Any]
) -> None:
    other = parse_compare_recipe(values | {"mask_rate": 0.15}, source="test")
    with pytest.raises(Exception, match="objective"):
        compare(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft": 3}, "draft: measured for causal language models only"),
        ({"tasks": {"names": ["continuation"]}}, "tasks: measured for causal"),
        (
            {"students": {NEW: {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1}}},
            "num_key_value_heads is 1, but the configuration of the teacher's class",
        ),
        (
            {"students": {NEW: {"from": "teacher", "layers": 2, "layer_score": "loss"}}},
            f"students.{NEW}: layer_score is loss",
        ),
        (
            {"students": {NEW: {"config": "BROKEN"}}},
            f"students.{NEW}: student: cannot create a language model",
        ),
        (
            {"methods": [{"method": "full", "cosine": 0.5}]},
            f"students.{NEW}: the hidden size is 16 and the teacher's is 32",
        ),
        (
            {"students": {NEW: {"from": "teacher", "hidden_size": 64}}},
            "64",
        ),
    ],
)
def test_what_a_masked_teacher_does_not_have_is_refused_before_caches(
    values: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    broken = tmp_path / "config.json"
    settings = {"hidden_size": 30, "num_attention_heads": 4, "architectures": ["BertForMaskedLM"]}
    broken.write_text(json.dumps({"model_type": "bert", **settings}))
    if "BROKEN" in str(change):
        change = {"students": {NEW: {"config": str(broken)}}}
    own = values | {"out": str(tmp_path / "out")} | change
    with pytest.raises((InvalidArgumentError, RecipeError, ShrinkError), match=message):
        compare(parse_compare_recipe(own, source="test"))
    assert not (tmp_path / "out" / "caches").exists()


def test_a_causal_teacher_takes_no_mask_settings(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tiny(tmp_path, methods=["ce"], mask_rate=0.3)
    with pytest.raises(InvalidArgumentError, match="mask_rate is for a masked language model"):
        compare(parse_compare_recipe(recipe, source="test"))
    assert not (tmp_path / "out" / "corpus").exists()


def test_a_causal_student_of_a_masked_teacher_fails_by_name(
    values: dict[str, Any], teacher_folder: Path, tmp_path: Path
) -> None:
    own = values | {"out": str(tmp_path / "out"), "methods": ["ce"]}
    own["students"] = {"causal": {"config": str(teacher_folder)}}
    (run,) = compare(parse_compare_recipe(own, source="test")).runs
    assert run.status == "failed"
    assert "causal" in str(run.message)
    assert "masked" in str(run.message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_rate": 1.5}, "mask_rate"),
        ({"mask_rate": "often"}, "mask_rate"),
        ({"mask_units": "letters"}, "mask_units"),
        ({"mask_units": "words", "mask_span": 4}, "mask_span=4 needs mask_units: spans"),
    ],
)
def test_wrong_mask_settings_are_refused(
    values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_compare_recipe(values | change, source="test")
