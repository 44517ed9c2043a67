"""Prune a teacher, train the pruned student by each method of `METHODS`, and show the results.

The demo is a comparison (lab/compare/comparison.py lists its files), to which these are added:

    OUT/
      language-reference.jsonl  text of the demo
      recipe.yaml               recipe of the comparison, which can be edited for `compare`
      student/                  student trained from the cache of systematic rounds
      samples.json              samples of generated text
      demo.json, demo.html      results with the samples and the elapsed seconds (null if the demo
                                was resumed), and the page
      window-0.html             page that shows the first window of the cache

An interrupted demo is resumed by the same command; finished runs are not repeated.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.box import SIMPLE
from rich.table import Table

from sparselogits.console import messages, stage
from sparselogits.corpus import PackedCorpus
from sparselogits.data import CacheDataset
from sparselogits.errors import TrainingError
from sparselogits.extras import require_demo
from sparselogits.files import whole_folder, write_whole
from sparselogits.lab.compare import CompareRecipe, Results, RunRow, compare, parse_compare_recipe
from sparselogits.lab.compare.caches import Draw
from sparselogits.lab.demo.material import SEPARATOR_ID, DemoText, demo_dtype, demo_text
from sparselogits.lab.demo.samples import (
    PROMPT_TOKENS,
    TEMPERATURE,
    continuations,
    prompts_of,
)
from sparselogits.lab.demo.story import CAPTION, caution, drawings, headline, table
from sparselogits.lab.report import (
    Continuation,
    Walkthrough,
    WindowViewer,
    view_page,
    walkthrough_page,
)
from sparselogits.lab.report.charts import can_draw
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.demo_model import NAME
from sparselogits.teacher.loading import load_language_model, load_tokenizer

SEED = 7
"""Random seed for sampling, the order of windows, and samples of generated text."""
HOLDOUT = 0.375
"""Share of the text that is held out."""
PAGE = "demo.html"  # `compare` and `report` write report.html
"""File name of the demo's page."""
WINDOW_PAGE = "window-0.html"
"""File name of the page that shows the cache's first window."""
HEALED = "systematic 12"
"""Title of the method whose student is saved as OUT/student, for chatting."""

METHODS: tuple[dict[str, Any], ...] = (
    {"method": "none", "name": "not healed"},
    {"method": "ce", "name": "CE"},
    {"sampler": "topk", "k": 12, "name": "Top-12"},
    {"sampler": "topk", "k": 12, "missing_mass": "ghost", "name": "Top-12 ghost"},
    {"sampler": "multinomial", "budget": 12, "name": "RS-KD 12"},
    {"sampler": "systematic", "budget": 12, "name": HEALED},
    {"method": "full", "name": "full KD"},
)
"""Methods of the comparison, as in a recipe."""
SAMPLED = ("not healed", "Top-12", HEALED)
"""Titles of the methods whose students generate text samples, in addition to the teacher."""


@dataclass(frozen=True)
class Scale:
    """Amount of text and size of the student, which determine the duration of the demo.

    Args:
        characters: least number of characters of text, about four per token.
        heldout_windows: largest number of windows for evaluation.
        window: number of tokens per window.
        layers: number of transformer blocks in the student.
    """

    characters: int
    heldout_windows: int
    window: int = 256
    layers: int = 24


SCALES = {"bfloat16": Scale(34_000, 12), "float32": Scale(17_000, 6)}
"""Scale for each number format, such that the demo takes about four minutes on two CPU cores."""


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo.

    Args:
        results: results of the comparison.
        samples: samples of text that the models generated.
        report: path of the page.
        student: folder of the student that was trained from the cache of systematic rounds.
    """

    results: Results
    samples: list[Continuation]
    report: Path
    student: Path

    def table(self) -> Table:
        """Return the table of methods, for a terminal with 80 columns."""
        content = table(self.results)
        found = Table("method", box=SIMPLE, caption=CAPTION, caption_justify="left")
        found.padding, found.pad_edge = (0, 0, 0, 1), False
        found.columns[0].no_wrap = True
        for column in content.columns:
            found.add_column(column.head, justify="right")
        for name, cells in [*content.lines, ("the teacher", content.last)]:
            found.add_row(name, *(cell.text for cell in cells))
        return found

    def remark(self) -> str:
        """Return sentences about the results and their limits."""
        return f"{headline(self.results)} {caution(self.results)}"

    @property
    def talk(self) -> str:
        """Shell command that reads a question and prints the student's answer."""
        return talk_command(self.student)

    def to_json(self) -> dict[str, Any]:
        """Return results and samples as JSON values."""
        return {
            "results": self.results.model_dump(mode="json"),
            "samples": [asdict(sample) for sample in self.samples],
        }


