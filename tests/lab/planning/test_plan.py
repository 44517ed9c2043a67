"""Test the arithmetic of a plan, and the paper's numbers from the paper's settings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.planning import (
    Settings,
    StorageCost,
    device_kind,
    plan,
    quantity,
    size_of,
)
from sparselogits.lab.planning.cost import (
    BUILD_OVERHEAD,
    MEASURED_BITS,
    STEP_OVERHEAD,
    TEXT_BYTES,
)
from sparselogits.lab.planning.grid import STUDENTS, TOKENS, grid
from tests.conftest import tiny_llama

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
PAPER = Settings(8e9, 3e9, 1e11, StorageCost.paper(12))


def run(*arguments: object) -> dict[str, object]:
    found = CliRunner().invoke(app, ["plan", *map(str, arguments), "--json"])
    assert found.exit_code == 0, found.output
    shown: dict[str, object] = json.loads(found.stdout)
    return shown


def throughput_lost(ce: float, cached: float) -> float:
    """Relative loss of throughput when training from the cache instead of by CE."""
    return 1 - cached / ce


def test_the_papers_storage():
    assert plan(PAPER).bytes == pytest.approx(3.6e12)
    assert plan(PAPER).bytes_per_token == 36


@pytest.mark.parametrize(
    ("ce", "cached", "published"), [(2.9, 2.6, 0.105), (1.77, 1.73, 0.023)], ids=["300M", "3B"]
)
def test_the_papers_overheads(ce, cached, published):
    """Published throughputs are rounded; the overhead lies where the rounding puts it."""
    unit = 0.1 if ce == 2.9 else 0.01
    low = throughput_lost(ce - unit / 2, cached + unit / 2)
    high = throughput_lost(ce + unit / 2, cached - unit / 2)
    assert low < published < high
    assert throughput_lost(ce, cached) == pytest.approx(published, abs=0.002)


@pytest.mark.parametrize(("size", "overhead"), [(3e8, 0.105), (3e9, 0.023)])
def test_an_overhead_given_is_the_overhead_planned(size, overhead):
    found = plan(replace(PAPER, student_params=size, step_overhead=overhead))
    assert found.student_hours / found.ce_hours - 1 == pytest.approx(overhead)


def test_constants_are_those_of_the_benchmarks():
    size = json.loads((BENCHMARKS / "size.json").read_text())
    real, made_up = size["methods"]["systematic N=21"], size["synthetic"]["systematic N=21"]
    assert MEASURED_BITS[0][1] == pytest.approx(real["bits_per_entry"], abs=0.005)
    assert MEASURED_BITS[1][1] == pytest.approx(made_up["bits_per_entry"], abs=0.005)
    assert pytest.approx(real["text_bytes_per_token"], abs=0.005) == TEXT_BYTES
    page = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text()
    assert f"writing | {1 + BUILD_OVERHEAD:g} (" in page
    assert f"| even | cache | {1 + STEP_OVERHEAD:g} (" in page


@given(
    teacher=st.floats(1e8, 1e12),
    student=st.floats(1e7, 1e11),
    tokens=st.floats(1e6, 1e13),
    price=st.floats(0.1, 10),
    storage=st.floats(0, 100),
)
def test_at_break_even_both_ways_cost_the_same(teacher, student, tokens, price, storage):
    settings = Settings(teacher, student, tokens, device_price=price, storage_price=storage)
    passes = plan(settings).break_even_cost_passes
    if passes is None:  # the teacher is cheaper than what the cache adds to a step
        assert 2 * teacher <= STEP_OVERHEAD * 6 * student * (1 + 1e-9)
        return
    there = plan(replace(settings, passes=passes))
    assert there.cached_cost == pytest.approx(there.online_cost)
    later = plan(replace(settings, passes=passes * 1.1))
    assert later.cached_cost < later.online_cost


def test_hours_bytes_and_rates_agree():
    found = plan(
        Settings(1e9, 1e9, 1e9, StorageCost(10, 8, 0), device=device_kind("x", 1e15), ranks=4)
    )
    assert found.ce_hours == pytest.approx(6e18 / 4e14 / 3600)
    assert found.online_hours - found.ce_hours == pytest.approx(found.ce_hours / 3)
    assert found.read_bytes_per_second_per_rank * found.student_hours * 3600 == pytest.approx(1e10)
    assert found.read_bytes_per_second == 4 * found.read_bytes_per_second_per_rank
    assert (found.windows, found.shards) == (976_563, 1908)
    assert found.shard_hours * found.shards == pytest.approx(found.teacher_hours)
    assert found.lost_hours == pytest.approx(found.failures * found.shard_hours / 2)
    pass_seconds = found.student_hours * 3600 / 4
    assert found.shuffled_requests_per_second * pass_seconds == pytest.approx(3 * found.windows)
    assert found.list_requests == 2


def test_a_small_teacher_beside_a_large_student_needs_no_cache():
    assert plan(Settings(1e7, 1e10, 1e9)).break_even_passes is None


def test_grid_has_every_size():
    plans = grid(PAPER)
    assert set(plans) == {(s, t) for s in STUDENTS for t in TOKENS}
    assert plans["3B", "100B"] == plan(PAPER)


def test_command_with_a_grid_and_a_plot(tmp_path):
    plot = tmp_path / "plan.png"
    options = ("--teacher-params", "8B", "--bits", 24, "--text-bytes", 0, "--tokens", "100B")
    shown = run(*options, "--grid", "--plot", plot)
    assert shown["plan"]["bytes"] == pytest.approx(3.6e12)
    assert len(shown["grid"]) == 25
    assert plot.read_bytes().startswith(b"\x89PNG")
    table = CliRunner().invoke(app, ["plan", *map(str, options), "--grid", "--price", "2"])
    assert "3.6 TB, 36.00 bytes per token" in table.stdout
    assert "360 TB" in table.stdout


def test_parameters_of_a_folder(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    count = sum(p.numel() for p in model.parameters())
    assert size_of(str(tmp_path), "teacher").parameters == count


@pytest.mark.parametrize("text", ["", "8X", "-3B", "0", "1.2.3", "nan", "inf", "1e999"])
def test_what_is_no_quantity(text):
    with pytest.raises(InvalidArgumentError, match="give"):
        quantity(text, "--tokens")
    with pytest.raises(InvalidArgumentError, match="give"):
        size_of(text or "nothing", "--teacher-params")


@pytest.mark.parametrize(
    ("text", "value"), [("8B", 8e9), ("1.5T", 1.5e12), ("2e9", 2e9), ("300m", 3e8), ("1_000", 1000)]
)
def test_quantities(text, value):
    assert quantity(text, "x") == value


@pytest.mark.parametrize(
    "change",
    [{"teacher_utilisation": 1.5}, {"workers": 0}, {"passes": 0}, {"storage": StorageCost(-1)}],
    ids=str,
)
def test_settings_out_of_range(change):
    with pytest.raises(InvalidArgumentError, match="; give"):
        replace(PAPER, **change)


def test_folders_and_devices_that_will_not_do(tmp_path):
    with pytest.raises(InvalidArgumentError, match="has no config"):
        size_of(str(tmp_path), "--teacher-params")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(
        InvalidArgumentError, match="not the configuration of a causal language model"
    ):
        size_of(str(tmp_path), "--teacher-params")
    with pytest.raises(InvalidArgumentError, match="--device-flops"):
        device_kind("tpu")
