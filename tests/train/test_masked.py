"""Training masked language models: every method against a plain computation, and end to end."""

import itertools

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.data import collate
from sparselogits.documents import restarting_positions
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning
from sparselogits.identity import Identity
from sparselogits.language_model import recording_last_states, split
from sparselogits.objectives import Masked
from sparselogits.samplers import Systematic
from sparselogits.store import Cache, WindowRecord, codec_for
from sparselogits.targets import SparseTargets
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective, bind
from sparselogits.train.recipe import parse_recipe
from sparselogits.train.run import run
from tests.conftest import tiny_llama
from tests.masked_models import MODELS, tiny_bert

V, LENGTH, WINDOWS, MASK = 96, 24, 12, 4


def make_cache(folder, rate=0.3):
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
def dataset(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("masked") / "cache")


def log_probabilities(model, batch):
    """float [M, V] at the positions with a label, by transformers alone."""
    logits = model(input_ids=batch["input_ids"]).logits
    return logits[batch["shift_labels"] != -100].log_softmax(-1)


def losses(method, student, teacher, batch):
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


@pytest.mark.parametrize("name", [*MODELS, "Llama"])
def test_recorded_states_are_the_last_hidden_states_of_transformers(name):
    model = (MODELS[name]() if name in MODELS else tiny_llama(vocab_size=V)).eval()
    tokens = torch.arange(2, 42)[None]
    with recording_last_states(model) as recorded:
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    assert len(recorded) == 1
    torch.testing.assert_close(recorded[0], expected)
    parts = split(model)
    with recording_last_states(model) as recorded:
        parts.states(input_ids=tokens)
    torch.testing.assert_close(recorded[0], expected)


