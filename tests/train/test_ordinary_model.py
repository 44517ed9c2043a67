"""Test that a student stays an ordinary model during and after training.

Each use is tried on the student in the middle of training, between trainings, and on a model of the
same weights that was never bound: the results are equal.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.errors import InvalidArgumentError
from sparselogits.train.objective import Objective, bind, unbind
from tests.conftest import tiny_llama
from tests.train.test_objective import IDS, WEIGHTS, batch
from tests.train.test_trainer import arguments, trainer_of

PADDED = {
    "input_ids": torch.tensor([[0, 0, 0, 7, 40], [9, 8, 7, 6, 5]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]),
}
"""Two prompts, one padded on the left."""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=PADDED["input_ids"]).logits


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_by_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    """Exponential moving average whose decay leaves the current weights."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(model)
    return average


def replicated(model: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes them, with modules and weights of its own."""

    def replica_of(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replica_of(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
        return replica

    return replica_of(model)


def generated(model: nn.Module) -> Tensor:
    return model.generate(**PADDED, max_new_tokens=6, do_sample=False, pad_token_id=0)


def beams(model: nn.Module) -> Tensor:
    return model.generate(**PADDED, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)


def own_loss(model: nn.Module) -> Tensor:
    labels = torch.where(PADDED["attention_mask"] == 1, PADDED["input_ids"], -100)
    return model(**PADDED, labels=labels).loss.detach()


def by_embeddings(model: nn.Module) -> Tensor:
    embedded = model.get_input_embeddings()(PADDED["input_ids"])
    return model(inputs_embeds=embedded).logits.detach()


def hidden_states(model: nn.Module) -> Tensor:
    made = copy.deepcopy(model)  # transformers leaves hooks that cannot be pickled
    return made(**PADDED, output_hidden_states=True).hidden_states[-1].detach()


def with_a_cache(model: nn.Module) -> Tensor:
    first = model(PADDED["input_ids"][:, :3], use_cache=True)
    rest = model(PADDED["input_ids"][:, 3:], past_key_values=first.past_key_values)
    return rest.logits.detach()


USES: dict[str, Callable[[nn.Module], Tensor]] = {
    "called": logits,
    "called with positional ids": lambda model: model(PADDED["input_ids"]).logits.detach(),
    "own loss": own_loss,
    "embeddings as input": by_embeddings,
    "hidden states": hidden_states,
    "key-value cache": with_a_cache,
    "generates in a padded batch": generated,
    "generates with beams": beams,
    "copied": lambda model: logits(copy.deepcopy(model)),
    "a copy generates": lambda model: generated(copy.deepcopy(model)),
    "pickled": lambda model: logits(pickled(model)),
    "saved by torch": lambda model: logits(saved_by_torch(model)),
    "averaged": lambda model: logits(averaged(model).module),
    "data parallel": lambda model: logits(nn.DataParallel(model)),
    "replica": lambda model: logits(replicated(model)),
    "compiled": lambda model: logits(torch.compile(model, backend="eager")),
    "functional call": lambda model: torch.func.functional_call(
        model, dict(model.named_parameters()), (), {"input_ids": PADDED["input_ids"]}
    ).logits.detach(),
}


def never_bound(model: nn.Module) -> LlamaForCausalLM:
    plain = LlamaForCausalLM(copy.deepcopy(model.config))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


def require_uses(model: nn.Module) -> None:
    was_training = model.training
    model.eval()
    plain = never_bound(model)
    for name, use in USES.items():
        torch.testing.assert_close(use(model), use(plain), rtol=0, atol=0, msg=name)
    model.train(was_training)


class InTheMiddle(TrainerCallback):
    """Uses the student after its second step and keeps copies of it."""

    def __init__(self) -> None:
        self.copies: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 2:
            require_uses(model)
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            self.copies += [(copy.deepcopy(model), weights), (pickled(model), weights)]
            self.copies.append((averaged(model).module, weights))


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_every_use_during_and_after_training(cache, tmp_path, precision):
    student, uses = tiny_llama(seed=9), InTheMiddle()
    dataset = CacheDataset(cache)
    trainer = trainer_of(
        dataset,
        tmp_path,
        student,
        max_steps=3,
        **precision,
        eval_dataset=dataset,
        callbacks=[uses] if not precision else [],
    )
    assert type(student) is LlamaForCausalLM
    trainer.train()
    trainer.evaluate()
    assert type(student) is LlamaForCausalLM
    assert not [name for name in vars(student) if "sparselogits" in name]
    if precision:  # accelerate leaves its autocast around the forward, as for any model
        copies = [(copy.deepcopy(student), student.state_dict())]
    else:
        require_uses(student)
        copies = uses.copies
        assert len(copies) == 3
    for made, weights in copies:
        assert type(made) is LlamaForCausalLM
        assert not [name for name in vars(made) if "sparselogits" in name]
        for name, value in made.state_dict().items():
            assert torch.equal(value, weights[name]), name
        made.zero_grad()
        own_loss_with_gradient = made(**PADDED, labels=PADDED["input_ids"]).loss
        own_loss_with_gradient.backward()
        assert made.get_input_embeddings().weight.grad is not None


def test_a_copy_is_trained_by_itself(cache, tmp_path):
    """The copy's loss is of the copy's weights, and the original is left alone."""
    original = tiny_llama(seed=9)
    bind(original, Objective("sparse", alpha=0.3))
    made = copy.deepcopy(original)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    trainer_of(cache, tmp_path, made).train()
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert any(not torch.equal(v, before[n]) for n, v in made.state_dict().items())


def test_a_replica_computes_its_own_objective():
    """nn.DataParallel calls replicas: their loss is of their weights, bound or not."""
    model = tiny_llama(seed=9)
    bind(model, Objective("sparse", alpha=0.3))
    inputs = batch() | {"target_ids": IDS, "target_weights": WEIGHTS}
    expected = model(**inputs).loss
    replica = replicated(model)
    torch.testing.assert_close(replica(**inputs).loss, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(replica(**inputs).loss, expected.detach())
    by_one = replica(**inputs, num_items_in_batch=torch.tensor([[21]])).loss
    assert by_one.shape == ()


def test_another_trainer_takes_over(cache, tmp_path):
    """transformers' own Trainer trains it as it trains any model, and a second of ours after it."""
    dataset = CacheDataset(cache)
    student = tiny_llama(seed=9)
    trainer_of(dataset, tmp_path, student, max_steps=2).train()
    rows = [
        {"input_ids": dataset[i]["input_ids"], "labels": dataset[i]["input_ids"]} for i in range(8)
    ]
    plain = never_bound(student)
    for model in (student, plain):
        Trainer(model.train(), arguments(tmp_path, max_steps=2), train_dataset=rows).train()
    for name, value in plain.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    for model in (student, plain):
        trainer_of(dataset, tmp_path, model, max_steps=2).train()
    for name, value in plain.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_two_trainers_of_one_student_keep_their_objectives(cache, tmp_path):
    dataset, student = CacheDataset(cache), tiny_llama(seed=9)
    options = {"train_dataset": dataset, "eval_dataset": dataset}
    first = SparseKDTrainer(student, arguments(tmp_path, max_steps=1), **options)
    second = SparseKDTrainer(student, arguments(tmp_path, max_steps=1), method="ce", **options)
    assert "eval_kd" in first.evaluate()
    assert "eval_kd" not in second.evaluate()
    first.train()
    assert "kd" in first.state.log_history[0]


def test_it_is_saved_as_what_it_is(cache, tmp_path):
    student = tiny_llama(seed=9)
    trainer = trainer_of(cache, tmp_path, student, save_strategy="steps", save_steps=3)
    trainer.train()
    assert student.config.use_cache
    trainer.save_model(str(tmp_path / "by-trainer"))
    student.save_pretrained(tmp_path / "by-model")
    for folder in ("by-trainer", "by-model", "checkpoint-3"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is LlamaForCausalLM
        assert loaded.config.architectures == ["LlamaForCausalLM"]
        assert loaded.config.use_cache
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "by-model")), logits(student.eval())
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"trainable_token_indices": [5, 6]}, {"target_modules": "all-linear"}],
    ids=["lora", "dora", "trainable-tokens", "all-linear"],
)
def test_peft_students_train_merge_and_are_saved(cache, tmp_path, settings):
    from peft import AutoPeftModelForCausalLM

    tiny_llama(seed=9).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    student = get_peft_model(base, LoraConfig(**config))
    kind = type(student)
    before = {n: p.clone() for n, p in student.named_parameters()}
    trainer = trainer_of(cache, tmp_path / "run", student)
    trainer.train()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert type(student) is kind
    student.eval()
    expected = logits(student)
    student.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected)
    merged = copy.deepcopy(student).merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(student), expected)


