"""Train a drafter on a draft vocabulary from an ordinary cache."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.corpus import PackedCorpus
from sparselogits.data import DraftVocabulary, TextDataset, collate
from sparselogits.errors import InvalidArgumentError, RecipeError
from sparselogits.evaluate import evaluate
from sparselogits.samplers import TopK
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer
from sparselogits.train import Recipe, run
from sparselogits.train.recipe import parse_recipe
from sparselogits.train.run import _training_arguments
from sparselogits.train.saving import DRAFTER_HEAD
from tests.conftest import tiny_llama
from tests.data.test_mixture import make_cache

DRAFT = DraftVocabulary(torch.arange(0, 480, 3), 512)


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, **options)


def drafter():
    model = tiny_llama(seed=4)
    DRAFT.give_head(model)
    return model


def test_loss_and_gradient_are_those_of_the_classes(tmp_path, cache):
    """Compared with cross-entropies of dense targets, summed one id at a time."""
    dataset, whole = CacheDataset(cache, draft=DRAFT), CacheDataset(cache)
    model = drafter()
    trainer = SparseKDTrainer(model, arguments(tmp_path), train_dataset=dataset, alpha=0.25)
    loss = trainer.compute_loss(model, collate([dataset[0], dataset[1]]))
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for item in (whole[0], whole[1]):
        log_s = model(input_ids=item["input_ids"][None]).logits[0].log_softmax(1)
        for j, label in enumerate(item["shift_labels"].tolist()):
            if label == -100:
                continue
            ids, weights = item["targets"][j]
            places = [i // 3 if i % 3 == 0 and i < 480 else 160 for i in [label, *ids.tolist()]]
            kd = -(log_s[j, places[1:]] * weights).sum()
            total, count = total + 0.75 * kd - 0.25 * log_s[j, places[0]], count + 1
    (total / count).backward()
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_training_and_evaluation_with_a_draft_vocabulary(tmp_path, cache):
    dataset = CacheDataset(cache, draft=DRAFT)
    heldout = TextDataset(PackedCorpus.open(cache / "corpus"), draft=DRAFT)
    trainer = SparseKDTrainer(
        drafter(),
        arguments(tmp_path, max_steps=8, learning_rate=3e-3, logging_steps=1),
        train_dataset=dataset,
        eval_dataset=heldout,
        rounds=6,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    lines = [line for line in trainer.state.log_history if "kd" in line]
    assert lines
    assert all("kl" not in line for line in lines)  # the entropy of the classes is unknown


def test_mismatched_vocabularies_are_refused(tmp_path, cache, teacher_folder, tokenizer):
    dataset = CacheDataset(cache, draft=DRAFT)
    heldout = TextDataset(PackedCorpus.open(cache / "corpus"))
    with pytest.raises(InvalidArgumentError, match=r"520 outputs, expected 161"):
        SparseKDTrainer(tiny_llama(), arguments(tmp_path), train_dataset=dataset)
    with pytest.raises(InvalidArgumentError, match="different draft vocabularies"):
        SparseKDTrainer(drafter(), arguments(tmp_path), train_dataset=dataset, eval_dataset=heldout)
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError, match="all ids of the teacher"):
        SparseKDTrainer(
            drafter(), arguments(tmp_path), train_dataset=dataset, method="full", teacher=teacher
        )


def test_the_ghost_token_has_no_meaning_with_a_class_of_the_rest(tmp_path):
    root = make_cache(tmp_path / "top", 0, sampler=TopK(4))
    dataset = CacheDataset(root, draft=DraftVocabulary(torch.tensor([1, 3, 4, 8]), 9))
    with pytest.raises(InvalidArgumentError, match="ghost' is not defined for a draft vocabulary"):
        SparseKDTrainer(drafter(), arguments(tmp_path), train_dataset=dataset, missing_mass="ghost")


def test_the_command_chooses_and_writes_a_vocabulary(tmp_path, cache):
    def run(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "sparselogits", "draft-vocabulary", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, timeout=240)

    out = tmp_path / "draft.safetensors"
    done = run(cache, "--size", 100, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    draft = DraftVocabulary.load(out)
    assert found["fingerprint"] == draft.fingerprint
    frequencies = PackedCorpus.open(cache / "corpus").token_frequencies
    best = sorted(range(520), key=lambda i: (-frequencies[i], i))
    separator = CacheDataset(cache).identity.packing["separator_id"]
    assert set(best[:99]) <= set(draft.ids.tolist()) | {separator}
    assert separator in draft.ids
    share = frequencies[draft.ids.numpy()].sum() / frequencies.sum()
    assert found["share_of_text"] == pytest.approx(share)
    again = run(cache, "--size", 50, "--out", out, "--by", "teacher")
    assert again.returncode == 2
    assert "another draft vocabulary" in " ".join(again.stderr.split())
    begun = tmp_path / "begun"
    shutil.copytree(cache, begun)
    shutil.rmtree(begun / "shards")
    (begun / "shards").mkdir()
    early = run(begun, "--size", 50, "--out", tmp_path / "early.safetensors")
    assert early.returncode == 2
    assert "no finished shard" in " ".join(early.stderr.split())
    assert not (tmp_path / "early.safetensors").exists()


# -- recipes and the command line ------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory, cache, teacher_folder):
    """A cache, a teacher, a draft vocabulary, a student, and a drafter that a recipe trained."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(cache, folder / "cache")
    shutil.copytree(teacher_folder, folder / "teacher")
    DRAFT.save(folder / "draft.safetensors")
    tiny_llama(seed=4).save_pretrained(folder / "student")
    run(recipe_of(folder), device="cpu")
    return folder


