"""Test masked language models as teachers: the engine's logits are those of transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForPreTraining,
    CamembertConfig,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    EuroBertConfig,
    FNetConfig,
    FNetForMaskedLM,
    LlamaConfig,
    MPNetConfig,
    NomicBertConfig,
    XLMRobertaConfig,
)

from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning, TeacherError
from sparselogits.evaluate.passes import StudentLogits
from sparselogits.language_model import names_masked_class, predicts_masked, split
from sparselogits.teacher import TransformersTeacher
from sparselogits.teacher.loading import load_language_model, names_masked_model
from tests.conftest import tiny_llama
from tests.masked_models import MODELS, tiny_bert

TOKENS = torch.randint(1, 96, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tied: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    made = MODELS[request.param](tie_word_embeddings=tied).eval()
    head = made.get_output_embeddings()
    assert (head.weight is made.get_input_embeddings().weight) == tied
    torch.nn.init.normal_(head.bias, std=0.5)  # it begins at zero, and would not show
    return made


def test_logits_are_the_models_own_a_slice_at_a_time(model: torch.nn.Module) -> None:
    assert predicts_masked(model)
    expected = model(input_ids=TOKENS).logits
    teacher = TransformersTeacher(model, identity={}, slice_positions=16)
    assert teacher.head is not None
    rows: list[list[torch.Tensor]] = [[] for _ in TOKENS]
    for piece in teacher.logits(TOKENS):
        assert len(piece.logits) <= 16
        rows[piece.row].append(piece.logits)
    found = torch.stack([torch.cat(row) for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
OTHERS = {
    "ALBERT": lambda: AlbertConfig(**SIZES, embedding_size=16),
    "CamemBERT": lambda: CamembertConfig(**SIZES),
    "DeBERTa-v2": lambda: DebertaV2Config(**SIZES, **RELATIVE, position_biased_input=False),
    "EuroBERT": lambda: EuroBertConfig(**SIZES, num_key_value_heads=2),
    "MPNet": lambda: MPNetConfig(**SIZES),
    "Nomic BERT": lambda: NomicBertConfig(**SIZES),
    "XLM-R": lambda: XLMRobertaConfig(**SIZES),
}


@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_other_encoders_are_their_own(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(OTHERS[name]()).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:  # EuroBERT's head has none
        torch.nn.init.normal_(bias, std=0.5)
    teacher = TransformersTeacher(model, identity={}, slice_positions=16)
    assert teacher.head is not None
    assert predicts_masked(model)
    mask = (torch.arange(40) < torch.tensor([40, 13, 26])[:, None]).long()
    tokens = TOKENS.clamp(min=2).where(mask.bool(), 1)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
    rows: list[list[torch.Tensor]] = [[] for _ in tokens]
    for piece in teacher.logits(tokens, attention_mask=mask):
        rows[piece.row].append(piece.logits)
    found = torch.stack([torch.cat(row) for row in rows])[mask.bool()]
    torch.testing.assert_close(found, expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_padded_windows_are_the_models_own(
    model: torch.nn.Module, attention: str
) -> None:
    """With the padding token of each architecture, by which RoBERTa numbers its positions."""
    model.set_attn_implementation(attention)
    padding = model.config.pad_token_id
    assert padding in (0, 1)
    lengths = torch.tensor([40, 13, 26])
    mask = (torch.arange(40) < lengths[:, None]).long()
    tokens = TOKENS.clamp(min=2).where(mask.bool(), padding)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
        rows_alone = [row[None, :n] for row, n in zip(tokens, lengths, strict=True)]
        alone = [model(input_ids=row).logits[0] for row in rows_alone]
    teacher = TransformersTeacher(model, identity={})
    plain = TransformersTeacher(model, identity={})
    plain._parts = None
    for engine in (teacher, plain):
        rows: list[list[torch.Tensor]] = [[] for _ in tokens]
        for piece in engine.logits(tokens, attention_mask=mask):
            rows[piece.row].append(piece.logits)
        found = torch.stack([torch.cat(row) for row in rows])
        real = mask.bool()
        torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[real], torch.cat(alone), rtol=1e-4, atol=1e-4)
    with teacher.remembering():
        states = [teacher.hidden(tokens), teacher.hidden(tokens, attention_mask=mask)]
        assert not torch.equal(states[0][1], states[1][1])  # remembered under different keys


def test_the_model_is_as_before_and_gradients_reach_what_stands_in_front_of_the_head(
    model: torch.nn.Module,
) -> None:
    before = model(input_ids=TOKENS).logits
    parts = split(model)
    states = parts.states(input_ids=TOKENS)
    parts.bound_head()(states).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(input_ids=TOKENS).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_a_scale_behind_the_head_of_a_masked_model_takes_the_plain_path() -> None:
    class Scaled(type(tiny_bert())):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 1.5
            return output

    model = tiny_bert()
    model.__class__ = Scaled
    assert split(model) is None


def test_a_causal_model_is_none() -> None:
    assert not predicts_masked(tiny_llama())


def test_a_checkpoint_is_loaded_as_what_its_configuration_names(tmp_path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    again = load_language_model(str(tmp_path))
    assert type(again) is type(model)
    assert torch.equal(again(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits)


def test_the_base_of_an_adapter_says_what_is_predicted(tmp_path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_bert().save_pretrained(base)
    wrapped = get_peft_model(load_language_model(str(base)), LoraConfig(target_modules=["query"]))
    wrapped.save_pretrained(adapter)
    assert names_masked_model(str(adapter))
    tiny_bert().save_pretrained(adapter)  # a folder with an adapter and a whole model
    assert names_masked_model(str(adapter))
    tiny_llama().save_pretrained(base)
    assert not names_masked_model(str(base))


def test_a_masked_model_is_refused_where_the_next_token_is_predicted() -> None:
    with pytest.raises(InvalidArgumentError, match=r"the student \(BertForMaskedLM\) is a masked"):
        StudentLogits(tiny_bert())


def test_an_encoder_is_masked_unless_its_checkpoint_names_a_causal_class() -> None:
    named = {
        "BertForMaskedLM": True,
        "BertForPreTraining": True,
        "BertModel": True,
        "BertLMHeadModel": False,
        None: True,
    }
    for name, masked in named.items():
        config = BertConfig(architectures=None if name is None else [name])
        assert names_masked_class(config) == masked, name
    assert not names_masked_class(BertConfig(is_decoder=True))
    assert not names_masked_class(LlamaConfig())
    assert not names_masked_class(BartConfig())


def test_an_encoder_decoder_is_refused_by_name(tmp_path) -> None:
    """BART's class is in transformers' mapping of masked models."""
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": 16,
        "max_position_embeddings": 32,
    }
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=96, **layers, **ids, encoder_ffn_dim=16, decoder_ffn_dim=16)
    said = "BartForConditionalGeneration is an encoder-decoder"
    model = BartForConditionalGeneration(config)
    with pytest.raises(InvalidArgumentError, match=said):
        TransformersTeacher(model, identity={})
    model.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=said):
        load_language_model(str(tmp_path))
    BartForCausalLM(config).save_pretrained(tmp_path)
    assert not predicts_masked(load_language_model(str(tmp_path)))


def test_a_checkpoint_of_pretraining_is_read_as_a_masked_model(tmp_path) -> None:
    """Its classes have the masked model's head, and one for pairs of sentences."""
    model = BertForPreTraining(tiny_bert().config).eval()
    model.save_pretrained(tmp_path)
    found = load_language_model(str(tmp_path)).eval()
    assert type(found) is type(tiny_bert())
    expected = model(input_ids=TOKENS).prediction_logits
    torch.testing.assert_close(found(input_ids=TOKENS).logits, expected)


def test_a_head_that_is_multiplied_by_the_embedding_takes_the_plain_path() -> None:
    """DeBERTa's newer head: the output embeddings that transformers names have D rows, not V."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = DebertaV2Config(vocab_size=96, num_hidden_layers=2, **sizes, legacy=False)
    model = DebertaV2ForMaskedLM(config).eval()
    assert len(model.get_output_embeddings().weight) == 32
    with pytest.warns(SparseLogitsWarning, match="the model's own forward pass"):
        teacher = TransformersTeacher(model, identity={})
    assert teacher.vocab_size == 96
    found = torch.cat([piece.logits for piece in teacher.logits(TOKENS)])
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits.flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_padding_that_is_masked_changes_nothing(name: str) -> None:
    TransformersTeacher(MODELS[name](), identity={}).check_padding()


def test_a_model_that_reads_padding_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    model = FNetForMaskedLM(FNetConfig(vocab_size=96, num_hidden_layers=2, **sizes))
    with pytest.raises(InvalidArgumentError, match="FNetForMaskedLM ignores the attention mask"):
        TransformersTeacher(model, identity={}).check_padding()