def test_a_student_that_adds_positions_is_refused(cache, tmp_path):
    from peft import PromptTuningConfig

    student = get_peft_model(
        tiny_llama(seed=9), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    with pytest.warns(UserWarning, match="cannot be run separately"):
        trainer = trainer_of(cache, tmp_path, student)
    with pytest.raises(InvalidArgumentError, match="adds or removes positions"):
        trainer.train()


def test_a_forward_that_another_library_set_stays_set():
    """accelerate's hooks and kernels of others put a forward on the instance."""
    model = tiny_llama(seed=9)
    inner, calls = model.forward, []

    def patched(*arguments: Any, **inputs: Any) -> Any:
        calls.append(1)
        return inner(*arguments, **inputs)

    model.forward = patched
    bind(model, Objective("sparse"))
    inputs = batch() | {"target_ids": IDS, "target_weights": WEIGHTS}
    loss = model(**inputs).loss
    assert loss.requires_grad
    before = len(calls)
    logits(model)
    assert len(calls) == before + 1
    made = copy.deepcopy(model)
    assert type(made) is LlamaForCausalLM
    unbind(model)
    assert model.forward is patched


def test_a_frozen_student_is_evaluated_and_not_trained(cache, tmp_path):
    dataset = CacheDataset(cache)
    student = tiny_llama(seed=9).requires_grad_(False)
    trainer = trainer_of(dataset, tmp_path, student, eval_dataset=dataset)
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(InvalidArgumentError, match="no weight of the student"):
        trainer.train()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.compile(tiny_llama(seed=9), backend="eager"),
        lambda: _compiled_in_place(tiny_llama(seed=9)),
        lambda: _hooked(tiny_llama(seed=9)),
    ],
    ids=["torch.compile", "model.compile", "accelerate's hook"],
)
def test_students_that_others_have_wrapped_train_alike(cache, tmp_path, make):
    losses = []
    for model in (tiny_llama(seed=9).train(), make()):
        trainer = trainer_of(cache, tmp_path, model, max_steps=2)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _hooked(model: nn.Module) -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(model, ModelHook())


def test_embeddings_resized_after_construction(cache, tmp_path):
    """The head is looked up at each call, not kept."""
    student = tiny_llama(seed=9)
    trainer = trainer_of(cache, tmp_path, student, max_steps=1)
    student.resize_token_embeddings(600)
    before = student.get_output_embeddings().weight.detach().clone()
    trainer.train()
    assert student.get_output_embeddings().weight.shape[0] == 600
    assert not torch.equal(student.get_output_embeddings().weight, before)
