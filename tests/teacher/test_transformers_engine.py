"""The sliced path gives the model's own logits, for every way models treat them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparselogits.causal_lm import agrees_with_model, split
from sparselogits.errors import SparseLogitsWarning, TeacherError
from sparselogits.teacher import TransformersTeacher
from tests.conftest import tiny_llama

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}

MODELS = {
    "llama": lambda: tiny_llama(),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}


def make_teacher(model: torch.nn.Module, **options: object) -> TransformersTeacher:
    return TransformersTeacher(model, identity={"name": "tiny", "weights": "none"}, **options)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def gathered(teacher: TransformersTeacher, tokens: torch.Tensor, starts=None) -> torch.Tensor:
    rows: list[list[torch.Tensor]] = [[] for _ in tokens]
    for piece in teacher.logits(tokens, starts):
        assert piece.positions.stop - piece.positions.start == len(piece.logits)
        rows[piece.row].append(piece.logits)
    return torch.stack([torch.cat(row) for row in rows])


def test_sliced_logits_are_the_models_own(model: torch.nn.Module) -> None:
    tokens = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens).logits
    assert expected.abs().max() > 0.1  # a scale or softcap left out would show
    teacher = make_teacher(model, slice_positions=16)
    assert teacher.head is not None
    torch.testing.assert_close(gathered(teacher, tokens), expected, rtol=1e-5, atol=1e-5)


def test_no_slice_is_longer_than_asked(model: torch.nn.Module) -> None:
    teacher = make_teacher(model, slice_positions=16)
    lengths = [len(piece.logits) for piece in teacher.logits(torch.zeros(2, 40, dtype=torch.int64))]
    assert lengths == [16, 16, 8] * 2


def test_a_model_with_an_unknown_twist_takes_the_plain_path() -> None:
    class Twisted(type(tiny_llama())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 1.5
            return output

    model = Twisted(tiny_llama().config).eval()
    assert not agrees_with_model(model, split(model))
    with pytest.warns(SparseLogitsWarning, match="cannot be run apart"):
        teacher = make_teacher(model)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(gathered(teacher, tokens), model(input_ids=tokens).logits)


def test_rows_that_are_no_token_get_no_probability() -> None:
    mask = torch.ones(520, dtype=torch.bool)
    mask[512:] = False
    teacher = make_teacher(tiny_llama(), token_mask=mask)
    logits = gathered(teacher, torch.arange(10)[None])
    assert (logits.softmax(-1)[..., 512:] == 0).all()
    assert logits[..., :512].isfinite().all()


def test_attention_restarts_at_document_starts() -> None:
    teacher = make_teacher(tiny_llama())
    tokens = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(2))
    starts = [np.array([0, 10], np.int32), np.array([7, 15], np.int32)]
    apart = gathered(teacher, tokens, starts)
    for row, first, stop in ((0, 0, 10), (0, 10, 24), (1, 0, 7), (1, 7, 15), (1, 15, 24)):
        alone = gathered(teacher, tokens[row : row + 1, first:stop])
        torch.testing.assert_close(apart[row, first:stop], alone[0], rtol=1e-4, atol=1e-4)
    together = gathered(teacher, tokens)
    assert (together[0, 10:] - apart[0, 10:]).abs().max() > 1e-2


def test_a_model_without_a_head_cannot_teach() -> None:
    with pytest.raises(TeacherError, match="no language-model head"):
        make_teacher(tiny_llama().model)
