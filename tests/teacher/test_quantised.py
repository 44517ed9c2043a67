"""Test that the identity of a quantised teacher names its quantisation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from torch import nn
from transformers import BitsAndBytesConfig, GPTQConfig, PreTrainedTokenizerFast

from sparselogits.teacher import load_teacher
from sparselogits.teacher.checkpoint import find_checkpoint
from sparselogits.teacher.loading import load_language_model, quantization, weights_fingerprint
from tests.conftest import PADDED_VOCABULARY, tiny_llama

KINDS = {
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_1": (GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1),
}
PLACES = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}


def write_gguf(path: Path, kind: str) -> nn.Module:
    """A tiny Llama, its matrices quantised, as a GGUF file."""
    model = tiny_llama()
    quantised, named = KINDS[kind]
    file = GGUFWriter(path, "llama")
    file.add_file_type(named)
    file.add_vocab_size(PADDED_VOCABULARY)
    file.add_context_length(128)
    file.add_embedding_length(32)
    file.add_feed_forward_length(64)
    file.add_block_count(2)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-6)

    def add(name: str, weight: torch.Tensor) -> None:
        array = weight.detach().numpy()
        if array.ndim == 1:
            file.add_tensor(name, array)
        else:
            file.add_tensor(name, quantize(array, quantised), raw_dtype=quantised)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    add("output.weight", model.lm_head.weight)
    for number, layer in enumerate(model.model.layers):
        add(f"blk.{number}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"blk.{number}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        for ours, theirs in PLACES.items():
            add(f"blk.{number}.{theirs}.weight", layer.get_submodule(ours).weight)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


def test_a_gguf_file_is_named_by_its_kind(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    identities = {}
    for kind, (quantised, _) in KINDS.items():
        path = tmp_path / f"{kind}.gguf"
        model = write_gguf(path, kind)
        teacher = load_teacher(str(path), tokenizer=tokenizer)
        identities[kind] = teacher.identity
        assert teacher.identity["quantization"] == f"gguf {kind}, dequantised"
        weight = model.lm_head.weight.detach().numpy()
        expected = torch.from_numpy(dequantize(quantize(weight, quantised), quantised))
        torch.testing.assert_close(teacher.model.lm_head.weight.float(), expected)
        assert np.abs(weight - expected.numpy()).max() > 1e-4  # it is not the whole one
    assert identities["Q8_0"]["weights"] != identities["Q4_1"]["weights"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes int8"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes nf4"),
        (GPTQConfig(bits=4), "gptq 4 bits"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
         "torchao Int8WeightOnlyConfig"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)  # fmt: skip
def test_a_quantised_folder_is_named_by_its_settings(settings: object, said: str) -> None:
    """What a checkpoint's configuration says, or the one that transformers made of it."""
    model = tiny_llama()
    assert quantization("folder", model) is None
    model.config.quantization_config = settings
    assert quantization("folder", model) == said


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes"])
def test_a_folder_of_quantised_weights(
    method: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Where the package is there: the same model quantised is another teacher, named so."""
    pytest.importorskip(method)
    from transformers import AutoModelForCausalLM, TorchAoConfig

    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings, said = TorchAoConfig(Int8WeightOnlyConfig()), "torchao Int8WeightOnlyConfig"
    else:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        said = "bitsandbytes nf4"
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    # four bits share a scale by 64
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(before)
    AutoModelForCausalLM.from_pretrained(
        before, quantization_config=settings, device_map="cpu"
    ).save_pretrained(after)
    teacher = load_teacher(after, tokenizer=tokenizer, device_map="cpu")
    assert teacher.identity["quantization"] == said
    whole = load_language_model(before)
    assert teacher.identity["weights"] != weights_fingerprint(find_checkpoint(before), whole)
    tokens = torch.arange(20)[None]
    found = torch.cat([piece.logits for piece in teacher.logits(tokens)])
    expected = whole(input_ids=tokens).logits[0]
    apart = (found - expected)[:, : int(teacher.token_mask.sum())].abs().max()
    assert 1e-4 < apart < 2
