"""The bound forward computes the loss it says, on every kind of model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from sparselogits.errors import SparseLogitsWarning
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective, bind
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


def expected_loss(model: torch.nn.Module, inputs: dict, alpha: float) -> torch.Tensor:
    log_s = model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
    kd = -(log_s.gather(2, IDS) * WEIGHTS).sum(-1)
    labels = inputs["shift_labels"]
    ce = F.nll_loss(log_s.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    counted = labels != -100
    return ((1 - alpha) * kd + alpha * ce)[counted].mean()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_loss_and_gradients_are_those_of_plain_autograd(name: str, alpha: float) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]().train()
    bound = copy.deepcopy(plain)
    bind(bound, Objective("sparse", alpha=alpha))
    inputs = batch()
    loss = bound(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
    reference = expected_loss(plain, inputs, alpha)
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(bound, loss), gradients(plain, reference)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_ce_is_the_models_own_loss() -> None:
    model = tiny_llama()
    inputs = batch()
    labels = torch.full_like(inputs["shift_labels"], -100)
    labels[:, 1:] = inputs["shift_labels"][:, :-1]
    expected = model(input_ids=inputs["input_ids"], labels=labels).loss
    bind(model, Objective("ce"))
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


def test_full_distillation_from_oneself_has_no_gradient() -> None:
    model = tiny_llama()
    teacher = TransformersTeacher(copy.deepcopy(model), identity={})
    bind(model, Objective("full", teacher_head=teacher.head))
    inputs = batch()
    loss = model(**inputs, teacher_hidden=teacher.hidden(inputs["input_ids"])).loss
    assert abs(float(loss)) < 1e-5
    assert max(float(g.abs().max()) for g in gradients(model, loss).values()) < 1e-5


def test_without_labels_the_model_does_what_it_always_did() -> None:
    model = tiny_llama()
    tokens = batch()["input_ids"]
    expected = model(input_ids=tokens).logits
    bind(model, Objective("sparse"))
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert model.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_a_mixture_of_experts_keeps_its_auxiliary_loss() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    plain = MixtralForCausalLM(config).train()
    bound = copy.deepcopy(plain)
    with pytest.warns(SparseLogitsWarning, match="cannot be run apart"):
        bind(bound, Objective("ce"))
    inputs = batch()
    labels = torch.full_like(inputs["shift_labels"], -100)
    labels[:, 1:] = inputs["shift_labels"][:, :-1]
    expected = plain(input_ids=inputs["input_ids"], labels=labels).loss
    torch.testing.assert_close(bound(**inputs).loss, expected)


def test_an_adapter_on_the_head_falls_back_to_logits() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, tie_word_embeddings=False)
    ).eval()

    class Adapter(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input) * 2

    adapter = Adapter(32, 96, bias=False)
    model.set_output_embeddings(adapter)
    plain = copy.deepcopy(model)
    with pytest.warns(SparseLogitsWarning, match="cannot be run apart"):
        bind(model, Objective("sparse"))
    inputs = batch()
    loss = model(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
    torch.testing.assert_close(loss, expected_loss(plain, inputs, 0.0))


def test_logged_parts_are_means_over_positions() -> None:
    model = tiny_llama()
    objective = Objective("sparse", alpha=0.25)
    bind(model, objective)
    inputs = batch()
    loss = model(**inputs, target_ids=IDS, target_weights=WEIGHTS).loss
    parts = objective.take()
    assert abs(0.75 * parts["kd"] + 0.25 * parts["ce"] - float(loss)) < 1e-5
    assert objective.take() == {}
