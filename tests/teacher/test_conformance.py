"""Test that valid engines pass the check, and that each violation is found."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparselogits.caching.work import DrawSettings, compute_range
from sparselogits.corpus import Window
from sparselogits.errors import TeacherError
from sparselogits.samplers import Systematic
from sparselogits.teacher import LogitsSlice, ModuleTeacher, TransformersTeacher, check_engine
from tests.conftest import tiny_llama

TOKENS = torch.arange(60).reshape(3, 20) * 17 % 50
MASK = torch.arange(52) < 50
IDENTITY = dict.fromkeys(("name", "weights", "dtype", "engine", "quantization"), "x")


class Recurrent(nn.Module):
    """Embedding and GRU: a causal trunk that transformers knows nothing of."""

    def __init__(self, directions: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(52, 16)
        self.cells = nn.GRU(16, 16, batch_first=True, bidirectional=directions == 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.cells(self.embedding(tokens))[0]
        return states


def plain(directions: int = 1) -> ModuleTeacher:
    trunk = Recurrent(directions)
    head = nn.Linear(16 * directions, 52)
    names = {"name": "gru", "architecture": "gru-1"}
    return ModuleTeacher(trunk, head, token_mask=MASK, slice_positions=7, **names)


def test_a_plain_module_keeps_the_protocol():
    check_engine(plain(), TOKENS)


def test_transformers_keeps_the_protocol():
    mask = torch.arange(520) < 512
    check_engine(TransformersTeacher(tiny_llama(), token_mask=mask, identity=IDENTITY), TOKENS)


def test_both_engines_draw_the_same_from_one_model():
    model = tiny_llama()

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.model

        def forward(self, tokens: Tensor) -> Tensor:
            states: Tensor = self.model(tokens, use_cache=False).last_hidden_state
            return states

    mask = torch.arange(520) < 512
    window = Window(0, np.arange(40, dtype=np.int32) * 13 % 500, np.array([0]), None)
    engines = (
        TransformersTeacher(model, token_mask=mask, identity=IDENTITY),
        ModuleTeacher(Trunk(), model.lm_head, token_mask=mask, name="x", architecture="llama"),
    )
    draws = [DrawSettings(Systematic(9), seed=5, temperature=1.0)]
    one, other = (
        compute_range(engine, [window], draws, batch=1, reset_attention=False)[0][0].targets
        for engine in engines
    )
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.weights, other.weights)


class Elsewhere(nn.Module):
    """States that another program left in files, layer upon layer, before the last norm."""

    def __init__(self, folder: Path, model: nn.Module) -> None:
        super().__init__()
        self.folder, self.engine = folder, [model]  # in a list: its weights are not this module's

    def serve(self, tokens: Tensor, path: Path) -> None:
        states: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda *given: states.append(given[2][0]))
            for layer in self.engine[0].model.layers
        ]
        self.engine[0](tokens[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        save_file({"token_ids": tokens, "hidden_states": torch.stack(states, dim=1)}, path)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = []
        for number, row in enumerate(tokens):
            path = self.folder / f"{number}.safetensors"
            self.serve(row, path)
            answer = load_file(path)
            assert torch.equal(answer["token_ids"], row)
            rows.append(answer["hidden_states"][:, -1])
        return torch.stack(rows)


def test_a_trunk_that_asks_another_program(tmp_path):
    """As inference engines hand over hidden states: norm and head are ours, the rest is theirs."""
    model = tiny_llama()
    mask = torch.arange(520) < 512
    engine = ModuleTeacher(
        *(Elsewhere(tmp_path, model), nn.Sequential(model.model.norm, model.lm_head)),
        **{"token_mask": mask, "name": "x", "architecture": "llama", "weights": "hub:x@1"},
    )
    assert engine.identity["weights"] == "hub:x@1"
    check_engine(engine, TOKENS)
    found = torch.cat([piece.logits for piece in engine.logits(TOKENS)])
    expected = model(TOKENS).logits.flatten(0, 1)
    torch.testing.assert_close(found[:, :512], expected[:, :512])


def test_other_weights_are_another_teacher():
    trunk, head = Recurrent(), nn.Linear(16, 52)

    def weights() -> object:
        named = {"name": "gru", "architecture": "gru-1"}
        return ModuleTeacher(trunk, head, token_mask=MASK, **named).identity["weights"]

    before = weights()
    assert weights() == before
    with torch.no_grad():
        head.bias[3] += 1e-3
    assert weights() != before


class Broken(ModuleTeacher):
    """A GRU's engine with one fault."""

    fault = ""

    def logits(self, tokens: Tensor, document_starts: object = None) -> Iterator[LogitsSlice]:
        for number, piece in enumerate(super().logits(tokens)):
            if self.fault == "gap" and number == 1:
                continue
            if self.fault == "short" and piece.row == len(tokens) - 1:
                return
            if self.fault == "half":
                yield replace(piece, logits=piece.logits.half())
            elif self.fault == "mask":
                yield replace(piece, logits=piece.logits.nan_to_num(neginf=0.0))
            elif self.fault == "nan":
                piece.logits[0, 0] = torch.nan
                yield piece
            elif self.fault == "random":
                yield replace(piece, logits=piece.logits + torch.rand(()))
            elif self.fault == "batch":
                yield replace(piece, logits=piece.logits + len(tokens))
            else:
                yield piece


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("gap", "expected it to start at position 7 of window 0"),
        ("short", "slices end at position 0 of window 2"),
        ("half", "expected float32"),
        ("mask", "set it to -inf"),
        ("nan", "NaN"),
        ("random", "two passes over the same tokens differ"),
        ("batch", "alone and in a batch differ"),
    ],
)
def test_faults_are_found(fault, said):
    engine = Broken(
        *(Recurrent(), nn.Linear(16, 52)),
        **{"token_mask": MASK, "name": "x", "architecture": "x", "slice_positions": 7},
    )
    engine.fault = fault
    with pytest.raises(TeacherError, match=said):
        check_engine(engine, TOKENS)


def test_a_teacher_that_sees_the_future_is_found():
    with pytest.raises(TeacherError, match="differ in their last token"):
        check_engine(plain(directions=2), TOKENS)


def test_a_teacher_without_tokens():
    engine = plain()
    engine.token_mask = torch.zeros(52, dtype=torch.bool)
    with pytest.raises(TeacherError, match="token_mask is False at all 52 ids; expected True"):
        check_engine(engine, TOKENS)


def test_an_identity_that_lacks_something():
    engine = plain()
    del engine.identity["weights"]
    with pytest.raises(TeacherError, match="lacks weights"):
        check_engine(engine, TOKENS)


def test_an_identity_that_json_cannot_represent():
    engine = plain()
    engine.identity["dtype"] = torch.float32
    with pytest.raises(TeacherError, match="cannot be written as JSON"):
        check_engine(engine, TOKENS)


def test_a_plain_module_cannot_restart_at_documents():
    with pytest.raises(TeacherError, match="reset_attention"):
        next(plain().logits(TOKENS, [np.array([0, 5])] * 3))
