"""Test that the bound forward computes the documented loss, on every kind of model."""

import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from sparselogits.errors import SparseLogitsWarning
from sparselogits.lab.compare.recipe import MethodSpec
from sparselogits.losses import DIVERGENCES, Divergence
from sparselogits.methods import METHODS, TrainingMethod
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective, bind
from sparselogits.train.recipe import parse_recipe
from tests.conftest import tiny_llama
from tests.teacher.test_transformers_engine import MODELS, SMALL

IDS = torch.tensor([[[5, 9, 20]] * 12] * 2)
WEIGHTS = torch.tensor([0.5, 0.3, 0.1]).expand(2, 12, 3).contiguous()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 96, (2, 12), generator=generator)
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    labels[0, 3] = -100
    return {"input_ids": tokens, "shift_labels": labels}


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expected_loss(
    model: torch.nn.Module, inputs: dict, alpha: float, temperature: float = 1.0
) -> torch.Tensor:
    logits = model(input_ids=inputs["input_ids"]).logits
    kd = -((logits / temperature).log_softmax(-1).gather(2, IDS) * WEIGHTS).sum(-1)
    log_s = logits.log_softmax(-1)  # the label's part knows no temperature
    labels = inputs["shift_labels"]
    ce = F.nll_loss(log_s.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    counted = labels != -100
    return ((1 - alpha) * kd + alpha * ce)[counted].mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.0, 2.5), (0.3, 2.5)])
def test_loss_and_gradients_are_those_of_plain_autograd(name, alpha, temperature):
    torch.manual_seed(0)
    plain = MODELS[name]().train()
    bound = copy.deepcopy(plain)
    bind(bound, Objective("sparse", alpha=alpha, temperature=temperature))
    inputs = batch()
    loss = bound(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
    reference = expected_loss(plain, inputs, alpha, temperature)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(bound, loss), gradients(plain, reference)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_ce_is_the_models_own_loss():
    model = tiny_llama()
    inputs = batch()
    labels = torch.full_like(inputs["shift_labels"], -100)
    labels[:, 1:] = inputs["shift_labels"][:, :-1]
    expected = model(input_ids=inputs["input_ids"], labels=labels).loss
    bind(model, Objective("ce"))
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


def test_full_distillation_from_oneself_has_no_gradient():
    model = tiny_llama()
    teacher = TransformersTeacher(copy.deepcopy(model), identity={})
    bind(model, Objective("full", teacher_head=teacher.head))
    inputs = batch()
    loss = model(**inputs, teacher_hidden=teacher.hidden(inputs["input_ids"])).loss
    assert abs(float(loss)) < 1e-5
    assert max(float(g.abs().max()) for g in gradients(model, loss).values()) < 1e-5


def test_without_labels_the_model_does_what_it_always_did():
    model = tiny_llama()
    tokens = batch()["input_ids"]
    expected = model(input_ids=tokens).logits
    bind(model, Objective("sparse"))
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert model.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SMALL, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SMALL,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            decoder_sparse_step=1,
            output_router_logits=True,
            router_aux_loss_coef=0.1,
        )
    ),
}


class MixtralOfElsewhere(MixtralForCausalLM):
    """A mixture whose module does not say how it balances its experts."""


