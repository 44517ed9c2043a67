"""vLLM as a teacher's engine, compared with transformers; skipped where vLLM is not installed."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sparselogits.errors import InvalidArgumentError, MissingDependencyError, TeacherError
from sparselogits.samplers import Systematic, window_uniforms
from sparselogits.teacher import check_engine, load_teacher, load_vllm_teacher
from sparselogits.teacher.vllm_engine import (
    _recorded,
    _require_same_states,
    require_first_gpu,
)
from tests.conftest import tiny_llama

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not INSTALLED, reason="vLLM is not installed: it pins torch and transformers (docs/teachers.md)"
)
LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A Llama whose attention heads have a size that vLLM's kernels support."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts faster
    path = tmp_path_factory.mktemp("teacher")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    tiny_llama(**shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def teacher(folder, tokenizer):
    return load_vllm_teacher(
        folder,
        tokenizer=tokenizer,
        window_length=LENGTH,
        slice_positions=20,
        enforce_eager=True,
        disable_log_stats=True,
    )


@pytest.fixture
def reference(folder, tokenizer):
    return load_teacher(folder, tokenizer=tokenizer)


def windows(count: int) -> torch.Tensor:
    return torch.randint(0, 512, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def whole(engine, tokens: torch.Tensor, starts=None) -> torch.Tensor:
    pieces = [piece.logits for piece in engine.logits(tokens, starts)]
    return torch.cat(pieces).reshape(*tokens.shape, -1)


@needs_vllm
def test_logits_are_those_of_transformers(teacher, reference):
    tokens = windows(5)
    starts = [np.array([0, 7 * i + 3], np.int32) for i in range(5)]
    for given in (None, starts):
        found, expected = whole(teacher, tokens, given), whole(reference, tokens, given)
        assert torch.equal(found.isinf(), expected.isinf())
        torch.testing.assert_close(
            found[..., :512], expected[..., :512], rtol=1e-4, atol=1e-4, msg=str(given)
        )


@needs_vllm
def test_targets_are_those_of_transformers_within_rounding(teacher, reference):
    """A count changes only where N C_i + u is within rounding of an integer."""
    tokens, sampler = windows(4), Systematic(50)
    uniforms = torch.cat([window_uniforms(0, i, LENGTH, 1) for i in range(4)])
    found, expected = (
        sampler(whole(engine, tokens).flatten(0, 1), uniforms).dense()
        for engine in (teacher, reference)
    )
    moved = (found - expected).abs().sum(1) / 2 * 50  # rounds per position that drew another id
    assert float(moved.max()) <= 2
    assert float(moved.mean()) < 0.02


@needs_vllm
def test_the_engine_conforms(teacher):
    check_engine(teacher, windows(3))
    assert teacher.identity["engine"] == "vllm"
    assert set(teacher.versions) == {"vllm"}


@needs_vllm
def test_other_weights_are_noticed(teacher, tokenizer, tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    tiny_llama(seed=1, **shape).save_pretrained(tmp_path)
    other = load_teacher(str(tmp_path), tokenizer=tokenizer)
    with pytest.raises(TeacherError, match="differ from those of transformers by"):
        _require_same_states(teacher, other, LENGTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 9}, r"\['max_model_len'\] of vLLM were given"),
        ({"hf_overrides": {"rope_theta": 1.0}}, r"\['hf_overrides'\], vLLM could run another mod"),
        ({"load_format": "dummy", "revision": "x"}, r"\['load_format', 'revision'\], vLLM could"),
        ({"attention_config": object()}, "not a JSON value"),
        ({"device": "cuda:1"}, "first visible GPU, but this process is to use cuda:1; make that"),
    ],
)
def test_options_that_would_give_other_targets_are_refused(
    options, message, teacher_folder, tokenizer
):
    """Before vLLM is imported, so without it as well."""
    with pytest.raises(InvalidArgumentError, match=message):
        load_vllm_teacher(str(teacher_folder), tokenizer=tokenizer, window_length=LENGTH, **options)


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_vllm_the_error_names_the_packages(teacher_folder, tokenizer, tmp_path):
    with pytest.raises(MissingDependencyError, match="vllm-cpu"):
        load_vllm_teacher(str(teacher_folder), tokenizer=tokenizer, window_length=32)
    (tmp_path / "text.txt").write_text("words " * 200)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sparselogits", "cache", "--teacher", str(teacher_folder)),
            *("--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "cache")),
            *("--window", "32", "--engine", "vllm"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    assert "vllm-cpu" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_vllm_that_cannot_be_imported_is_named(teacher_folder, tokenizer, tmp_path, monkeypatch):
    """As where its kernels were built for another torch."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text('raise RuntimeError("no libcudart.so.13")')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"cannot be imported: no libcudart\.so\.13\."):
        load_vllm_teacher(str(teacher_folder), tokenizer=tokenizer, window_length=32)


def test_the_identity_states_the_options_that_change_numbers():
    assert _recorded({"enforce_eager": True, "tensor_parallel_size": 2, "quantization": None}) == {}
    assert _recorded({"quantization": "fp8"}) == {"quantization": "fp8"}
    # an option that this version does not know may change numbers
    given = {"kv_cache_dtype": "fp8", "new_in_vllm_9": {"a": 1}, "max_num_seqs": 4}
    assert _recorded(given) == {"vllm": {"kv_cache_dtype": "fp8", "new_in_vllm_9": {"a": 1}}}


def test_every_rank_has_a_gpu_of_its_own(line, teacher_folder, text, tmp_path, monkeypatch):
    """Rank 1 of torchrun would start vLLM on the GPU of rank 0; it ends before packing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("sparselogits.teacher.vllm_engine.require_vllm", lambda _: None)
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    threads = torch.get_num_threads()
    done = line(
        *("cache", "--teacher", teacher_folder, "--data", text, "--out", tmp_path / "cache"),
        *("--window", 32, "--engine", "vllm", "--executor", "torchrun", "--threads", threads),
    )
    assert done.code != 0
    assert "to use cuda:1; make that GPU the only visible one" in " ".join(done.err.split())
    assert "--virtual-local-rank" in done.err
    assert not (tmp_path / "cache").exists()
    require_first_gpu("cpu")
    require_first_gpu("cuda")
    require_first_gpu("cuda:0")


def test_a_token_without_an_embedding_does_not_hide_equal_states(tokenizer, tmp_path):
    """As the padding token of Gemma and Cohere, whose states are zero."""
    model = tiny_llama()
    model.get_input_embeddings().weight.data[0] = 0
    model.save_pretrained(tmp_path)
    same = load_teacher(str(tmp_path), tokenizer=tokenizer)
    assert not same.hidden(torch.tensor([[0]])).any()
    _require_same_states(same, same, LENGTH)
