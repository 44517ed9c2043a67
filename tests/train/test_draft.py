"""Train a drafter on a draft vocabulary from an ordinary cache."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.corpus import PackedCorpus
from sparselogits.data import DraftVocabulary, TextDataset, collate
from sparselogits.errors import InvalidArgumentError
from sparselogits.samplers import TopK
from sparselogits.teacher import load_teacher
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
