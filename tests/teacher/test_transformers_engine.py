"""Test that slices of logits equal the model's own logits, for all post-processing."""

import warnings

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
from transformers.modeling_outputs import CausalLMOutput

from sparselogits.errors import SparseLogitsWarning, TeacherError
from sparselogits.language_model import in_eval_mode, split
from sparselogits.teacher import TransformersTeacher
from tests.architectures import CONFIGURATIONS, tiny_model
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
def model(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def gathered(teacher: TransformersTeacher, tokens: torch.Tensor, starts=None) -> torch.Tensor:
    rows: list[list[torch.Tensor]] = [[] for _ in tokens]
    for piece in teacher.logits(tokens, starts):
        assert piece.positions.stop - piece.positions.start == len(piece.logits)
        rows[piece.row].append(piece.logits)
    return torch.stack([torch.cat(row) for row in rows])


def test_sliced_logits_are_the_models_own(model):
    tokens = torch.randint(0, 96, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=tokens).logits
    assert expected.abs().max() > 0.1  # a scale or softcap left out would show
    teacher = make_teacher(model, slice_positions=16)
    assert teacher.head is not None
    torch.testing.assert_close(gathered(teacher, tokens), expected, rtol=1e-5, atol=1e-5)


def test_no_slice_is_longer_than_asked(model):
    teacher = make_teacher(model, slice_positions=16)
    lengths = [len(piece.logits) for piece in teacher.logits(torch.zeros(2, 40, dtype=torch.int64))]
    assert lengths == [16, 16, 8] * 2


TWISTS = {
    "scale": lambda logits: logits * 1.01,
    "soft cap": lambda logits: 30 * torch.tanh(logits / 30),
    "soft cap of large logits": lambda logits: 500 * torch.tanh(logits / 500),
    "clamp": lambda logits: logits.clamp(-200, 200),
    "shift": lambda logits: logits + 0.01,
    "masked column": lambda logits: logits.index_fill(-1, torch.tensor([7]), -1e4),
    "normalised": lambda logits: logits.log_softmax(-1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("twist", TWISTS)
def test_whatever_a_model_does_to_its_logits_reaches_the_targets(twist, dtype):
    """A twist without a name in the configuration is measured, or the plain path is taken."""

    class Twisted(type(tiny_llama())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = TWISTS[twist](output.logits.float()).to(output.logits.dtype)
            return output

    model = Twisted(tiny_llama().config).eval().to(dtype)
    known = twist in ("scale", "soft cap", "soft cap of large logits")
    assert (split(model) is not None) == known
    if known:
        teacher = make_teacher(model)
    else:
        with pytest.warns(SparseLogitsWarning, match="cannot be run separately"):
            teacher = make_teacher(model)
    tokens = torch.arange(20)[None]
    expected = model(input_ids=tokens).logits.float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(gathered(teacher, tokens), expected, rtol=tolerance, atol=tolerance)


def test_a_factor_before_the_head_is_noticed():
    class Scaled(type(tiny_llama())):
        def forward(self, input_ids, **inputs):
            states = self.model(input_ids=input_ids, **inputs).last_hidden_state
            return CausalLMOutput(logits=self.lm_head(states * 1.5))

    model = Scaled(tiny_llama().config).eval()
    assert split(model) is None
    with pytest.warns(SparseLogitsWarning, match="cannot be run separately"):
        teacher = make_teacher(model)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(gathered(teacher, tokens), model(input_ids=tokens).logits)


def test_a_model_with_fewer_positions_than_the_probe_is_not_split():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    assert split(model) is None


def test_each_module_has_its_mode_again_after_eval_mode():
    model = tiny_llama().train()
    model.model.layers[0].eval()  # frozen, as with batch normalisation
    before = [module.training for module in model.modules()]
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


UNSPLIT = ("llama4", "bert_causal", "roberta_causal")  # the head is more than a product
BROKEN_IN_BFLOAT16 = ("xlstm",)  # transformers' own forward pass raises


@pytest.mark.parametrize("architecture", sorted(CONFIGURATIONS))
def test_the_divergence_from_a_models_own_logits_is_rounding(architecture):
    """Mean KL in bfloat16, where a soft cap that is left out costs 0.0025 and more."""
    tokens = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    for dtype, bound in ((torch.float32, 1e-9), (torch.bfloat16, 1e-5)):
        if dtype == torch.bfloat16 and architecture in BROKEN_IN_BFLOAT16:
            continue
        model = tiny_model(architecture).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparseLogitsWarning)
            teacher = make_teacher(model)
        if dtype == torch.float32:
            assert (teacher.head is None) == (architecture in UNSPLIT)
        with torch.no_grad():
            own = torch.cat(
                [model(input_ids=row[None], use_cache=False).logits for row in tokens]
            ).double()
        p, q = own.log_softmax(-1), gathered(teacher, tokens).double().log_softmax(-1)
        assert float((p.exp() * (p - q)).sum(-1).mean()) < bound


def test_rows_that_are_no_token_get_no_probability():
    mask = torch.ones(520, dtype=torch.bool)
    mask[512:] = False
    teacher = make_teacher(tiny_llama(), token_mask=mask)
    logits = gathered(teacher, torch.arange(10)[None])
    assert (logits.softmax(-1)[..., 512:] == 0).all()
    assert logits[..., :512].isfinite().all()


def test_attention_restarts_at_document_starts():
    teacher = make_teacher(tiny_llama())
    tokens = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(2))
    starts = [np.array([0, 10], np.int32), np.array([7, 15], np.int32)]
    apart = gathered(teacher, tokens, starts)
    for row, first, stop in ((0, 0, 10), (0, 10, 24), (1, 0, 7), (1, 7, 15), (1, 15, 24)):
        alone = gathered(teacher, tokens[row : row + 1, first:stop])
        torch.testing.assert_close(apart[row, first:stop], alone[0], rtol=1e-4, atol=1e-4)
    together = gathered(teacher, tokens)
    assert (together[0, 10:] - apart[0, 10:]).abs().max() > 1e-2


def test_a_model_without_a_head_cannot_teach():
    with pytest.raises(TeacherError, match="no language-model head"):
        make_teacher(tiny_llama().model)


def test_what_is_remembered_is_read_once_and_gives_the_same_logits():
    teacher = TransformersTeacher(tiny_llama(), identity={})
    passes = []
    teacher.model.model.register_forward_hook(lambda *_: passes.append(1))
    tokens = torch.arange(64).reshape(2, 32)
    starts = [np.array([0, 20])]

    def logits(rows: slice, restarts: list[np.ndarray] | None = None) -> torch.Tensor:
        return torch.cat([piece.logits for piece in teacher.logits(tokens[rows], restarts)])

    first, second, restarted = logits(slice(1)), logits(slice(1, 2)), logits(slice(1), starts)
    passes.clear()
    with teacher.remembering():
        for _ in range(3):
            assert torch.equal(logits(slice(1)), first)
            assert torch.equal(logits(slice(1, 2)), second)
            assert torch.equal(logits(slice(1), starts), restarted)
    assert len(passes) == 3
    logits(slice(1))
    assert len(passes) == 4


def test_no_more_is_remembered_than_its_bytes(monkeypatch):
    monkeypatch.setattr("sparselogits.teacher.transformers_engine.REMEMBERED_BYTES", 32 * 32 * 4)
    teacher = TransformersTeacher(tiny_llama(), identity={})
    passes = []
    teacher.model.model.register_forward_hook(lambda *_: passes.append(1))
    with teacher.remembering():
        for _ in range(2):
            for row in torch.arange(64).reshape(2, 1, 32):
                list(teacher.logits(row))
    assert len(passes) == 3  # the second window is read each time
