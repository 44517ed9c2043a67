"""Test that windows longer than a model's positions are rejected early, or warned about."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from sparselogits.allowances import ALLOWANCES, allowing
from sparselogits.caching.pilot import check_teacher_on_text
from sparselogits.corpus import Window
from sparselogits.errors import InvalidArgumentError, SparseLogitsWarning, TeacherError
from sparselogits.evaluate.passes import StudentLogits
from sparselogits.positions import check_window, trained_positions
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective, bind
from tests.architectures import POSITIONS, VOCABULARY, tiny_model
from tests.conftest import tiny_llama
from tests.masked_models import MODELS

TABLES = ("gpt2", "gpt_bigcode", "opt", "mpt", "gpt_neo", "codegen", "gptj", "biogpt", "ctrl")
COMPUTED = ("llama", "qwen3", "gemma2", "phi", "xglm", "gpt_neox", "falcon_h1")
UNLIMITED = ("bloom", "mamba", "xlstm")
IDENTITY = {"name": "tiny", "dtype": "float32"}


def teacher_of(model: torch.nn.Module, dtype: str = "float32") -> TransformersTeacher:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseLogitsWarning)
        return TransformersTeacher(model, identity=IDENTITY | {"dtype": dtype})


def window(length: int, starts: tuple[int, ...] = (0,)) -> Window:
    tokens = np.arange(length) % (VOCABULARY - 3) + 3
    return Window(0, tokens.astype(np.int32), np.array(starts, np.int32), mask=None)


def check(teacher: TransformersTeacher, length: int) -> float:
    return check_teacher_on_text(teacher, [window(length)], reset_attention=False)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_table_that_are_reserved_for_padding_are_no_positions(name):
    """RoBERTa's table has 66 rows, of which 64 are positions."""
    model = MODELS[name]().eval()
    limit = trained_positions(model)
    assert limit == (66 if name in ("ModernBERT", "ELECTRA's generator") else 64)
    student = StudentLogits(model, masked=True)
    student.over({"input_ids": torch.arange(limit) + 2})
    if name != "ModernBERT":  # its positions are computed
        said = f"has {limit} positions and cannot run sequences of {limit + 1} tokens"
        with pytest.raises(InvalidArgumentError, match=said):
            student.over({"input_ids": torch.arange(limit + 1) + 2})
        with pytest.raises(InvalidArgumentError, match=said):  # the probe has no padding token
            check_window(model, student._run, limit + 1)


@pytest.mark.parametrize("architecture", TABLES)
def test_a_table_of_positions_is_a_limit(architecture):
    model = tiny_model(architecture, sharpness=1.0)
    assert trained_positions(model) == POSITIONS
    teacher = teacher_of(model)
    assert check(teacher, POSITIONS) > 0
    said = r"has 64 positions and cannot run sequences of 65 tokens; use a window of at most 64 "
    with pytest.raises(InvalidArgumentError, match=said):
        check(teacher, POSITIONS + 1)
    tokens = torch.from_numpy(window(65).tokens)
    with pytest.raises(InvalidArgumentError, match="has 64 positions"):
        next(iter(teacher.logits(tokens[None])))
    with pytest.raises(InvalidArgumentError, match="has 64 positions"):
        StudentLogits(model).over({"input_ids": tokens})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseLogitsWarning)
        bind(model, Objective("ce"))
    with pytest.raises(InvalidArgumentError, match="has 64 positions"):
        model(input_ids=tokens[None], shift_labels=tokens[None])


@pytest.mark.parametrize("architecture", COMPUTED)
def test_a_context_that_is_left_is_warned_about_with_both_numbers(architecture):
    teacher = teacher_of(tiny_model(architecture, sharpness=1.0))
    assert check(teacher, POSITIONS) > 0
    with pytest.warns(SparseLogitsWarning, match="windows of 65 tokens .* the 64 positions"):
        check(teacher, POSITIONS + 1)


@pytest.mark.parametrize("architecture", UNLIMITED)
def test_a_model_without_positions_has_no_limit(architecture):
    model = tiny_model(architecture, sharpness=1.0)
    assert trained_positions(model) is None
    assert check(teacher_of(model), 3 * POSITIONS) > 0


def test_rotary_embeddings_that_are_scaled_reach_further():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    model = tiny_llama(max_position_embeddings=64, rope_parameters=rope)
    assert trained_positions(model) == 256


def test_short_documents_in_long_windows_can_be_allowed():
    teacher = teacher_of(tiny_model("opt", sharpness=1.0))
    long = window(100, (0, 50))
    with pytest.raises(InvalidArgumentError, match="--allow long-windows"):
        check_teacher_on_text(teacher, [long], reset_attention=True)
    with allowing("long-windows"), pytest.warns(SparseLogitsWarning, match="allowed: long-windows"):
        assert check_teacher_on_text(teacher, [long], reset_attention=True) > 0


@pytest.mark.parametrize(("layer", "dtype"), [(0, "float16"), (1, "float16"), (1, "bfloat16")])
def test_an_overflow_is_not_blamed_on_the_tokenizer(layer, dtype):
    model = tiny_llama()
    with torch.no_grad():
        mlp = model.model.layers[layer].mlp
        mlp.up_proj.weight.mul_(400 if dtype == "float16" else 1e20)
        mlp.down_proj.weight.mul_(400 if dtype == "float16" else 1e20)
    half = teacher_of(model.to(getattr(torch, dtype)), dtype)
    said = "overflow in float16.*--dtype bfloat16" if dtype == "float16" else "--dtype float32"
    with pytest.raises(TeacherError, match=said) as refused:
        check(half, 64)
    assert "tokenizer" not in str(refused.value)


def test_a_loss_worse_than_guessing_can_be_allowed():
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    teacher = teacher_of(model)
    with pytest.raises(TeacherError, match=r"worse than guessing.*--allow worse-than-guessing"):
        check(teacher, 64)
    with (
        allowing("worse-than-guessing"),
        pytest.warns(SparseLogitsWarning, match="allowed: worse-than-guessing"),
    ):
        assert check(teacher, 64) > 7
    unknown = pytest.raises(InvalidArgumentError, match="unknown allowance 'anything'")
    with unknown, allowing("anything"):
        pass


def test_the_docs_list_every_allowance():
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
    for name, meaning in ALLOWANCES.items():
        assert f"| `{name}` | {meaning} |" in page


def test_the_command_lifts_a_refusal(teacher_folder, short, tmp_path):
    from typer.testing import CliRunner

    from sparselogits.cli import app

    bad = tmp_path / "bad"
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    model.save_pretrained(bad)
    for file in teacher_folder.glob("token*"):
        (bad / file.name).write_bytes(file.read_bytes())
    command = ["cache", "--teacher", str(bad), "--data", str(short), "--out", str(tmp_path / "c")]
    command += ["--window", "32", "--rounds", "4", "--device", "cpu"]
    runner = CliRunner()
    refused = runner.invoke(app, command)
    assert isinstance(refused.exception, TeacherError)
    with pytest.warns(SparseLogitsWarning, match="allowed: worse-than-guessing"):
        result = runner.invoke(app, [*command, "--allow", "worse-than-guessing"])
    assert result.exit_code == 0, result.output
    assert isinstance(runner.invoke(app, [*command[:-2], "--allow", "x"]).exception, Exception)
