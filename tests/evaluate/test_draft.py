"""Metrics of a drafter with a draft vocabulary, against brute force on all ids of the teacher."""

from statistics import NormalDist

import pytest
import torch

from sparselogits.corpus import open_source, pack, packing_for
from sparselogits.data import DraftVocabulary, TextDataset, collate
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate import draft_from_prefixes, evaluate
from sparselogits.evaluate.acceptance import restricted_acceptance
from sparselogits.teacher import load_teacher
from tests.conftest import tiny_llama

FALSE_ALARM = 1e-6
DRAFT = DraftVocabulary(torch.arange(0, 480, 3), 512)


@pytest.fixture(scope="module")
def windows(tmp_path_factory, tokenizer, text) -> TextDataset:
    packing = packing_for(tokenizer, window_length=24, holdout=0.2)
    out = tmp_path_factory.mktemp("packed")
    corpus = pack(open_source(str(text)), tokenizer, packing, out, vocab_size=520)
    return TextDataset(corpus, limit=30, draft=DRAFT)


@pytest.fixture
def teacher(teacher_folder, tokenizer):
    return load_teacher(str(teacher_folder), tokenizer=tokenizer, slice_positions=10)


@pytest.fixture
def drafter():
    model = tiny_llama(seed=4, initializer_range=0.05)
    DRAFT.give_head(model)
    return model


def test_metrics_are_those_of_the_classes(windows, teacher, drafter):
    few = TextDataset(windows.corpus, limit=4, draft=DRAFT)
    found = evaluate({"drafter": drafter}, few, teacher)
    whole = collate([TextDataset(windows.corpus, limit=4)[i] for i in range(4)])
    counted = whole["shift_labels"] != -100
    taught = teacher.model(input_ids=whole["input_ids"]).logits[counted].double()
    taught[:, 512:] = -torch.inf
    everything = taught.softmax(1)
    ids = DRAFT.ids.tolist()
    inside = set(ids)
    rest = sum(everything[:, i] for i in range(520) if i not in inside)
    p = torch.cat([everything[:, ids], rest[:, None]], 1)
    s = drafter(input_ids=whole["input_ids"]).logits[counted].detach().double().softmax(1)
    true = whole["shift_labels"][counted].tolist()
    labels = [ids.index(i) if i in inside else len(ids) for i in true]
    loss = -s[torch.arange(len(s)), labels].log().mean()
    kl = (p * (p / s).log()).sum(1).mean()
    drawn = s[:, :-1] / s[:, :-1].sum(1, keepdim=True)
    acceptance = torch.minimum(everything[:, ids], drawn).sum(1).mean()
    result = found["drafter"]
    assert result.loss == pytest.approx(float(loss), abs=1e-5)
    assert result.kl == pytest.approx(float(kl), abs=1e-5)
    assert result.acceptance == pytest.approx(float(acceptance), abs=1e-6)
    assert result.agreement == pytest.approx(float((p.argmax(1) == s.argmax(1)).double().mean()))
    assert found["teacher"].acceptance == pytest.approx(float((1 - rest).mean()), abs=1e-6)
    assert result.acceptance < found["teacher"].acceptance < 1


def test_no_drafter_is_accepted_more_often_than_the_vocabulary_is_likely():
    generator = torch.Generator().manual_seed(0)
    log_p, log_s = torch.randn(2, 50, 6, generator=generator).log_softmax(2)
    ceiling = 1 - log_p[:, -1].double().exp()
    assert bool((restricted_acceptance(log_p, log_s) <= ceiling + 1e-6).all())
    torch.testing.assert_close(restricted_acceptance(log_p, log_p), ceiling, atol=1e-6, rtol=0)


def test_realised_acceptance_is_the_expected_one(windows, teacher, drafter):
    found = draft_from_prefixes(drafter, windows, teacher, draft=3, prefixes=4)
    limit = -NormalDist().inv_cdf(FALSE_ALARM / 2)
    assert abs(found.acceptance - found.expected) < limit * found.error
    assert 0.02 < found.expected < 0.95


def test_a_student_without_the_classes_is_refused(windows, teacher):
    few = TextDataset(windows.corpus, limit=1, draft=DRAFT)
    for measure in (
        lambda: evaluate({"student": tiny_llama()}, few, teacher),
        lambda: draft_from_prefixes(tiny_llama(), few, teacher),
    ):
        with pytest.raises(InvalidArgumentError, match=r"520 outputs, expected 161 .*give_head"):
            measure()


def test_a_draft_vocabulary_of_another_tokenizer_is_refused(windows):
    with pytest.raises(InvalidArgumentError, match="has the id 600, but the teacher of the text"):
        TextDataset(windows.corpus, draft=DraftVocabulary(torch.tensor([1, 600]), 700))
    small = TextDataset(windows.corpus, draft=DraftVocabulary(torch.arange(4), 5))
    with pytest.raises(InvalidArgumentError, match="but the draft vocabulary is for a teacher of"):
        evaluate({}, small)
