"""Training masked language models: every method against a plain computation, and end to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.data import collate
from sparselogits.errors import InvalidArgumentError
from sparselogits.identity import Identity
from sparselogits.objectives import Masked
from sparselogits.samplers import Systematic
from sparselogits.store import Cache, WindowRecord, codec_for
from sparselogits.targets import SparseTargets
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective, bind
from tests.conftest import tiny_llama
from tests.masked_models import tiny_bert

V, LENGTH, WINDOWS, MASK = 96, 24, 12, 4


def make_cache(folder: Path, rate: float | None = 0.3) -> CacheDataset:
    """A cache whose targets are drawn by the library from random distributions."""
    objective = Masked(MASK, rate=rate)
    rng = np.random.default_rng(0)
    sampler = Systematic(6)
    identity = Identity(
        teacher={"name": "none", "weights": "0"},
        tokenizer="0",
        vocab_size=V,
        token_mask="all",
        window_length=LENGTH,
        windows_per_shard=WINDOWS,
        packing={"separator_id": 1, "bos_id": None, "reset_attention": False},
        sampler={"name": sampler.name, **sampler.parameters()},
        seed=0,
        temperature=1.0,
        codec=codec_for(sampler),
        objective=objective.to_json(),
    )
    records = []
    for index in range(WINDOWS):
        tokens = rng.integers(5, V, LENGTH).astype(np.int32)
        own = 0.3 if rate is not None else float(np.float32(rng.uniform(0.2, 1)))
        chosen = rng.random(LENGTH) < own
        logits = torch.from_numpy(rng.normal(size=(int(chosen.sum()), V)) * 2).float()
        drawn = sampler(logits, torch.from_numpy(rng.random((len(logits), 1))))
        lengths = torch.zeros(LENGTH, dtype=torch.int64)
        lengths[chosen] = drawn.entries_per_position
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        targets = SparseTargets(
            drawn.ids, drawn.weights, offsets, V, counts=drawn.counts, rounds=drawn.rounds
        )
        inputs = np.where(chosen, MASK, tokens).astype(np.int32)
        starts = np.zeros(0, np.int32)
        figures = (3.0, 2.0)
        records.append(WindowRecord(index, tokens, starts, chosen, targets, *figures, inputs, own))
    Cache.create(folder, identity).commit(records, {})
    return CacheDataset(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CacheDataset:
    return make_cache(tmp_path_factory.mktemp("masked") / "cache")


def log_probabilities(model: BertForMaskedLM, batch: dict[str, Tensor]) -> Tensor:
    """float [M, V] at the positions with a label, by transformers alone."""
    logits = model(input_ids=batch["input_ids"]).logits
    return logits[batch["shift_labels"] != -100].log_softmax(-1)


def losses(method: str, student: Tensor, teacher: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each labelled position as the table of methods defines it."""
    counted = batch["shift_labels"] != -100
    if method == "ce":
        return -student.gather(1, batch["shift_labels"][counted][:, None])[:, 0]
    if method == "sparse":
        dense = torch.zeros(len(student), V)
        dense.scatter_add_(1, batch["target_ids"][counted], batch["target_weights"][counted])
        return -(dense * student).sum(1)
    if method == "full":
        return -(teacher.exp() * student).sum(1)
    return (student.exp() * (student - teacher)).sum(1)


@pytest.mark.parametrize("method", ["ce", "sparse", "full", "reverse_kl"])
def test_the_loss_and_its_gradient_are_those_of_a_plain_computation(method, dataset):
    batch = dataset[0:4]
    teacher = TransformersTeacher(tiny_bert(seed=2).eval(), identity={})
    taught = log_probabilities(teacher.model, batch).detach()
    plain = tiny_bert().eval()
    expected = losses(method, log_probabilities(plain, batch), taught, batch).mean()
    expected.backward()

    student = tiny_bert().eval()
    bind(student, Objective(method, masked=True, teacher_head=teacher.head))
    inputs = dict(batch)
    if method in ("full", "reverse_kl"):
        inputs["teacher_hidden"] = teacher.hidden(batch["input_ids"])
    if method != "sparse":
        inputs = {k: v for k, v in inputs.items() if not k.startswith("target")}
    loss = student(**inputs).loss
    loss.backward()
    entropy = -(taught.exp() * taught).sum(1).mean() if method == "full" else 0.0
    differences = [float(loss - expected), float(loss + entropy - expected)]
    assert min(map(abs, differences)) < 1e-5  # full KD is reported as KL or as cross-entropy
    for one, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_only_positions_with_a_label_are_multiplied_by_the_head(dataset, monkeypatch):
    from sparselogits.train import objective as module

    rows: list[int] = []
    plain = module.linear_sparse_cross_entropy

    def counted(states: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(states))
        return plain(states, *arguments, **options)

    monkeypatch.setattr(module, "linear_sparse_cross_entropy", counted)
    student, batch = tiny_bert(), dataset[0:4]
    bind(student, Objective("sparse", masked=True))
    student(**batch)
    labelled = int((batch["shift_labels"] != -100).sum())
    assert rows[0] in (labelled, labelled + 1)
    assert labelled < 0.5 * batch["shift_labels"].numel()


def test_a_batch_without_a_label_has_a_loss_of_zero_and_gradients(dataset):
    student = tiny_bert()
    bind(student, Objective("sparse", masked=True))
    batch = dataset[0:2]
    batch["shift_labels"] = torch.full_like(batch["shift_labels"], -100)
    loss = student(**batch).loss
    loss.backward()
    assert float(loss) == 0.0


def test_windows_of_random_rates_weigh_as_masked_diffusion(tmp_path):
    """The mean over windows of (1 / rate) times the summed loss, per token."""
    batch = make_cache(tmp_path / "c", rate=None)[0:6]
    plain = tiny_bert().eval()
    log_s = log_probabilities(plain, batch)
    owner = (batch["shift_labels"] != -100).nonzero()[:, 0]
    weighted = losses("ce", log_s, log_s, batch) * batch["loss_weight"][owner]
    expected = weighted.sum() / batch["input_ids"].numel()
    student = tiny_bert().eval()
    bind(student, Objective("ce", masked=True))
    inputs = {k: v for k, v in batch.items() if not k.startswith("target")}
    assert float(student(**inputs).loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("rate", [0.3, None])
def test_a_student_learns_from_a_masked_cache(rate, tmp_path):
    dataset = make_cache(tmp_path / "c", rate)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=30,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    student = tiny_bert()
    trainer = SparseKDTrainer(student, arguments, train_dataset=dataset)
    trainer.train()
    logged = [line["kd"] for line in trainer.state.log_history if "kd" in line]
    assert np.mean(logged[-3:]) < np.mean(logged[:3]) - 0.3
    if rate is not None:
        first = collate([dataset[i] for i in range(4)])
        assert torch.isfinite(student(input_ids=first["input_ids"]).logits).all()


def test_a_cache_and_a_student_that_do_not_fit_are_refused_by_name(dataset, cache, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(InvalidArgumentError, match="causal language model, but the cache is for"):
        SparseKDTrainer(tiny_llama(vocab_size=V), arguments, train_dataset=dataset)
    with pytest.raises(InvalidArgumentError, match="masked language model, but the cache is for"):
        SparseKDTrainer(tiny_bert(vocab_size=520), arguments, train_dataset=CacheDataset(cache))