def run_demo(out: Path, scale: Scale | None = None) -> DemoResult:
    """Run the demo, or its unfinished part.

    Args:
        out: folder of all output.
        scale: amount of text and size of the student; None for a scale that fits the processor.

    Raises:
        MissingDependencyError: If packages are missing; the message lists all of them.
        TrainingError: If the run of a method failed, or another process is training it.
        SparseLogitsError: If the comparison cannot be run in the folder.
    """
    require_demo()
    started, resumed = time.perf_counter(), (out / "recipe.yaml").exists()
    scale = scale or SCALES[demo_dtype()]
    text = demo_text(out, scale.characters)
    recipe = demo_recipe(out, text, scale)
    results = compare(recipe, device="cpu", stage=stage)
    runs = {run.method: run for run in results.runs}
    for run in results.runs:
        if run.status != "done":
            raise TrainingError(
                f"{run.method}: {run.message or 'another process is training this method'}. Run "
                "the same command again to continue the demo"
            )
    messages.print("generating samples of text and the page ...")
    tokenizer = load_tokenizer(NAME)
    student = _save_student(out, runs[HEALED], tokenizer)
    teacher = load_teacher(NAME, tokenizer=tokenizer, dtype=demo_dtype())
    samples = _samples(out, runs, teacher, tokenizer)
    result = DemoResult(results, samples, out / PAGE, student)
    _write_page(result, recipe, text, teacher, tokenizer)
    elapsed = None if resumed else round(time.perf_counter() - started, 1)
    stored = {"elapsed_s": elapsed} | result.to_json()
    write_whole(out / "demo.json", json.dumps(stored, indent=1) + "\n")
    for run in results.runs:
        if run.method not in SAMPLED:  # half a gigabyte each, and not used again
            shutil.rmtree(out / str(run.folder) / "model", ignore_errors=True)
    messages.print(f"demo finished in {time.perf_counter() - started:.0f} s")
    return result


def demo_recipe(out: Path, text: DemoText, scale: Scale) -> CompareRecipe:
    """Create the recipe of the demo, and write it to OUT/recipe.yaml."""
    dtype = demo_dtype()
    values = {
        "title": "the demo",
        "teacher": NAME,
        "teacher_dtype": dtype,
        "data": str(text.path),
        "out": str(out),
        "window": scale.window,
        "separator_id": SEPARATOR_ID,
        "holdout": HOLDOUT,
        "heldout_windows": scale.heldout_windows,
        "cache_batch": 4,
        "seeds": [SEED],
        "draw_seed": SEED,
        "students": {"pruned": {"from": "teacher", "layers": scale.layers}},
        "training": {
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-4,
            "warmup_steps": 0,  # training has only about ten steps
            "bf16": dtype == "bfloat16",
            "logging_steps": 1,
        },
        "methods": list(METHODS),
    }
    write_whole(out / "recipe.yaml", yaml.safe_dump(values, sort_keys=False))
    return parse_compare_recipe(values, source="the demo")


def talk_command(student: Path) -> str:
    """Return a shell command that reads a question and prints a student's answer."""
    found = shutil.which("python")
    same = found is not None and Path(found).absolute() == Path(sys.executable).absolute()
    code = (
        f"from transformers import pipeline; print(pipeline('text-generation', {str(student)!r})"
        "([{'role': 'user', 'content': input('you: ')}])[0]['generated_text'][-1]['content'])"
    )
    python = "python" if same else shlex.quote(sys.executable)
    if set(code) & set('"$`\\!'):
        return f"{python} -c {shlex.quote(code)}"
    return f'{python} -c "{code}"'  # more readable than the quotes of shlex


def _save_student(out: Path, run: RunRow, tokenizer: Any) -> Path:
    """Write a run's student in bfloat16, with tokenizer, to OUT/student; return the folder."""
    folder, origin = out / "student", f"run: {run.folder}\n"
    if (folder / "from.txt").exists() and (folder / "from.txt").read_text() == origin:
        return folder
    source = out / str(run.folder) / "model"
    shutil.rmtree(folder, ignore_errors=True)
    with whole_folder(folder) as partial:
        load_language_model(str(source), dtype="bfloat16").save_pretrained(partial)  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
        shutil.copy(source / "README.md", partial)
        (partial / "from.txt").write_text(origin)
    return folder