def recipe_of(folder, **changes) -> Recipe:
    values = {
        "cache": folder / "cache",
        "out": folder / "run",
        "student": {"path": str(folder / "student")},
        "draft_vocabulary": folder / "draft.safetensors",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "thinning": {"rounds": 6},
        "alpha": 0.25,
    }
    return parse_recipe(values | changes, source="a test")


def test_a_recipe_trains_what_python_trains(tmp_path, desk, cache):
    recipe = recipe_of(desk)
    torch.manual_seed(recipe.seed)
    model = drafter()
    arguments = _training_arguments(recipe_of(desk, out=tmp_path, eval_strategy="no"), "cpu")
    dataset = CacheDataset(cache, draft=DRAFT)
    SparseKDTrainer(model, arguments, train_dataset=dataset, alpha=0.25, rounds=6).train()
    head = load_file(desk / "run" / DRAFTER_HEAD)
    assert torch.equal(head["lm_head.weight"], model.get_output_embeddings().weight[:-1])
    assert DraftVocabulary.load(desk / "run" / DRAFTER_HEAD) == DRAFT
    assert DraftVocabulary.load(desk / "run" / "model") == DRAFT
    saved = load_language_model(str(desk / "run"), dtype="float32")
    assert saved.get_output_embeddings().weight.shape == (520, 32)
    DRAFT.give_head(saved)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(saved(tokens).logits, model(tokens).logits, atol=1e-6, rtol=1e-6)


def test_a_saved_drafter_generates_draft_ids_alone(desk):
    saved = load_language_model(str(desk / "run"), dtype="float32")
    made = saved.generate(torch.arange(8)[None], do_sample=True, max_new_tokens=40, top_k=0)
    assert set(made[0, 8:].tolist()) <= set(DRAFT.ids.tolist())
    assert len(set(made[0, 8:].tolist())) > 5


