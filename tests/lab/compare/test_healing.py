"""Test the healing experiments end to end on tiny models."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparselogits.evaluate import t_interval
from sparselogits.lab.compare import compare, parse_compare_recipe, read_results

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "experiments" / "healing"
RESULTS = ROOT / "experiments" / "results"


def script(name: str) -> ModuleType:
    """Load a script of experiments/healing as a module."""
    spec = importlib.util.spec_from_file_location(f"healing_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def grid(tiny, tmp_path_factory) -> Path:
    """A finished setting of the grid, of tiny models."""
    how = {"learning_rate": 1e-3}
    values = tiny(
        tmp_path_factory.mktemp("grid"),
        students={"layers1": {"from": "teacher", "layers": 1}},
        training={"per_device_train_batch_size": 8, "logging_steps": 1},
        vary_draws=True,
    )
    methods = [
        {"method": "none", "name": "before training"},
        {"method": "ce", "name": "CE", **how},
        {"sampler": "topk", "k": 12, "missing_mass": "ghost", "name": "Top-12 ghost", **how},
        {"sampler": "systematic", "budget": 12, "name": "systematic 12", **how},
        {"method": "full", "name": "full KD", **how},
    ]
    recipe = parse_compare_recipe({**values, "methods": methods}, source="the test")
    results = compare(recipe)
    assert results.complete, [run.message for run in results.runs]
    return recipe.out


@pytest.mark.slow
def test_on_policy_arms_are_of_equal_time_and_begin_where_they_say(grid, tmp_path, monkeypatch):
    own = script("on_policy")
    sizes = {"PROMPT": 8, "COMPLETION": 8, "BATCH": 4, "TUNING_WINDOWS": 2, "RATES": (1e-3, 3e-3)}
    for name, value in sizes.items():
        monkeypatch.setattr(own, name, value)
    out, result = tmp_path / "on-policy", tmp_path / "result.json"
    out.mkdir()
    own.run(grid, out, [0, 1], 0.5)
    own.collect(out, result)
    stored = json.loads(result.read_text())
    arms = {(row["arm"], row["seed"]): row for row in stored["arms"]}
    trained = [name for name, arm in own.ARMS.items() if arm.method]
    assert set(arms) == {("pruned", 0), ("healed", 0)} | {(n, s) for n in trained for s in (0, 1)}
    assert len(stored["tuning"]) == 4
    seconds = stored["settings"]["seconds"]
    whole = sum(seconds.values())
    for (name, _), row in arms.items():
        arm = own.ARMS[name]
        assert row["trained_seconds"] >= sum(seconds[part] for part in arm.seconds)
        if name in own.AT_EQUAL_TIME:  # a step is not cut short
            assert row["total_seconds"] >= whole * (1 - 1e-9)
    # what the comparison measured of the same students
    by_method = {row.method: row.figures for row in read_results(grid).methods}
    for name, method in (("pruned", "before training"), ("healed", "systematic 12")):
        run = next(r for r in read_results(grid).runs if r.method == method and r.seed == 0)
        assert arms[name, 0]["kl"] == pytest.approx(run.figures["kl"], rel=1e-4)
    assert by_method["systematic 12"]["kl"].mean < by_method["before training"]["kl"].mean
    assert arms["healed, then on-policy", 0]["steps"] > 0
    sheet = script("tables").on_policy_table(stored)
    assert [line.split(" | ")[0] for line in sheet[2:9]] == [f"| {name}" for name in own.ARMS]
    name = "reverse_kl_of_a_sequence"
    pair = ("healed, then on-policy", "healed for longer")
    between = t_interval([arms[pair[0], s][name] - arms[pair[1], s][name] for s in (0, 1)])
    said = f"{between.mean:.2f} ({between.low:.2f} to {between.high:.2f}), over seeds."
    assert f"Reverse KL per sequence, {pair[0]} less {pair[1]}: {said}" in sheet
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.json")}
    own.run(grid, out, [0, 1], 0.5)
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*.json")}


@pytest.mark.slow
def test_a_teacher_on_its_own_text_differs_from_itself_by_nothing(grid, tmp_path, monkeypatch):
    own = script("on_policy")
    monkeypatch.setattr(own, "PROMPT", 8)
    monkeypatch.setattr(own, "COMPLETION", 8)
    found = own.Grid.read(grid)
    tokenizer = own.load_tokenizer(found.teacher[0])
    teacher = own.load_teacher(found.teacher[0], tokenizer=tokenizer, dtype="float32")
    bench = own.Bench(found, tmp_path, teacher, tokenizer)
    prompts = own.prompts_of(found.corpus.read_holdout, range(3))
    same = bench.own_text(teacher.model, prompts)
    assert same["reverse_kl"] == pytest.approx([0.0] * 3, abs=1e-4)
    assert same["acceptance"] == pytest.approx(same["tokens"])
    other = bench.own_text(
        own.load_language_model(str(found.starts["pruned"]), dtype="float32"), prompts
    )
    assert min(other["reverse_kl"]) > 0.01
    assert all(0 < tokens <= 4 * 8 for tokens in other["tokens"])


@pytest.mark.slow
def test_table_and_figure_say_what_the_results_hold(grid, tmp_path):
    results = read_results(grid)
    sheet = script("tables").comparison_table(results)
    cells = [line.strip("| ").split(" | ") for line in sheet]
    head, rows = cells[0], {row[0]: row for row in cells[2:]}
    kl = {(run.method, run.seed): run.figures["kl"] for run in results.runs}
    for row in results.methods:
        found = dict(zip(head, rows[row.method], strict=True))
        assert found["KL"] == f"{row.figures['kl'].mean:.3f}"
        assert (found["entries"] == "-") == (row.sampler is None)
        if row.method == "systematic 12":
            less = t_interval([kl[row.method, s] - kl["Top-12 ghost", s] for s in (0, 1)])
            said = f"{less.mean:.3f} ({less.low:.3f} to {less.high:.3f})"
            assert found["KL less Top-12 ghost's"] == said
            assert found["of full KD's recovery %"].startswith(f"{row.recovered.mean:.1f}")
    assert rows["(the teacher)"][3] == f"{results.teacher.figures['loss']:.3f}"
    figure = script("figure")
    drawn = figure.drawing(results, "entries")
    points = [p for data in _datasets(drawn.spec()) for p in data if "method" in p]
    shares = {row.method: row.recovered.mean for row in results.methods if row.sampler}
    assert {point["method"]: point["y"] for point in points} == pytest.approx(shares)
    figure.draw_png(drawn, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_the_figure_of_settings_shows_the_stored_recoveries(tmp_path):
    figure = script("figure")
    names = ("layers24", "bits4a8")
    settings = {name: read_results(RESULTS / f"healing_{name}.json") for name in names}
    drawn = figure.drawing_of_settings(settings)
    (points,) = ([p for p in data if "method" in p] for data in _datasets(drawn.spec()) if data[1:])
    shares = {
        (figure.HEALING[name], row.method): row.recovered.mean
        for name, results in settings.items()
        for row in results.methods
        if row.method in figure.COMPARED
    }
    assert {(p["setting"], p["method"]): p["x"] for p in points} == pytest.approx(shares)
    assert len(shares) == 10


def _datasets(spec: dict[str, Any]) -> list[list[dict[str, Any]]]:
    found = list(spec.get("datasets", {}).values())
    layers = [spec, *spec["layer"]]
    return found + [own["data"]["values"] for own in layers if "values" in own.get("data", {})]


def test_pages_hold_the_tables_of_the_stored_results():
    """Put in by `python experiments/healing/tables.py --write`."""
    tables = script("tables")
    pages = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    shown = {name for page in pages for name in tables.names_in(page)}
    assert {file.stem for file in tables.RESULTS.glob("healing_*.json")} <= shown
    for page in pages:
        assert tables.filled(page) == page
