"""Test that held-out metrics equal those of a plain computation on all logits."""

import numpy as np
import pytest
import torch

from sparselogits.corruption import Corruption, TokenKinds
from sparselogits.data import TextDataset, collate
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate import evaluate
from sparselogits.language_model import Head
from sparselogits.objectives import Masked
from sparselogits.teacher import TransformersTeacher, load_teacher
from tests.conftest import tiny_llama
from tests.masked_models import MODELS


@pytest.fixture(scope="module", params=[False, True], ids=["attention kept", "attention reset"])
def windows(request, packed_text) -> TextDataset:
    corpus = packed_text(48, holdout=0.2, reset_attention=request.param)
    return TextDataset(corpus, limit=5)


def test_against_a_plain_computation(windows, teacher_folder, tokenizer):
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer, slice_positions=20)
    student = tiny_llama(seed=4)
    found = evaluate({"student": student}, windows, teacher)
    batch = collate([windows[i] for i in range(len(windows))])
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "position_ids")}
    counted = batch["shift_labels"] != -100
    log_s = student(**inputs).logits[counted].double().log_softmax(-1)
    taught = teacher.model(**inputs).logits[counted].double()
    taught[:, 512:] = -torch.inf
    log_p = taught.log_softmax(-1)
    labels = batch["shift_labels"][counted]
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_s), 0.0).sum(-1).mean()
    result = found["student"]
    assert abs(result.loss + log_s.gather(1, labels[:, None]).mean()) < 1e-5
    assert result.kl == pytest.approx(float(kl), abs=1e-5)
    agreement = (log_s.argmax(-1) == log_p.argmax(-1)).double().mean()
    assert result.agreement == pytest.approx(float(agreement))
    assert found["teacher"].kl == pytest.approx(0.0, abs=1e-9)
    assert found["teacher"].agreement == 1.0
    assert result.positions == int(counted.sum())
    assert len(result.loss_by_window) == 5
    with pytest.raises(InvalidArgumentError, match="rename the student"):
        evaluate({"teacher": student}, windows, teacher)


@pytest.mark.parametrize("name", MODELS)
def test_masked_models_against_a_plain_computation(name, packed_text, monkeypatch):
    """Heads multiply the chosen positions alone, and the metrics are those of all logits."""
    corpus = packed_text(48, holdout=0.2)
    kinds = TokenKinds(np.arange(520) < 4, None, np.zeros(520, np.int8), np.zeros(520, np.int8))
    windows = TextDataset(corpus, limit=5, corruption=Corruption(Masked(3), kinds))
    torch.manual_seed(0)
    models = [MODELS[name](vocab_size=520).eval() for _ in range(2)]
    for model in models:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    batch = collate([windows[i] for i in range(len(windows))])
    counted, labels = batch["shift_labels"] != -100, batch["labels"]
    with torch.no_grad():
        log_p, log_s = (
            model(input_ids=batch["input_ids"]).logits[counted].double().log_softmax(-1)
            for model in models
        )
    rows = []
    multiply = Head.__call__

    def recorded(head, hidden):
        if hidden.dim() == 2:  # not the probe of a model
            rows.append(len(hidden))
        return multiply(head, hidden)

    teacher = TransformersTeacher(models[0], identity={}, slice_positions=20)
    monkeypatch.setattr(Head, "__call__", recorded)
    found = evaluate({"student": models[1]}, windows, teacher)["student"]
    assert found.positions == int(counted.sum()) < 0.3 * counted.numel()
    assert sum(rows) == 2 * found.positions  # of teacher and student
    loss = -log_s.gather(1, labels[counted][:, None]).mean()
    assert found.loss == pytest.approx(float(loss), abs=1e-5)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_s)).sum(1).mean()), abs=1e-5)


def test_without_a_teacher_there_is_no_divergence(windows):
    found = evaluate({"student": tiny_llama()}, windows)
    assert set(found) == {"student"}
    assert found["student"].kl is None


def test_a_student_of_fewer_ids_is_refused(windows, teacher_folder, tokenizer):
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    with pytest.raises(InvalidArgumentError, match="fewer"):
        evaluate({"student": tiny_llama(vocab_size=515)}, windows, teacher)


def test_no_windows_is_an_error(windows):
    with pytest.raises(InvalidArgumentError, match="--holdout"):
        evaluate({}, TextDataset(windows.corpus, limit=0))
