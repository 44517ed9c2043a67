"""Students made from the teacher, healed from a cache: the grid of methods, settings and seeds.

    python experiments/healing/healing.py tune SETTING --text FILE.txt --out FOLDER
    python experiments/healing/healing.py run  SETTING --text FILE.txt --out FOLDER
    python experiments/healing/healing.py collect --out FOLDER

`tune` trains every family of methods at three learning rates on other text than `run` (one seed)
and keeps the rate with the lowest held-out KL. `run` compares all methods at their rates on three
seeds, draws varied with the seed, order of the data common to all methods of a seed. `collect`
puts what is finished into experiments/results/healing_SETTING.json and healing_rates.json.
Interrupted, the same command goes on; several processes may work on one folder.

Decided before the first run:

- Primary endpoint: the share of full KD's recovery in held-out KL(teacher || student) that a method
  reaches at equal steps, 24 of 30 layers, 20 480 tokens, mean over three seeds with Student's t
  over seeds. The aim holds for a method if the mean is at least 95 %.
- The rivals at 12 entries are Top-12 and Top-12 with the ghost token; unbiased targets are ahead
  of the ghost token if the t interval of the difference in KL lies below zero.
- Settings: 24 and 18 layers; weights of 3 bits in groups of 32, 4 bits per output channel, 4 bits
  in groups of 32 with 8-bit activations; 24 layers on the teacher's own answers, greedy and drawn.
- Learning rates 1e-4, 2e-4, 4e-4 for pruned students, 2e-5, 5e-5, 1e-4 for quantised ones, chosen
  at 24 layers and at 3 bits; RS-KD takes the rate of systematic rounds of the same budget.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sparselogits.lab.compare import compare, parse_compare_recipe
from sparselogits.lab.compare.results import read_results

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"

PRUNED_RATES = (1e-4, 2e-4, 4e-4)
QUANTISED_RATES = (2e-5, 5e-5, 1e-4)
BITS = {
    "bits3": {"config": "int3-weight-only", "group_size": 32},
    "bits4": {"config": "int4-weight-only", "group_size": None},
    "bits4a8": {"config": "int8-dynamic-int4", "group_size": 32},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "layers24": {"student": {"layers": 24}, "tokens": 20_480},
    "layers18": {"student": {"layers": 18}, "tokens": 10_240},
    **{name: {"student": {"quantize": own}, "tokens": 10_240} for name, own in BITS.items()},
    "greedy": {"student": {"layers": 24}, "tokens": 10_240, "answers": 0.0},
    "drawn": {"student": {"layers": 24}, "tokens": 10_240, "answers": 1.0},
}
METHODS: dict[str, dict[str, Any]] = {
    "CE": {"method": "ce"},
    "Top-12": {"sampler": "topk", "k": 12},
    "Top-12 ghost": {"sampler": "topk", "k": 12, "missing_mass": "ghost"},
    "Top-100": {"sampler": "topk", "k": 100},
    "Top-100 ghost": {"sampler": "topk", "k": 100, "missing_mass": "ghost"},
    "systematic 12": {"sampler": "systematic", "budget": 12},
    "systematic 5": {"sampler": "systematic", "budget": 5},
    "RS-KD 12": {"sampler": "multinomial", "budget": 12},
    "RS-KD 5": {"sampler": "multinomial", "budget": 5},
    "full KD": {"method": "full"},
}
RATE_OF = {"RS-KD 12": "systematic 12", "RS-KD 5": "systematic 5"}
"""Methods that take the learning rate of another one."""

CHARACTERS_PER_TOKEN = 4.6
HOLDOUT = 0.02
TUNING_HOLDOUT = 0.05


def rates_file(out: Path, setting: str) -> Path:
    return out / f"rates-{'bits3' if 'quantize' in SETTINGS[setting]['student'] else 'layers24'}"


def documents_of(text: Path, out: Path, characters: int, holdout: float) -> Path:
    """A random part of a text as JSON lines, made once."""
    if not out.exists():
        script = HERE.parent / "compare" / "documents.py"
        temporary = out.with_suffix(f".{id(out)}")
        command = [sys.executable, str(script), "--data", str(text), "--out", str(temporary)]
        command += ["--characters", str(characters), "--holdout", str(holdout)]
        subprocess.run(command, check=True)
        temporary.replace(out)
    return out


def answers_of(text: Path, out: Path, temperature: float, tokens: int) -> Path:
    """The teacher's answers, made once; half as many again as are trained on, for the hold-out."""
    if not out.exists():
        temporary = out.with_suffix(f".{id(out)}")
        command = [sys.executable, str(HERE / "answers.py"), "--text", str(text)]
        command += ["--out", str(temporary), "--temperature", str(temperature)]
        command += ["--answers", str(tokens * 3 // 2 // 200)]
        subprocess.run(command, check=True)
        temporary.replace(out)
    return out


def common(setting: str, data: Path, out: Path) -> dict[str, Any]:
    own = SETTINGS[setting]
    values = {
        "title": f"healing, {setting}",
        "teacher": "demo",
        "teacher_dtype": "bfloat16",
        "data": str(data),
        "out": str(out),
        "window": 256,
        "separator_id": 0,
        "cache_batch": 4,
        "vary_draws": True,
        "students": {setting: {"from": "teacher", **own["student"]}},
        "training": {"batch_windows": 4, "log_steps": 1, "precision": "bfloat16"},
    }
    if "answers" in own:
        values |= {"completion_only": True}
    return values


def tune(setting: str, text: Path, out: Path) -> None:
    """The learning rate of each family with the lowest held-out KL."""
    data = documents_of(text, out / "tuning.jsonl", 46_000, TUNING_HOLDOUT)
    rates = QUANTISED_RATES if "quantize" in SETTINGS[setting]["student"] else PRUNED_RATES
    families = [name for name in METHODS if name not in RATE_OF]
    methods = [
        {**METHODS[name], "name": f"{name} @ {rate:g}", "learning_rate": rate}
        for name in families
        for rate in rates
    ]
    values = common(setting, data, out / f"tune-{setting}")
    values |= {"methods": methods, "seeds": [100], "heldout_windows": 8, "holdout": TUNING_HOLDOUT}
    results = compare(parse_compare_recipe(values, source="tune"))
    found: dict[str, dict[str, float]] = {}
    for row in results.methods:
        if row.figures:
            name, _, rate = row.method.partition(" @ ")
            found.setdefault(name, {})[rate] = row.figures["kl"].mean
    if results.complete:
        rates_file(out, setting).write_text(json.dumps(found, indent=1) + "\n")


def chosen_rate(found: dict[str, dict[str, float]], name: str) -> float:
    own = found[RATE_OF.get(name, name)]
    return float(min(own, key=lambda rate: own[rate]))


def run(setting: str, text: Path, out: Path, seeds: list[int]) -> None:
    own = SETTINGS[setting]
    if "answers" in own:
        file = out / f"{setting}.jsonl"
        data, holdout = answers_of(text, file, own["answers"], own["tokens"]), 0.33
    else:
        characters = int(own["tokens"] * CHARACTERS_PER_TOKEN)
        file = out / f"text-{own['tokens']}.jsonl"
        data, holdout = documents_of(text, file, characters, HOLDOUT), HOLDOUT
    found = json.loads(rates_file(out, setting).read_text())
    methods = [
        {**spec, "name": name, "learning_rate": chosen_rate(found, name)}
        for name, spec in METHODS.items()
    ]
    values = common(setting, data, out / setting)
    values |= {
        "methods": [{"method": "none", "name": "before training"}, *methods],
        "seeds": seeds,
        "heldout_windows": 16,
        "holdout": holdout,
    }
    compare(parse_compare_recipe(values, source="run"))
    for folder in (out / setting / "runs").iterdir():  # half a gigabyte each
        if f"--{seeds[0]}--" not in folder.name and (folder / "outcome.json").exists():
            shutil.rmtree(folder / "model", ignore_errors=True)


def collect(out: Path) -> None:
    rates = {
        name: json.loads(file.read_text())
        for name in ("layers24", "bits3")
        if (file := out / f"rates-{name}").exists()
    }
    (RESULTS / "healing_rates.json").write_text(json.dumps(rates, indent=1) + "\n")
    for setting in SETTINGS:
        if (out / setting / "results.json").exists():
            read_results(out / setting)
            shutil.copy(out / setting / "results.json", RESULTS / f"healing_{setting}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tune", "run", "collect"))
    parser.add_argument("setting", nargs="?", choices=SETTINGS)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "collect":
        collect(arguments.out)
    elif arguments.what == "tune":
        tune(arguments.setting, arguments.text, arguments.out)
    else:
        run(arguments.setting, arguments.text, arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
