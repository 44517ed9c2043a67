"""Test that the folder of a PEFT adapter gives PEFT's logits, as teacher and as student."""

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparselogits.errors import SparseLogitsWarning, TeacherError
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer
from sparselogits.train.objective import Objective, bind
from tests.conftest import PADDED_VOCABULARY, VOCABULARY, tiny_llama

HERE = ["q_proj", "v_proj"]


def lora(**own: Any) -> Callable[[], peft.PeftConfig]:
    chosen = {"r": 4, "target_modules": HERE, "init_lora_weights": False, "lora_alpha": 32} | own
    return lambda: peft.LoraConfig(task_type="CAUSAL_LM", **chosen)


def kind(name: str, **own: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: getattr(peft, name)(task_type="CAUSAL_LM", **own)


KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rank-stabilised": lora(use_rslora=True),
    "bias": lora(lora_bias=True),
    "one layer": lora(layers_to_transform=[0]),
    "pissa": lora(init_lora_weights="pissa"),
    "trainable tokens": lora(trainable_token_indices=[5, 6]),
    "trainable tokens alone": kind("TrainableTokensConfig", token_indices=[5, 6]),
    "head": lora(target_modules=[*HERE, "lm_head"]),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "saved modules": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "parameters": lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]),
    "ia3": kind("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
    "loha": kind("LoHaConfig", r=4, target_modules=HERE),
    "adalora": kind("AdaLoraConfig", init_r=4, target_r=2, total_step=10, target_modules=HERE),
    "oft": kind("OFTConfig", r=4, oft_block_size=0, target_modules=HERE),
    "vera": kind("VeraConfig", r=8, target_modules=["q_proj"]),
    "layer norms": kind("LNTuningConfig", target_modules=["input_layernorm"]),
    "prompt": kind("PromptTuningConfig", num_virtual_tokens=5),
    "prefix": kind("PrefixTuningConfig", num_virtual_tokens=5),
}
PROMPTS = ("prompt", "prefix")
TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, config: peft.PeftConfig) -> Path:
    torch.manual_seed(3)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, tokenizer: Any) -> TransformersTeacher:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseLogitsWarning)  # some heads cannot be run apart
        return load_teacher(str(folder), tokenizer=tokenizer)


def gathered(teacher: TransformersTeacher, tokens: Tensor, starts: Any = None) -> Tensor:
    found = torch.empty(*tokens.shape, PADDED_VOCABULARY)
    for piece in teacher.logits(tokens, starts):
        found[piece.row, piece.positions] = piece.logits
    return found[..., :VOCABULARY]


@torch.no_grad()
def pefts_own(base: Path, folder: Path, tokens: Tensor) -> Tensor:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits[:, -tokens.shape[1] :, :VOCABULARY]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's about unsaved configurations
def test_logits_and_gradients_with_every_kind_of_adapter(name, base, tmp_path, tokenizer):
    folder = save_adapter(base, tmp_path / "adapter", KINDS[name]())
    teacher = loaded(folder, tokenizer)
    expected = pefts_own(base, folder, TOKENS)
    torch.testing.assert_close(gathered(teacher, TOKENS), expected, rtol=1e-5, atol=1e-5)
    starts = [np.array([0, 9], np.int32)] * 2
    later = gathered(teacher, TOKENS, starts)[:, 9:]
    alone = pefts_own(base, folder, TOKENS[:, 9:])
    torch.testing.assert_close(later, alone, rtol=1e-4, atol=1e-4)
    if name in PROMPTS:
        return  # PEFT trains none that were loaded
    student: nn.Module = load_language_model(str(folder), trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseLogitsWarning)
        bind(student, Objective("ce"))
    loss = student(input_ids=TOKENS, shift_labels=TOKENS).loss
    loss.backward()
    by_hand = nn.functional.cross_entropy(expected.flatten(0, 1), TOKENS.flatten())
    assert abs(float(loss) - float(by_hand)) < 0.1  # which leaves out the padding columns
    trained = [n for n, p in student.named_parameters() if p.grad is not None]
    assert trained
    assert all(p.requires_grad == (n in trained) for n, p in student.named_parameters())


