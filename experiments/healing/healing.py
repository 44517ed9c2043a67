"""Heal students created from the teacher from a cache: a grid of methods, settings and seeds.

    python experiments/healing/healing.py tune SETTING --text FILE.txt --out FOLDER
    python experiments/healing/healing.py run  SETTING --text FILE.txt --out FOLDER
    python experiments/healing/healing.py collect --out FOLDER

`tune` trains every family of methods at three learning rates on other text than `run` (one seed)
and selects the rate with the lowest held-out KL. `run` compares all methods at their rates on three
seeds; a seed sets the draws and the order of the data, which all methods of the seed share.
`collect` writes the finished results to experiments/results/healing_SETTING.json and
healing_rates.json. After an interruption the same command resumes; several processes may work on
one folder.

Decided before the first run:

- Primary endpoint: the share of full KD's recovery in held-out KL(teacher || student) that a method
  reaches at equal steps, 24 of 30 layers, 10 240 tokens, mean over three seeds,
  interval by Student's t over seeds. The aim holds for a method if the mean is at least 95 %.
- At 12 entries, unbiased targets are compared with Top-12 and with Top-12 with the ghost token;
  they are ahead of the ghost token if the t interval of the difference in KL lies below zero.
- Settings: 24 and 18 layers; weights of 3 bits in groups of 32, 4 bits per output channel, 4 bits
  in groups of 32 with 8-bit activations; 24 layers on the teacher's own answers, greedy and drawn.
- Learning rates 1e-4, 2e-4, 4e-4 for pruned students, 2e-5, 5e-5, 1e-4 for quantised ones, chosen
  at 24 layers and at 3 bits; RS-KD takes the rate of systematic rounds of the same budget.

Changed before the quantised settings and the drawn answers were run: teacher and products are
float32 in place of bfloat16 on a processor without bfloat16 products (nine times slower there).
The quantised settings were run with `--rate 1e-4`, which tuning at 3 bits in bfloat16 had chosen
for every method. Its files were lost; tuning again in float32 chose the same (healing_rates.json).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from planned import PRECISION
from small_teacher import documents
from sparselogits.corpus import open_source, pack, packing_for
from sparselogits.data import TextDataset
from sparselogits.evaluate import evaluate
from sparselogits.lab.compare import compare, parse_compare_recipe
from sparselogits.lab.compare.results import Results, read_results
from sparselogits.lab.compare.windows import windows_of
from sparselogits.locks import lock_file
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer

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
    "layers24": {"student": {"layers": 24}, "tokens": 10_240},
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
"""Methods that use the learning rate chosen for another method."""

CHARACTERS_PER_TOKEN = 4.8
"""Mean number of characters per token of the text, rounded up."""

HELDOUT_WINDOWS = 16
HELDOUT_TOKENS = (HELDOUT_WINDOWS + 1) * 256  # the last window may be incomplete
TUNING_HOLDOUT = 0.05
"""Fraction of the tuning text that is held out."""


def rates_file(out: Path, setting: str) -> Path:
    """Return the file with the held-out KL of each learning rate for a setting."""
    return out / f"rates-{'bits3' if 'quantize' in SETTINGS[setting]['student'] else 'layers24'}"


def documents_of(text: Path, out: Path, characters: int, holdout: float) -> Path:
    """Write a random part of a text as JSON lines, if it does not exist yet; return its file."""
    if not out.exists():
        script = HERE.parent / "compare" / "documents.py"
        temporary = out.with_suffix(f".{id(out)}")
        command = [sys.executable, str(script), "--data", str(text), "--out", str(temporary)]
        command += ["--characters", str(characters), "--holdout", str(holdout)]
        subprocess.run(command, check=True)
        temporary.replace(out)
    return out


def answers_of(text: Path, out: Path, temperature: float, tokens: int) -> Path:
    """Generate the teacher's answers, if they do not exist yet; return their file."""
    if not out.exists():
        temporary = out.with_suffix(f".{id(out)}")
        command = [sys.executable, str(HERE / "answers.py"), "--text", str(text)]
        command += ["--out", str(temporary), "--temperature", str(temperature)]
        command += ["--answers", str(tokens // 225)]
        subprocess.run(command, check=True)
        temporary.replace(out)
    return out


def common(setting: str, data: Path, out: Path) -> dict[str, Any]:
    """Return the fields of a comparison's recipe that tuning and runs share."""
    own = SETTINGS[setting]
    values = {
        "title": f"healing, {setting}",
        "teacher": "demo",
        "teacher_dtype": PRECISION,
        "data": str(data),
        "out": str(out),
        "window": 256,
        "separator_id": 0,
        "cache_batch": 4,
        "vary_draws": True,
        "students": {setting: {"from": "teacher", **own["student"]}},
        "training": {
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "bf16": PRECISION == "bfloat16",
        },
    }
    if "answers" in own:
        values |= {"completion_only": True}
    return values


def tune(setting: str, text: Path, out: Path) -> None:
    """Train each family of methods at each learning rate, and store the held-out KL of all."""
    data = documents_of(text, out / "tuning.jsonl", 46_000, TUNING_HOLDOUT)
    with lock_file(out / ".unseen", wait=True):
        other = unseen(text, data, out / "tuning-heldout")
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
    if not results.complete:
        return
    with lock_file(out / ".judging", wait=True):
        if not rates_file(out, setting).exists():
            judge(setting, results, rates, other, out)


def judge(
    setting: str, results: Results, rates: Sequence[float], other: TextDataset, out: Path
) -> None:
    """Measure every tuned student on other windows, and write the KL of each rate."""
    teacher = load_teacher("demo", tokenizer=load_tokenizer("demo"), dtype=PRECISION)
    found: dict[str, dict[str, float]] = {}
    for rate in rates:
        students = {
            row.method.partition(" @ ")[0]: load_language_model(
                str(out / f"tune-{setting}" / str(row.folder) / "model"), dtype="float32"
            )
            for row in results.runs
            if row.method.endswith(f" @ {rate:g}")
        }
        for name, own in evaluate(students, other, teacher, resamples=1).items():
            if name in students:
                found.setdefault(name, {})[f"{rate:g}"] = own.kl
    rates_file(out, setting).write_text(json.dumps(found, indent=1) + "\n")


def unseen(text: Path, seen: Path, folder: Path) -> TextDataset:
    """Return windows of documents that tuning did not use; its own hold-out is too small."""
    trained = {json.loads(line)["text"] for line in seen.read_text().splitlines()}
    file = folder.with_suffix(".jsonl")
    others = [own for own in documents([text]) if own not in trained][::7]
    file.write_text("".join(json.dumps({"text": own}) + "\n" for own in others))
    tokenizer = load_tokenizer("demo")
    packing = packing_for(tokenizer, window_length=256, separator_id=0, holdout=0.9)
    corpus = pack(open_source(str(file)), tokenizer, packing, folder, vocab_size=49152)
    return TextDataset(corpus, limit=HELDOUT_WINDOWS)


def chosen_rate(found: dict[str, dict[str, float]], name: str) -> float:
    """Return the learning rate with the lowest held-out KL for a method."""
    own = found[RATE_OF.get(name, name)]
    return float(min(own, key=lambda rate: own[rate]))


def run(setting: str, text: Path, out: Path, seeds: list[int], rate: float | None) -> None:
    """Compare all methods of a setting, at one learning rate or each at its chosen one."""
    own = SETTINGS[setting]
    if "answers" in own:
        file = out / f"{setting}.jsonl"
        with lock_file(out / ".answers", wait=True):
            data = answers_of(text, file, own["answers"], own["tokens"] + HELDOUT_TOKENS)
    else:
        characters = int((own["tokens"] + HELDOUT_TOKENS) * CHARACTERS_PER_TOKEN)
        data = documents_of(text, out / f"text-{own['tokens']}.jsonl", characters, 0)
    holdout = HELDOUT_TOKENS / (own["tokens"] + HELDOUT_TOKENS)
    found = json.loads(rates_file(out, setting).read_text()) if rate is None else {}
    methods = [
        {**spec, "name": name, "learning_rate": rate or chosen_rate(found, name)}
        for name, spec in METHODS.items()
    ]
    values = common(setting, data, out / setting)
    values |= {
        "methods": [{"method": "none", "name": "before training"}, *methods],
        "seeds": seeds,
        "heldout_windows": HELDOUT_WINDOWS,
        "holdout": holdout,
    }
    for done in compare(parse_compare_recipe(values, source="run")).runs:
        if done.seed != seeds[0] and done.status == "done":  # saves half a gigabyte each
            shutil.rmtree(out / setting / str(done.folder) / "model", ignore_errors=True)


def collect(out: Path) -> None:
    """Copy the finished results of all settings to experiments/results."""
    rates = {
        name: json.loads(file.read_text())
        for name in ("layers24", "bits3")
        if (file := out / f"rates-{name}").exists()
    }
    (RESULTS / "healing_rates.json").write_text(json.dumps(rates, indent=1) + "\n")
    for setting in SETTINGS:
        if (out / setting / "results.json").exists():
            read_results(out / setting)  # validates the file
            text = (out / setting / "results.json").read_text(encoding="utf-8")
            stored = text.replace(f"{out}/", "")  # without local paths
            (RESULTS / f"healing_{setting}.json").write_text(stored, encoding="utf-8")
            sums = RESULTS / f"healing_{setting}_windows.npz"
            sums.write_bytes(windows_of(out / setting))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tune", "run", "collect"))
    parser.add_argument("setting", nargs="?", choices=SETTINGS)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rate", type=float, help="learning rate of all methods, in place of tuned ones"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "collect":
        collect(arguments.out)
    elif arguments.what == "tune":
        tune(arguments.setting, arguments.text, arguments.out)
    else:
        run(arguments.setting, arguments.text, arguments.out, arguments.seeds, arguments.rate)


if __name__ == "__main__":
    main()
