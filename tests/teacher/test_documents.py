"""Test that documents of a window do not influence each other, in any architecture.

The oracle is the model's own forward pass on one document alone.
"""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselogits.documents import Documents, restarting_positions
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning, TeacherError
from sparselogits.evaluate.passes import StudentLogits
from sparselogits.teacher import LogitsSlice, TransformersTeacher, check_engine
from tests.architectures import CONFIGURATIONS, VOCABULARY, tiny_model
from tests.conftest import tiny_llama
from tests.masked_models import MODELS

PACKED = ("llama", "qwen3", "gemma3", "gpt2", "mixtral", "deepseek_v3")
APART = (
    *("opt", "bloom", "mpt", "falcon_rotary", "falcon_alibi", "biogpt", "gpt_oss"),  # positions
    *("mamba2", "rwkv", "xlstm", "jamba", "recurrent_gemma", "qwen3_next", "minimax", "lfm2"),
)

STARTS = [np.array([0, 13, 14, 21], np.int32), np.array([5], np.int32)]
LENGTH = 40
IDENTITY = dict.fromkeys(("name", "weights", "dtype", "engine", "quantization"), "x")


def spans(starts: np.ndarray) -> Iterator[slice]:
    edges = [*dict.fromkeys([0, *starts.tolist()]), LENGTH]
    yield from map(slice, edges[:-1], edges[1:])


@torch.no_grad()
def alone(model: nn.Module, tokens: Tensor, starts: Sequence[np.ndarray]) -> Tensor:
    """Logits of every document by a forward pass of its own."""
    rows = []
    for row, own in zip(tokens, starts, strict=True):
        parts = [model(input_ids=row[None, s], use_cache=False).logits[0] for s in spans(own)]
        rows.append(torch.cat(parts).float())
    return torch.stack(rows)


def gathered(teacher: TransformersTeacher, tokens: Tensor, starts: Sequence[np.ndarray]) -> Tensor:
    found = torch.empty(*tokens.shape, teacher.vocab_size)
    for piece in teacher.logits(tokens, starts):
        found[piece.row, piece.positions] = piece.logits
    return found


def made_teacher(model: nn.Module) -> TransformersTeacher:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseLogitsWarning)  # some cannot be taken apart
        return TransformersTeacher(model, identity=IDENTITY, slice_positions=16)


def random_tokens(rows: int = len(STARTS)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)