def identity_of(folder: Path, tokenizer: Any) -> str:
    weights: str = loaded(folder, tokenizer).identity["weights"]
    return weights


def test_the_identity_covers_adapter_and_base(base, tmp_path, tokenizer):
    other = tmp_path / "base"
    tiny_llama(tie_word_embeddings=False).save_pretrained(other)
    folder = save_adapter(other, tmp_path / "adapter", KINDS["lora"]())
    first = identity_of(folder, tokenizer)
    assert identity_of(folder, tokenizer) == first
    moved = tmp_path / "moved"
    (tmp_path / "base").rename(moved)
    described = json.loads((folder / "adapter_config.json").read_text())

    def rewrite(**changes: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(described | changes))

    rewrite(base_model_name_or_path=str(moved))
    assert identity_of(folder, tokenizer) == first  # where the base lies says nothing
    rewrite(base_model_name_or_path=str(moved), lora_alpha=16)
    assert identity_of(folder, tokenizer) != first
    rewrite(base_model_name_or_path=str(moved))
    tiny_llama(seed=1, tie_word_embeddings=False).save_pretrained(moved)
    assert identity_of(folder, tokenizer) != first
    tiny_llama(tie_word_embeddings=False).save_pretrained(moved)
    assert identity_of(folder, tokenizer) == first
    save_adapter(moved, folder, lora(lora_alpha=31)())
    assert identity_of(folder, tokenizer) != first


def test_a_tokenizer_is_taken_from_the_base_where_the_adapter_has_none(base, tmp_path):
    folder = save_adapter(base, tmp_path / "adapter", KINDS["lora"]())
    assert len(load_tokenizer(str(folder))) == VOCABULARY


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_embedding_that_was_extended_before_training(base, tmp_path, tokenizer):
    """As scripts do that add tokens: PEFT saves the embedding, the base on disk is smaller."""
    wider = PADDED_VOCABULARY + 8
    torch.manual_seed(3)
    extended = AutoModelForCausalLM.from_pretrained(base)
    extended.resize_token_embeddings(wider)
    model = peft.get_peft_model(extended, lora(modules_to_save=["embed_tokens", "lm_head"])())
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    found = loaded(tmp_path / "adapter", tokenizer)
    assert found.vocab_size == wider
    with torch.no_grad():
        expected = model.eval()(input_ids=TOKENS).logits[..., :VOCABULARY]
    got = torch.cat([piece.logits[:, :VOCABULARY] for piece in found.logits(TOKENS)])
    torch.testing.assert_close(got, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code from a pickle has run",)


def test_pickled_adapters_and_loops_are_refused(base, tmp_path, capsys):
    folder = save_adapter(base, tmp_path / "adapter", KINDS["lora"]())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TeacherError, match=r"pickle \(adapter_model.bin\).*save_pretrained"):
        load_language_model(str(folder))
    assert "has run" not in capsys.readouterr().out
    again = save_adapter(base, tmp_path / "again", KINDS["lora"]())
    described = json.loads((again / "adapter_config.json").read_text())
    for wrong, said in (
        (str(again), "names itself"),
        (None, "names no base model"),
        (str(folder), "pickle"),
        (str(tmp_path / "nowhere"), "no model folder"),
    ):
        changed = described | {"base_model_name_or_path": wrong}
        (again / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(TeacherError, match=said):
            load_language_model(str(again))


def test_an_adapter_of_a_size_that_its_file_does_not_hold_is_refused(base, tmp_path):
    folder = save_adapter(base, tmp_path / "adapter", KINDS["lora"]())
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"r": 10**7}))
    with pytest.raises(TeacherError, match="far larger than its weights"):
        load_language_model(str(folder))