def mixture_loss(model: torch.nn.Module, inputs: dict, alpha: float) -> torch.Tensor:
    aux = model(input_ids=inputs["input_ids"]).aux_loss
    return expected_loss(model, inputs, alpha) + model.router_aux_loss_coef * aux


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_keeps_its_auxiliary_loss(name):
    torch.manual_seed(0)
    plain = MIXTURES[name]().train()
    bound = copy.deepcopy(plain)
    bind(bound, Objective("sparse", alpha=0.3))
    inputs = batch()
    loss = bound(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
    reference = mixture_loss(plain, inputs, 0.3)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(bound, loss), gradients(plain, reference)
    assert ours.keys() == theirs.keys()
    assert any("gate" in key and bool(g.any()) for key, g in ours.items())
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_a_mixture_that_is_not_understood_falls_back_to_logits():
    torch.manual_seed(0)
    plain = MIXTURES["mixtral"]().train()
    plain.__class__ = MixtralOfElsewhere
    bound = copy.deepcopy(plain)
    with pytest.warns(SparseLogitsWarning, match="cannot be run separately"):
        bind(bound, Objective("sparse", alpha=0.3))
    inputs = batch()
    loss = bound(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
    torch.testing.assert_close(loss, mixture_loss(plain, inputs, 0.3), rtol=1e-5, atol=1e-6)


def test_the_auxiliary_loss_is_not_added_once_a_micro_batch():
    """In a batch of twice the positions, a micro-batch brings half of everything."""
    torch.manual_seed(0)
    model = MIXTURES["mixtral"]().train()
    bind(model, Objective("ce"))
    inputs = batch()
    positions = (inputs["shift_labels"] != -100).sum()
    torch.testing.assert_close(
        model(**inputs, num_items_in_batch=2 * positions).loss, model(**inputs).loss / 2
    )


def test_an_adapter_on_the_head_falls_back_to_logits():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=False)
    ).eval()

    class Adapter(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input) * 2

    adapter = Adapter(32, 96, bias=False)
    model.set_output_embeddings(adapter)
    plain = copy.deepcopy(model)
    with pytest.warns(SparseLogitsWarning, match="cannot be run separately"):
        bind(model, Objective("sparse"))
    inputs = batch()
    loss = model(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
    torch.testing.assert_close(loss, expected_loss(plain, inputs, 0.0))


def test_logged_parts_are_means_over_positions():
    model = tiny_llama()
    objective = Objective("sparse", alpha=0.25)
    bind(model, objective)
    inputs = batch()
    entropy = torch.tensor([1.5, 2.0])
    targets = {"target_ids": IDS, "target_weights": WEIGHTS, "teacher_entropy": entropy}
    loss = model(**inputs, **targets).loss.item()
    parts = objective.training.take()
    assert abs(0.75 * parts["kd"] + 0.25 * parts["ce"] - loss) < 1e-5
    assert abs(parts["kd"] - parts["kl"] - (1.5 * 10 + 2.0 * 11) / 21) < 1e-5
    assert parts["entries"] == 3
    assert objective.training.take() == {}


def test_no_kl_is_reported_for_biased_targets():
    model = tiny_llama()
    objective = Objective("sparse", unbiased=False)
    bind(model, objective)
    targets = {"target_ids": IDS, "target_weights": WEIGHTS, "teacher_entropy": torch.ones(2)}
    model(**batch(), **targets)
    assert set(objective.training.take()) == {"kd", "ce", "entries"}


def test_the_reported_kl_is_the_divergence_where_the_target_is_the_teacher():
    """Every id stored with its probability: cross-entropy less entropy is KL(p || s)."""
    teacher, student = tiny_llama(1, vocab_size=96), tiny_llama(2, vocab_size=96)
    inputs = batch()
    with torch.no_grad():
        log_p = teacher(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
        log_s = student(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
    p, counted = log_p.exp(), inputs["shift_labels"] != -100
    entropies = -(p * log_p).sum(-1)
    expected = (p * (log_p - log_s)).sum(-1)[counted].mean().item()
    objective = Objective("sparse")
    bind(student, objective)
    student(
        **inputs,
        target_ids=torch.arange(96).expand(2, 12, 96).contiguous(),
        target_weights=p,
        teacher_entropy=torch.stack([e[c].mean() for e, c in zip(entropies, counted, strict=True)]),
    )
    assert abs(objective.training.take()["kl"] - expected) < 1e-5


@pytest.mark.parametrize(
    ("method", "beta"),
    [("full", None), ("reverse_kl", None), ("jensen_shannon", None), ("jensen_shannon", 0.2)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_online_methods_are_plain_autograd(method, beta, temperature):
    teacher, plain = tiny_llama(1, vocab_size=96), tiny_llama(2, vocab_size=96)
    bound = copy.deepcopy(plain)
    taught = TransformersTeacher(teacher, identity={})
    options = {"beta": beta, "alpha": 0.3, "temperature": temperature}
    bind(bound, Objective(method, teacher_head=taught.head, **options))
    inputs = batch()
    loss = bound(**inputs, teacher_hidden=taught.hidden(inputs["input_ids"])).loss
    with torch.no_grad():
        log_p = (teacher(input_ids=inputs["input_ids"]).logits / temperature).log_softmax(-1)
    logits = plain(input_ids=inputs["input_ids"]).logits
    log_s = (logits / temperature).log_softmax(-1)
    labels = inputs["shift_labels"]

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(-1)

    share = 0.5 if beta is None else beta
    log_m = (share * log_p.exp() + (1 - share) * log_s.exp()).log()
    kd = {
        "full": kl(log_p, log_s),
        "reverse_kl": kl(log_s, log_p),
        "jensen_shannon": share * kl(log_p, log_m) + (1 - share) * kl(log_s, log_m),
    }[method]
    log_s = logits.log_softmax(-1)
    ce = F.nll_loss(log_s.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    reference = (0.7 * kd + 0.3 * ce)[labels != -100].mean()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(bound, loss), gradients(plain, reference)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_without_gradients_the_loss_is_the_labels():
    model = tiny_llama()
    objective = Objective("sparse", alpha=0.25)
    bind(model, objective)
    inputs = batch()
    with torch.no_grad():
        loss = model(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss.item()
        without = model(**inputs).loss.item()
    assert loss == pytest.approx(without, abs=1e-6)
    found = objective.evaluation.take()
    assert found["ce"] == pytest.approx(loss, abs=1e-6)
    assert objective.training.take() == {}


def test_gradient_checkpointing_changes_nothing():
    plain = tiny_llama().train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    inputs = batch()
    found = []
    for model in (plain, saving):
        bind(model, Objective("sparse", alpha=0.3))
        loss = model(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
        found.append(gradients(model, loss))
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    shutil.which(os.environ.get("CXX", "g++")) is None,
                    reason="inductor compiles C++",
                ),
            ],
        ),
    ],
)
def test_a_compiled_student_computes_the_same(backend):
    plain = tiny_llama(num_hidden_layers=1).train()
    other = copy.deepcopy(plain)
    inputs = batch()
    targets = {"target_ids": IDS, "target_weights": WEIGHTS, "teacher_entropy": torch.ones(2)}
    found = []
    for model, compiled in ((plain, False), (other, True)):
        objective = Objective("sparse", alpha=0.3)
        bind(model, objective)
        run = torch.compile(model, backend=backend) if compiled else model
        loss = run(**inputs, **targets).loss
        found.append((gradients(model, loss), objective.training.take()))
    for key, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_autocast_reaches_the_head():
    """In bfloat16 the loss moves by its rounding, and not by more."""
    model = tiny_llama().train()
    bind(model, Objective("sparse", alpha=0.3))
    inputs = {**batch(), "target_ids": IDS, "target_weights": WEIGHTS}
    exact = model(**inputs).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**inputs).loss
    rounded.backward()
    assert 0 < abs(rounded.item() - exact) < 0.03 * exact
    assert model.lm_head.weight.grad.dtype == torch.float32


class SquaredError(Divergence):
    """Mean of the squared differences of probabilities."""

    def rows_(self, u: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Divergence`."""
        s = u.softmax(1)
        gap = s - log_p.exp()
        return gap.square().sum(1), 2 * s * (gap - (s * gap).sum(1, keepdim=True))


def test_a_divergence_needs_a_class_and_a_row(monkeypatch):
    """Recipes, the objective, comparisons and their titles have it from there."""
    row = TrainingMethod("squares", "squared error", "(p - s)^2", divergence="squares")
    monkeypatch.setitem(METHODS, "squares", row)
    monkeypatch.setitem(DIVERGENCES, "squares", SquaredError)
    values = {"cache": "c", "out": "o", "student": {"size": "tiny"}, "teacher": "t"}
    assert parse_recipe(values | {"method": "squares"}, source="test").method == "squares"
    assert MethodSpec(method="squares").online
    assert MethodSpec(method="squares").title == "squared error"
    teacher, plain = tiny_llama(1, vocab_size=96), tiny_llama(2, vocab_size=96)
    bound = copy.deepcopy(plain)
    taught = TransformersTeacher(teacher, identity={})
    bind(bound, Objective("squares", teacher_head=taught.head))
    inputs = batch()
    loss = bound(**inputs, teacher_hidden=taught.hidden(inputs["input_ids"])).loss
    p, s = (model(input_ids=inputs["input_ids"]).logits.softmax(-1) for model in (teacher, plain))
    reference = (p.detach() - s).square().sum(-1)[inputs["shift_labels"] != -100].mean()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-7)
    ours, theirs = gradients(bound, loss), gradients(plain, reference)
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-7, msg=key)