def check_architecture(architecture: str) -> TransformersTeacher:
    model = tiny_model(architecture)
    teacher = made_teacher(model)
    tokens = random_tokens()
    found = gathered(teacher, tokens, STARTS)
    expected = alone(model, tokens, STARTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    changed = tokens.clone()
    changed[0, :13] = tokens[0, :13].flip(0)
    changed[1, :5] = tokens[1, :5].flip(0)
    moved = gathered(teacher, changed, STARTS)
    torch.testing.assert_close(moved[0, 13:], found[0, 13:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved[1, 5:], found[1, 5:], rtol=1e-4, atol=1e-4)
    assert (moved[0, :13] - found[0, :13]).abs().max() > 1e-2
    return teacher


@pytest.mark.parametrize("architecture", sorted(CONFIGURATIONS))
def test_documents_do_not_influence_each_other(architecture):
    way = check_architecture(architecture).documents.way
    assert way in ("packed", "apart")
    assert (architecture in PACKED) <= (way == "packed")
    assert (architecture in APART) <= (way == "apart")


@pytest.mark.parametrize("name", MODELS)
def test_encoders_read_no_other_document_and_no_padding(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    tokens = random_tokens() % 90 + 2  # RoBERTa's padding token is 1
    expected = alone(model, tokens, STARTS)
    teacher = made_teacher(model)
    torch.testing.assert_close(gathered(teacher, tokens, STARTS), expected, rtol=1e-4, atol=1e-4)
    assert teacher.documents.way == "packed" or teacher.documents.masks_padding
    positions = restarting_positions(LENGTH, STARTS)
    student = StudentLogits(model, masked=True)
    for row, own, logits in zip(tokens, positions, expected, strict=True):
        found = student.over({"input_ids": row, "position_ids": own})(slice(0, LENGTH))
        torch.testing.assert_close(found.detach(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spread", "dtype"), [(0.02, torch.float32), (0.3, torch.bfloat16)])
@pytest.mark.parametrize("name", MODELS)
def test_encoders_mask_padding_whose_effect_is_as_small_as_rounding(name, spread, dtype):
    model = MODELS[name](initializer_range=spread).eval()
    teacher = made_teacher(model.to(dtype))
    assert teacher.documents.way == "packed" or teacher.documents.masks_padding
    if dtype == torch.float32:
        tokens = random_tokens() % 90 + 2
        expected = alone(model, tokens, STARTS)
        torch.testing.assert_close(
            gathered(teacher, tokens, STARTS), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("architecture", ["bloom", "mamba2"])
def test_a_leak_is_found_in_half_precision(architecture):
    teacher = made_teacher(tiny_model(architecture).to(torch.bfloat16))
    assert teacher.documents.way == "apart"


@pytest.mark.parametrize("architecture", ["opt", "xlstm", "gpt2"])
def test_students_are_evaluated_on_each_document_alone(architecture):
    model = tiny_model(architecture)
    tokens = random_tokens()
    with torch.no_grad():
        for row, starts in zip(tokens, STARTS, strict=True):
            positions = restarting_positions(LENGTH, [starts])[0]
            logits = StudentLogits(model).over({"input_ids": row, "position_ids": positions})
            expected = alone(model, row[None], [starts])[0]
            torch.testing.assert_close(logits(slice(0, LENGTH)), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_documents_run_apart_are_those_of_each_alone():
    model = tiny_model("mamba2")
    tokens = random_tokens()
    weight = model.get_input_embeddings().weight

    def run(**inputs: Tensor) -> Tensor:
        states: Tensor = model.get_decoder()(use_cache=False, **inputs).last_hidden_state
        return states

    documents = Documents.probe(model, run)
    positions = restarting_positions(LENGTH, STARTS)
    expected = torch.autograd.grad(
        sum(
            run(input_ids=row[None, s]).square().sum()
            for row, own in zip(tokens, STARTS, strict=True)
            for s in spans(own)
        ),
        weight,
    )[0]
    for together in (False, True):
        states = documents.run(run, tokens, positions, one_call=together)
        found = torch.autograd.grad(states.square().sum(), weight)[0]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_model_that_sees_what_comes_later_is_refused_by_name():
    torch.manual_seed(0)
    cells = nn.GRU(8, 8, batch_first=True, bidirectional=True)
    model = tiny_llama()
    embedding = nn.Embedding(520, 8)

    def run(input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        states: Tensor = cells(embedding(input_ids))[0]
        return states

    documents = Documents.probe(model, run)
    assert documents.way == "none"
    positions = restarting_positions(LENGTH, STARTS)
    with pytest.raises(InvalidArgumentError, match=r"LlamaForCausalLM.*--reset-attention"):
        documents.run(run, random_tokens(), positions)


ROPES = {
    "longrope": {
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_documents_longer_than_the_rotary_frequencies_were_made_for(kind):
    """They depend on the longest sequence of a batch, and may stay as a longer one left them."""
    rope = {"rope_type": kind, "rope_theta": 10000.0} | ROPES[kind]
    model = tiny_llama(max_position_embeddings=16, rope_parameters=rope)
    tokens = random_tokens()
    found = gathered(made_teacher(model), tokens, STARTS)
    again = gathered(made_teacher(model), tokens.flip(0), STARTS[::-1]).flip(0)
    torch.testing.assert_close(found, again, rtol=1e-4, atol=1e-4)
    fresh = []
    for row, own in zip(tokens, STARTS, strict=True):
        for span in spans(own):
            new = tiny_llama(max_position_embeddings=16, rope_parameters=rope)
            fresh.append(new(input_ids=row[None, span]).logits[0].detach())
    expected = torch.cat(fresh).view_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Leaking(TransformersTeacher):
    """An engine that trusts position ids, as this one once did."""

    def logits(
        self, tokens: Tensor, document_starts: Sequence[np.ndarray] | None = None
    ) -> Iterator[LogitsSlice]:
        inputs = {"input_ids": tokens}
        if document_starts is not None:
            inputs["position_ids"] = restarting_positions(tokens.shape[1], document_starts)
        for row, logits in enumerate(self.model(**inputs, use_cache=False).logits.detach()):
            yield LogitsSlice(row, slice(0, len(logits)), logits.float())


@pytest.mark.parametrize("architecture", ["bloom", "mamba2"])
def test_check_engine_finds_a_leak(architecture):
    tokens = random_tokens()
    model = tiny_model(architecture)
    check_engine(made_teacher(model), tokens)
    with pytest.raises(TeacherError, match="document"):
        check_engine(Leaking(model, identity=IDENTITY), tokens)