def test_eval_reports_the_metrics_of_the_classes(desk, line):
    given = ("eval", desk / "run", "--cache", desk / "cache", "--teacher", desk / "teacher")
    drafted = ("--draft-vocabulary", desk / "draft.safetensors")
    code, out, err = line(*given, *drafted, "--limit", 3, "--draft", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    model = load_language_model(str(desk / "run"), dtype="float32")
    DRAFT.give_head(model)
    windows = TextDataset(PackedCorpus.open(desk / "cache" / "corpus"), limit=3, draft=DRAFT)
    name = str(desk / "teacher")
    teacher = load_teacher(name, tokenizer=load_tokenizer(name))
    expected = evaluate({"student": model}, windows, teacher)
    for name, row in expected.items():
        for metric in ("loss", "kl", "agreement", "acceptance"):
            assert found[name][metric] == pytest.approx(getattr(row, metric), abs=1e-9), metric
    assert found["student"]["acceptance"] < found["teacher"]["acceptance"] < 1
    assert found["student"]["drafting"]["drafts"] == 12
    code, out, err = line(*given, "--draft-vocabulary", desk / "run" / "model", "--limit", 1)
    assert code == 0, err
    assert "160 draft ids and the rest as one class" in out
    assert f"--draft-vocabulary {desk / 'run' / 'model'} --draft 4" in err
    plain = ("eval", desk / "student", "--cache", desk / "cache", *drafted, "--limit", 1)
    assert line(*plain).code == 0  # an ordinary student, of which the draft ids are measured


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "run", "--cache", "cache"), "no draft vocabulary was given"),
        (
            ("eval", "run", "--cache", "cache", "--draft-vocabulary", "other.safetensors"),
            r"DraftVocabulary\(1 of 512 ids\) was given",
        ),
        (
            ("eval", "run", "--cache", "cache", "--draft-vocabulary", "cache"),
            "cannot be read as a draft vocabulary",
        ),
        (
            (
                "eval",
                "run",
                "--cache",
                "cache",
                "--draft-vocabulary",
                "run",
                "--tasks",
                "last_word",
            ),
            "leave --tasks or --draft-vocabulary out",
        ),
        (("view", "cache", "--student", "run"), "no draft vocabulary was given"),
        (
            ("train", "--cache", "cache", "--student", "run", "--out", "again"),
            "no draft vocabulary was given",
        ),
        (
            ("train", "recipe.yaml", "--method", "full", "--teacher", "teacher"),
            "cannot be combined with the method full",
        ),
    ],
)
def test_a_drafter_is_used_with_its_vocabulary(desk, line, monkeypatch, words, said):
    monkeypatch.chdir(desk)
    DraftVocabulary(torch.tensor([5]), 512).save("other.safetensors")
    settings = {"cache": "cache", "out": "again", "draft_vocabulary": "draft.safetensors"}
    Path("recipe.yaml").write_text(json.dumps(settings | {"student": {"size": "tiny"}}))
    code, _, err = line(*words)
    assert code == 2
    assert re.search(said, " ".join(err.split())), err
    assert not (desk / "again" / "model").exists()


def test_the_command_trains_a_new_drafter_and_continues_it(desk, line, monkeypatch):
    monkeypatch.chdir(desk)
    few = ("--num-train-epochs", 0.2, "--per-device-train-batch-size", 4)
    dimensions = ("--student-config", "layers=1,width=32,heads=2")
    drafted = ("--draft-vocabulary", "draft.safetensors")
    code, out, err = line(
        "train", "--cache", "cache", *dimensions, *drafted, *few, "--out", "first"
    )
    assert code == 0, err
    assert f"first/{DRAFTER_HEAD}" in out
    assert "a head for 160 draft ids and the rest" in " ".join(err.split())
    assert "eval first --cache cache --draft-vocabulary draft.safetensors" in err
    code, _, err = line(
        "train", "--cache", "cache", "--student", "first", *drafted, *few, "--out", "second"
    )
    assert code == 0, err
    assert load_file("second/" + DRAFTER_HEAD)["lm_head.weight"].shape == (160, 32)
    code, _, err = line("train", "--cache", "cache", *dimensions, *drafted, *few, "--out", "first")
    assert code == 0
    assert "already finished" in err
    code, _, err = line("train", "--cache", "cache", *dimensions, *few, "--out", "first")
    assert code == 2
    assert "different: draft_vocabulary, cache" in " ".join(err.split())


@pytest.mark.parametrize(
    "student",
    [
        {"path": "my-student", "lora": {"rank": 4}},
        {"size": "tiny", "quantize": {"config": "int4-weight-only"}},
    ],
)
def test_adapters_and_quantised_students_keep_their_heads(tmp_path, student):
    with pytest.raises(RecipeError, match=r"draft_vocabulary cannot be combined with student\."):
        recipe_of(tmp_path, student=student)
