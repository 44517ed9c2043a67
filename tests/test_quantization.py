"""Test quantised students: the trained weights are the ones saved, loaded and evaluated."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from sparselogits.errors import InvalidArgumentError
from sparselogits.quantization import FORMATS, Quantization, load_quantized, prepare
from tests.conftest import PADDED_VOCABULARY, tiny_llama
from tests.masked_models import MODELS

pytest.importorskip("torchao")


def tokens() -> Tensor:
    return torch.randint(0, PADDED_VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))


def trained(quantization: Quantization) -> nn.Module:
    """A student after one step of quantisation-aware training."""
    model = tiny_llama()
    prepare(model, quantization)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "quantization",
    [Quantization(name, group_size=32) for name in FORMATS]
    + [Quantization("int4-weight-only", group_size=None)],
    ids=lambda q: q.described,
)
@torch.no_grad()
def test_converted_model_equals_the_fake_quantised_one(quantization, tmp_path):
    with torch.enable_grad():
        model = trained(quantization)
    before = model(input_ids=tokens()).logits
    plain = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    load_quantized(tmp_path / "model", quantization).save_pretrained(tmp_path / "quantised")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised")
    torch.testing.assert_close(loaded(input_ids=tokens()).logits, before)
    # rounding is real, and training changed the weights
    assert not torch.allclose(full(input_ids=tokens()).logits, before, atol=1e-4)
    assert not torch.allclose(plain.lm_head.weight, loaded.lm_head.weight)
    # the head is in full precision
    torch.testing.assert_close(loaded.lm_head.weight.float(), model.lm_head.weight)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_masked_model_stays_masked(name, tmp_path):
    quantization = Quantization("int4-weight-only", group_size=16)
    model = MODELS[name]().eval()
    ids = tokens() % model.config.vocab_size
    prepare(model, quantization)
    model.save_pretrained(tmp_path / "model")
    load_quantized(tmp_path / "model", quantization).save_pretrained(tmp_path / "quantised")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "quantised")
    assert loaded.config.architectures == [type(model).__name__]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_weights_take_few_values_per_group(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", Quantization("int3-weight-only", group_size=16))
    weight = loaded.model.layers[0].mlp.up_proj.weight.dequantize()
    values = [len(group.unique()) for group in weight.reshape(-1, 16)]
    assert max(values) <= 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantization("int5-weight-only"), "available: int8-weight-only"),
        (lambda: Quantization("int4-weight-only", 0), "expected a number from 1"),
        (
            lambda: prepare(tiny_llama(), Quantization("int4-weight-only", 48)),
            "does not divide the 32 inputs of model.layers.0.self_attn.q_proj",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make()


def test_its_import_through_the_library_is_silent():
    """It reports kernels that it lacks, and its own old calls; transformers imports it unasked."""
    code = "import sparselogits.lab.compare, sys; print('torchao' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("True\n", "")
