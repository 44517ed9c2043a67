"""Test that the intended model is loaded, or a clear error is raised."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from sparselogits.errors import SlowFormatWarning, TeacherError
from sparselogits.teacher import load_teacher
from sparselogits.teacher.checkpoint import find_checkpoint
from sparselogits.teacher.loading import (
    load_language_model,
    load_tokenizer,
    module_fingerprint,
    token_mask,
    weights_fingerprint,
)
from sparselogits.teacher.number_formats import has_products
from tests.conftest import PADDED_VOCABULARY, VOCABULARY, tiny_llama


def test_a_local_folder(teacher_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer, dtype="bfloat16")
    assert teacher.vocab_size == PADDED_VOCABULARY
    assert int(teacher.token_mask.sum()) == VOCABULARY
    assert teacher.identity["dtype"] == "bfloat16"
    assert teacher.identity["weights"].startswith("sha256:")
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("native", [False, True])
def test_a_format_without_instructions_gives_advice(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        load_teacher(str(tmp_path), tokenizer=tokenizer, dtype="bfloat16")
        assert not issued  # the data type was given
        load_teacher(str(tmp_path), tokenizer=tokenizer)
    assert [warning.category for warning in issued] == ([] if native else [SlowFormatWarning])
    assert native or "--dtype float32" in str(issued[0].message)


def test_an_unknown_processor_gives_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert has_products(torch.bfloat16) is None
    assert has_products(torch.float16) is None


def test_other_weights_have_another_fingerprint(teacher_folder: Path, tmp_path: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path)
    one, again, other = (
        weights_fingerprint(find_checkpoint(str(folder)), load_language_model(str(folder)))
        for folder in (teacher_folder, teacher_folder, tmp_path)
    )
    assert one == again != other


def test_the_fingerprint_of_a_module_includes_scalars() -> None:
    module = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    nn.init.zeros_(module[0].weight)
    nn.init.ones_(module[0].bias)
    kept = "sha256:f7fad050c78f43c81c07ae9dc74cf17fb5a386e1650a8425216ef010a2a12f9e"
    assert module_fingerprint(module[0]) == kept  # without scalars, as in existing caches
    before = module_fingerprint(module)
    module[1].num_batches_tracked += 1
    assert module_fingerprint(module) != before


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    trunk = AutoModel.from_pretrained(tmp_path)
    trunk.config.architectures = ["LlamaModel"]
    trunk.save_pretrained(tmp_path / "trunk")
    with pytest.raises(TeacherError, match="lm_head"):
        load_language_model(str(tmp_path / "trunk"))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="head"):
        load_language_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r"pickle \(pytorch_model.bin\)"):
        load_language_model(str(tmp_path))


def test_a_foreign_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TeacherError, match="does not belong to the teacher"):
        token_mask(tokenizer, tiny_llama(vocab_size=VOCABULARY - 1))


@pytest.mark.parametrize(
    ("name", "said"), [("./nowhere", "no model folder"), ("/nowhere/model.gguf", "no GGUF file")]
)
def test_a_missing_model(name: str, said: str) -> None:
    with pytest.raises(TeacherError, match=said):
        load_language_model(name)


def test_an_empty_folder_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="contains no model"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("config", [BertConfig, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config])
def test_a_model_saved_without_its_tokenizer_has_none(config: type, tmp_path: Path) -> None:
    """For most of these, transformers makes a tokenizer of special tokens without any file."""
    config().save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="no tokenizer could be read"):
        load_tokenizer(str(tmp_path))


def test_an_unknown_dtype(teacher_folder: Path) -> None:
    with pytest.raises(TeacherError, match="unknown dtype 'int4'"):
        load_language_model(str(teacher_folder), dtype="int4")