def _samples(
    out: Path, runs: dict[str, RunRow], teacher: TransformersTeacher, tokenizer: Any
) -> list[Continuation]:
    """Load samples of generated text, or generate and store them."""
    file, folders = out / "samples.json", [str(runs[name].folder) for name in SAMPLED]
    if file.exists() and (stored := json.loads(file.read_text()))["of"] == folders:
        return [Continuation(**sample) for sample in stored["samples"]]
    models = {"the teacher": teacher.model} | {
        name: load_language_model(str(out / str(runs[name].folder) / "model"), dtype=demo_dtype())
        for name in SAMPLED
    }
    prompts = prompts_of(PackedCorpus.open(out / "corpus"), tokenizer)
    samples = continuations(models, tokenizer, prompts, SEED)
    stored = {"of": folders, "samples": [asdict(sample) for sample in samples]}
    write_whole(file, json.dumps(stored, indent=1) + "\n")
    return samples


def _write_page(
    result: DemoResult,
    recipe: CompareRecipe,
    text: DemoText,
    teacher: TransformersTeacher,
    tokenizer: Any,
) -> None:
    """Write the page of the demo, and the page of the cache's first window."""
    results, out = result.results, recipe.out
    method = next(each for each in recipe.methods if each.title == HEALED)
    cache = out / "caches" / Draw.of(method, recipe, SEED).key
    dataset = CacheDataset(cache)
    student = load_language_model(str(result.student), dtype=demo_dtype())
    viewer = WindowViewer(dataset, tokenizer=tokenizer, teacher=teacher, student=student)
    page = view_page(viewer.view(0), rounds=dataset.identity.sampler.get("rounds"))
    write_whole(out / WINDOW_PAGE, page)
    found = Walkthrough(
        title="sparselogits demo",
        headline=headline(results),
        caution=caution(results),
        table=table(results),
        drawings=drawings(results) if can_draw() else (),
        continuations=result.samples,
        sampled=(
            f"Continuations of the first {PROMPT_TOKENS} tokens of a held-out page, and answers by "
            f"the chat template, sampled at temperature {TEMPERATURE:g} with the same random seed "
            "and largest length for all models."
        ),
        window=WINDOW_PAGE,
        next_steps=_next_steps(result, cache),
        conditions=_conditions(results, text, teacher),
    )
    write_whole(result.report, walkthrough_page(found))


def _next_steps(result: DemoResult, cache: Path) -> list[tuple[str, str]]:
    student, folder = shlex.quote(str(result.student)), shlex.quote(str(cache))
    recipe = shlex.quote(str(result.report.with_name("recipe.yaml")))
    return [
        ("Chat with the student:", result.talk),
        (
            "View another window of the cache, with the student:",
            f"sparselogits view {folder} --window 3 --teacher {NAME} --student {student}",
        ),
        (
            "Compare the methods on your own text:",
            f"sparselogits compare {recipe} --data TEXT --out my-comparison",
        ),
        (
            "Cache your own text:",
            f"sparselogits cache --teacher {NAME} --data TEXT --out my-cache --holdout 0.05",
        ),
        (
            "Prune a student and train it from that cache:",
            f"sparselogits shrink {NAME} --layers 24 --cache my-cache --out my-start\n"
            "sparselogits train --cache my-cache --student my-start --out my-student",
        ),
    ]


def _conditions(
    results: Results, text: DemoText, teacher: TransformersTeacher
) -> list[tuple[str, str]]:
    recipe, corpus = results.settings["recipe"], results.settings["corpus"]
    before = results.settings["teacher"]["parameters"]
    after = results.settings["student_parameters"]["pruned"]
    student = recipe["students"]["pruned"]
    training, machine, made = recipe["training"], results.provenance, teacher.identity
    rounds = {
        row.method: row.sampler["rounds"]
        for row in results.methods
        if row.sampler and "rounds" in row.sampler
    }
    return [
        ("text", text.description),
        ("training tokens", f"{corpus['training_tokens']:,}, one pass"),
        ("held-out tokens", f"{corpus['heldout_windows'] * recipe['window']:,}"),
        ("teacher", f"SmolLM2-135M-Instruct, {made['quantization']}, {made['dtype']}"),
        (
            "student",
            f"the teacher's {student['layers']} most influential blocks"
            + ("" if after is None else f", {after / 1e6:.0f} of {before / 1e6:.0f} M parameters"),
        ),
        (
            "training",
            f"AdamW, learning rate {training['learning_rate']:g} decayed to zero, "
            f"{training['per_device_train_batch_size'] * recipe['window']} tokens per step, "
            f"computed in {'bfloat16' if training['bf16'] else 'float32'}",
        ),
        ("rounds", ", ".join(f"{name}: {number}" for name, number in rounds.items())),
        ("bytes", "bytes of the cached targets per token, without the text"),
        ("seconds", "wall time of training; full KD runs the teacher in each step"),
        (
            "machine",
            f"{machine['processor']}, {torch.get_num_threads()} threads, Python "
            f"{machine['python']}, torch {machine['torch']}",
        ),
        ("seed", str(SEED)),
    ]