def cosine_of_distilbert(student, teacher, batch):
    """The cosine loss as in the step of DistilBERT's distiller."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    s = student(**given, output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        t = teacher(**given, output_hidden_states=True).hidden_states[-1]
    mask = batch["attention_mask"].bool().unsqueeze(-1).expand_as(s)
    s, t = (torch.masked_select(x, mask).view(-1, x.size(-1)) for x in (s, t))
    return torch.nn.CosineEmbeddingLoss(reduction="mean")(s, t, s.new_ones(len(s)))


@pytest.mark.parametrize("method", ["full", "reverse_kl"])
def test_the_cosine_loss_is_that_of_distilbert(method, dataset, tmp_path):
    batch = dataset[0:4]
    lengths = torch.tensor([LENGTH, 9, 17, 20])
    batch["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    for name in ("labels", "shift_labels"):
        batch[name] = batch[name].where(batch["attention_mask"] > 0, -100)
    teacher = TransformersTeacher(tiny_bert(seed=2).eval(), identity={})
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    gradients, found = [], []
    for cosine in (0.0, 0.7):
        student = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = SparseKDTrainer(
            *(student, arguments),
            **{"train_dataset": dataset, "method": method, "teacher": teacher, "cosine": cosine},
        )
        student.train()
        loss = trainer.compute_loss(student, trainer._prepare_inputs(dict(batch)))
        loss.backward()
        found.append(float(loss))
        gradients.append([p.grad for p in student.parameters()])
        logged = trainer.objective.training.take()
    plain = tiny_bert().eval()
    expected = cosine_of_distilbert(plain, teacher.model, batch)
    expected.backward()
    assert logged["cosine"] == pytest.approx(float(expected), rel=1e-5)
    assert found[1] - found[0] == pytest.approx(0.7 * float(expected), rel=1e-4)
    for without, own, of_cosine in zip(*gradients, plain.parameters(), strict=True):
        added = 0.0 if of_cosine.grad is None else 0.7 * of_cosine.grad
        torch.testing.assert_close(own, without + added, rtol=1e-3, atol=1e-6)


def test_the_cosine_loss_of_a_causal_student(cache, tmp_path):
    """Position by position: its last hidden states are the input of the head."""
    dataset = CacheDataset(cache)
    batch = dataset[0:2]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    size = dataset.identity.vocab_size
    teacher = TransformersTeacher(tiny_llama(seed=3, vocab_size=size), identity={})
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    found = []
    for cosine in (0.0, 2.0):
        student = tiny_llama(vocab_size=size)
        options = {"method": "full", "teacher": teacher, "cosine": cosine}
        trainer = SparseKDTrainer(student, arguments, train_dataset=dataset, **options)
        student.train()
        found.append(float(trainer.compute_loss(student, trainer._prepare_inputs(dict(batch)))))
    expected = cosine_of_distilbert(student, teacher.model, batch)
    assert found[1] - found[0] == pytest.approx(2 * float(expected), rel=1e-4)


def test_a_cosine_loss_that_cannot_be_computed_is_refused(dataset, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    for method in ("sparse", "ce"):
        with pytest.raises(InvalidArgumentError, match="which a cache does not contain"):
            SparseKDTrainer(
                tiny_bert(), arguments, train_dataset=dataset, method=method, cosine=1.0
            )
    teacher = TransformersTeacher(tiny_bert(seed=2).eval(), identity={})
    options = {"train_dataset": dataset, "method": "full", "teacher": teacher}
    with pytest.raises(InvalidArgumentError, match="at least 0"):
        SparseKDTrainer(tiny_bert(), arguments, cosine=-1.0, **options)
    with pytest.raises(InvalidArgumentError, match="the student's have 16 numbers"):
        SparseKDTrainer(tiny_bert(hidden_size=16), arguments, cosine=1.0, **options)


def test_documents_of_a_window_do_not_attend_to_each_other(dataset):
    batch = dataset[0:3]
    starts = [np.array([0, 7, 8]), np.array([13]), np.array([0])]
    batch["position_ids"] = restarting_positions(LENGTH, starts)
    plain = tiny_bert().eval()
    expected = torch.zeros(())
    for row, labels, own in zip(batch["input_ids"], batch["shift_labels"], starts, strict=True):
        for a, b in itertools.pairwise([*dict.fromkeys([0, *own.tolist()]), LENGTH]):
            logits = plain(input_ids=row[None, a:b]).logits[0]
            expected = expected + torch.nn.functional.cross_entropy(
                logits, labels[a:b], reduction="sum"
            )
    expected = expected / (batch["shift_labels"] != -100).sum()
    expected.backward()
    student = tiny_bert().eval()
    bind(student, Objective("ce", masked=True))
    loss = student(**{k: v for k, v in batch.items() if not k.startswith("target")}).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [0.3, None])
def test_labels_are_smoothed_as_by_pytorch(rate, tmp_path):
    batch = make_cache(tmp_path / "c", rate)[0:6]
    plain = tiny_bert().eval()
    counted = batch["shift_labels"] != -100
    logits = plain(input_ids=batch["input_ids"]).logits[counted]
    smoothed = torch.nn.functional.cross_entropy(
        logits, batch["shift_labels"][counted], label_smoothing=0.1, reduction="none"
    )
    if rate is None:
        weights = batch["loss_weight"][counted.nonzero()[:, 0]]
        expected = (smoothed * weights).sum() / batch["input_ids"].numel()
    else:
        expected = smoothed.mean()
    expected.backward()
    student = tiny_bert().eval()
    bind(student, Objective("ce", masked=True, label_smoothing=0.1))
    loss = student(**{k: v for k, v in batch.items() if not k.startswith("target")}).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_only_positions_with_a_label_are_multiplied_by_the_head(dataset, monkeypatch):
    from sparselogits.train import objective as module

    rows = []
    plain = module.linear_sparse_cross_entropy

    def counted(states, *arguments, **options):
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


def test_the_evaluation_loss_does_not_depend_on_the_batch_size(tmp_path):
    """Windows differ in their numbers of labels, and the last batch is smaller."""
    dataset = make_cache(tmp_path / "c", rate=None)
    student = tiny_bert()
    loss, count = 0.0, 0
    for item in map(dataset.__getitem__, range(WINDOWS)):
        kept = item["shift_labels"] != -100
        with torch.no_grad():
            log_s = student.eval()(input_ids=item["input_ids"][None]).logits[0].log_softmax(-1)
        loss -= float(log_s[kept].gather(1, item["shift_labels"][kept][:, None]).sum())
        count += int(kept.sum())
    for size in (1, 5, WINDOWS):
        arguments = TrainingArguments(
            str(tmp_path / "run"), per_device_eval_batch_size=size, report_to="none", use_cpu=True
        )
        trainer = SparseKDTrainer(student, arguments, train_dataset=dataset, eval_dataset=dataset)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss / count, rel=1e-5)
    # the loss of a batch, from which several ranks compute theirs, is not divided by all tokens
    (batch,) = trainer.get_eval_dataloader()
    own, *_ = trainer.prediction_step(student, batch, prediction_loss_only=True)
    assert float(own) == pytest.approx(loss / count, rel=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_windows_of_random_rates_weigh_as_masked_diffusion(padded, tmp_path):
    """The mean over windows of (1 / rate) times the summed loss, per token that is no padding."""
    dataset = make_cache(tmp_path / "c", rate=None)
    batch = dataset[0:6]
    mask = torch.ones_like(batch["input_ids"])
    if padded:
        mask[:3, 15:] = 0
        batch["shift_labels"] = batch["shift_labels"].masked_fill(mask == 0, -100)
        batch["attention_mask"] = mask
    plain = tiny_bert().eval()
    logits = plain(input_ids=batch["input_ids"], attention_mask=mask).logits
    log_s = logits[batch["shift_labels"] != -100].log_softmax(-1)
    owner = (batch["shift_labels"] != -100).nonzero()[:, 0]
    weighted = losses("ce", log_s, log_s, batch) * batch["loss_weight"][owner]
    expected = weighted.sum() / mask.sum()
    student = tiny_bert().eval()
    bind(student, Objective("ce", masked=True))
    inputs = {k: v for k, v in batch.items() if not k.startswith("target")}
    assert float(student(**inputs).loss) == pytest.approx(float(expected), rel=1e-5)
    objective = Objective("sparse", masked=True)
    student = tiny_bert().eval()
    bind(student, objective)
    student(**batch)
    entries = (batch["target_weights"] != 0).sum(-1)[batch["shift_labels"] != -100]
    assert objective.training.take()["entries"] == pytest.approx(float(entries.double().mean()))
    arguments = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    trainer = SparseKDTrainer(tiny_bert(), arguments, train_dataset=dataset)
    assert int(trainer._get_num_items_in_batch([batch], torch.device("cpu"))) == int(mask.sum())


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


def test_an_adapter_names_the_masked_model_below(tmp_path):
    from peft import AutoPeftModel

    make_cache(tmp_path / "c")
    tiny_bert().save_pretrained(tmp_path / "base")
    student = {"path": str(tmp_path / "base"), "lora": {"rank": 2, "targets": ["query"]}}
    values = {"cache": tmp_path / "c", "out": tmp_path / "run", "student": student, "max_steps": 2}
    values["per_device_train_batch_size"] = 4
    with pytest.warns(SparseLogitsWarning, match="no tokenizer will be saved"):
        found = run(parse_recipe(values, source="test"), device="cpu")
    merged = BertForMaskedLM.from_pretrained(found.model_path).eval()
    apart = AutoPeftModel.from_pretrained(tmp_path / "run" / "adapter").eval()
    assert isinstance(apart.get_base_model(), BertForMaskedLM)
    ids = torch.tensor([[5, MASK, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, apart(input_ids=ids).logits)


def test_a_cache_and_a_student_that_do_not_fit_are_refused_by_name(dataset, cache, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(InvalidArgumentError, match="causal language model, but the cache is for"):
        SparseKDTrainer(tiny_llama(vocab_size=V), arguments, train_dataset=dataset)
    with pytest.raises(InvalidArgumentError, match="masked language model, but the cache is for"):
        SparseKDTrainer(tiny_bert(vocab_size=520), arguments, train_dataset=CacheDataset(cache))
