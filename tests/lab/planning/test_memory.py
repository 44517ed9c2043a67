"""Test memory estimates against measured allocations, and the plan's statements about them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AfmoeConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    Llama4TextConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.planning import (
    DEVICES,
    device_kind,
    fewest_devices,
    largest_batch,
    memory,
    pass_memory,
    shape_of,
    size_of,
    training_memory,
)
from sparselogits.losses import chunked
from sparselogits.teacher import transformers_engine
from tests.conftest import tiny_llama

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
LOWEST, HIGHEST = 0.85, 1.8
"""Bounds of the estimate divided by the measured memory; docs/planning.md explains high values."""


def test_the_estimate_against_what_was_measured():
    rows = json.loads((BENCHMARKS / "plan_memory.json").read_text())["rows"]
    assert {row["what"] for row in rows} == {"pass", "step", "checkpointed step"}
    ratios = [row["estimate_over_it"] for row in rows]
    assert LOWEST < min(ratios) < max(ratios) < HIGHEST
    # where activations outweigh logits, as in large models
    dense = [row["estimate_over_it"] for row in rows if row["hidden"] == 512]
    assert 0.85 < min(dense) < max(dense) < 1.15
    page = (BENCHMARKS.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    assert f"between {min(ratios):.2f} and {max(ratios):.2f} times" in page
    assert f"({min(dense):.2f} to {max(dense):.2f})" in page


def test_the_estimate_against_what_is_allocated_now(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plan_memory

    hidden, intermediate, layers, vocab = plan_memory.SHAPES[-1]
    model = plan_memory.model_of(hidden, intermediate, layers, vocab)
    parameters = sum(p.numel() for p in model.parameters())
    shape = memory.Shape("", parameters, hidden, layers, intermediate)
    sizes = {"vocab": vocab, "window": plan_memory.WINDOW, "batch": plan_memory.BATCH}
    estimate = pass_memory(parameters, shape, **sizes, dtype="float32")
    expected = estimate.total - dict(estimate.parts)["weights"]
    assert expected == pytest.approx(plan_memory.measured_pass(model, vocab), rel=0.15)


def test_constants_are_those_of_the_code():
    assert memory.SLICE_POSITIONS == transformers_engine.SLICE_POSITIONS
    meta, vocab = torch.device("meta"), 128_256  # an accelerator of 16 GiB
    rows = chunked.default_chunk_rows(10**6, vocab, meta, torch.bfloat16)
    assert rows * vocab * 4 == pytest.approx(16 * 2**30 * memory.CHUNK_SHARE, rel=0.01)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("a100", "a100-80gb"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("a100_40gb", "a100-40gb"),
        ("h100", "h100"),
        ("H100 SXM", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("b200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("rtx-3090", "rtx3090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("A10G", "a10g"),
        ("AMD Instinct MI300X", "mi300x"),
        ("mi300x", "mi300x"),
    ],
)
def test_devices_by_the_names_that_people_and_tools_use(said, name):
    assert device_kind(said) is DEVICES[name] or device_kind(said) == DEVICES[name]
    assert device_kind(said).memory


def test_an_unknown_device_says_what_to_give():
    with pytest.raises(InvalidArgumentError, match=r"did you mean h200\?.*--device-flops.*-memory"):
        device_kind("h20o")
    assert device_kind("mine", 1e14, 64e9).memory == 64e9


@given(
    parameters=st.floats(1e6, 1e12),
    batch=st.integers(1, 64),
    window=st.integers(16, 8192),
    capacity=st.floats(1e9, 1e12),
)
def test_memory_grows_with_what_it_should(parameters, batch, window, capacity):
    shape = shape_of(parameters)

    def needed(size: int, devices: int) -> memory.Memory:
        return pass_memory(
            parameters, shape, vocab=128_256, window=window, batch=size, devices=devices
        )

    assert needed(2 * batch, 1).total >= needed(batch, 1).total >= needed(batch, 2).total
    most = largest_batch(needed, capacity)
    if most is not None:
        assert needed(most, 1).fits(capacity)
        assert most == 2**15 or not needed(2 * most, 1).fits(capacity)
    devices = fewest_devices(needed, batch, capacity)
    if devices is not None and devices > 1:
        assert not needed(batch, devices // 2).fits(capacity)
    kept, again = (
        training_memory(
            parameters, shape, vocab=128_256, window=window, batch=batch, checkpointing=flag
        )
        for flag in (False, True)
    )
    if shape.layers > 8:
        assert again.total <= kept.total


def test_shapes():
    assert shape_of(8e9).name == "Llama-3.1-8B"
    small = shape_of(7e6)
    assert small.name == "SmolLM2-135M, scaled"
    assert small.hidden < 576
    assert small.layers < 30


def test_the_shape_of_a_folder(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    found = size_of(str(tmp_path), "teacher").shape
    config = model.config
    assert found.hidden == config.hidden_size
    assert found.layers == config.num_hidden_layers
    assert found.intermediate == config.intermediate_size


SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        (MixtralConfig, {"intermediate_size": 96, "num_experts_per_tok": 2}, 192),
        (
            Qwen3MoeConfig,
            {"intermediate_size": 100, "moe_intermediate_size": 48, "num_experts_per_tok": 3},
            144,
        ),
        (
            Qwen2MoeConfig,
            {"intermediate_size": 100, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
            | {"shared_expert_intermediate_size": 80},
            176,
        ),
        (
            DeepseekV3Config,
            {"intermediate_size": 100, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
            | {"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            144,
        ),
        (Qwen3MoeConfig, {"intermediate_size": 500, "moe_intermediate_size": 48}, 500),
        (Llama4TextConfig, {"intermediate_size": 48, "intermediate_size_mlp": 96}, 240),
        (Llama4TextConfig, {"intermediate_size": 48, "intermediate_size_mlp": 500}, 500),
        (
            Gemma4TextConfig,
            {"intermediate_size": 100, "moe_intermediate_size": 48, "top_k_experts": 2}
            | {"num_experts": 4, "enable_moe_block": True, "vocab_size_per_layer_input": 128},
            196,
        ),
        (
            AfmoeConfig,
            {"intermediate_size": 100, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
            | {"num_experts": 4, "num_shared_experts": 1},
            144,
        ),
    ],
)
def test_the_shape_sums_over_active_experts(kind, sizes, expected, tmp_path):
    kind(**SMALL, **sizes).save_pretrained(tmp_path)
    assert size_of(str(tmp_path), "teacher").shape.intermediate == expected


def test_sizes_per_layer_give_a_plausible_shape(tmp_path):
    sizes = {"intermediate_size": [96, 128], "vocab_size_per_layer_input": 128}
    Gemma3nTextConfig(**SMALL | sizes, num_kv_shared_layers=0).save_pretrained(tmp_path)
    found = size_of(str(tmp_path), "teacher")
    assert found.shape == shape_of(found.parameters)


def plan(*words: str) -> str:
    done = CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def test_will_an_8b_teacher_fit_in_80_gb():
    said = plan("--teacher-params", "8B", "--device", "a100-80gb", "--batch", "16")
    assert "with --batch 16: fits in 80 GB; the largest is 256" in said
    assert "weights 16 GB" in said
    assert "does not fit in 80 GB; split it over 2" in plan(
        "--teacher-params", "70B", "--device", "h100"
    )
    teacher, _, _ = plan(
        "--teacher-params", "70B", "--device", "h100", "--dtype", "int4"
    ).partition("memory, student")
    assert "with --batch 8: fits in 80 GB" in teacher
    shown = CliRunner().invoke(app, ["plan", "--teacher-params", "8B", "--json"])
    found = json.loads(shown.stdout)["memory"]
    assert found["teacher"]["fits"] is True
    assert found["teacher"]["largest_batch"] == 256
    assert found["teacher"]["shape"]["name"] == "Llama-3.1-8B"


def test_small_plans_are_in_minutes():
    said = plan("--teacher-params", "8B", "--tokens", "10M", "--device", "rtx4090")
    assert "teacher 42 min on one rtx4090" in said
    assert "tokenising 17 s on one processor core" in said
    large = plan("--teacher-params", "8B", "--tokens", "1T", "--workers", "1000")
    assert "days) on 1,000 h100" in large or "h on 1,000 h100" in large


def test_dtypes_that_there_are_not():
    done = CliRunner().invoke(app, ["plan", "--teacher-params", "8B", "--dtype", "fp4"])
    assert done.exit_code != 0
    with pytest.raises(InvalidArgumentError, match="give one of float32, bfloat16"):
        pass_memory(1e9, shape_of(1e9), vocab=1000, window=10, batch=1, dtype="fp4")
