"""`sparselogits demo`: one small student, five ways to train it, one table.

Teacher's pass, caches, students and figures land in one directory; what is finished is not done
again, so an interrupted demo goes on where it stood.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from sparselogits.caching import BuildReport, CacheRequest, build_caches
from sparselogits.console import messages, stage
from sparselogits.corpus import PackedCorpus, open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.data import TextDataset
from sparselogits.evaluate import HeldOut, evaluate
from sparselogits.extras import require_demo
from sparselogits.files import write_whole
from sparselogits.lab.demo.material import (
    SEPARATOR_ID,
    DemoText,
    demo_dtype,
    demo_text,
)
from sparselogits.lab.demo.story import (
    Told,
    continuations,
    prompts_of,
    write_story,
    write_window,
)
from sparselogits.lab.report import Continuation
from sparselogits.samplers import Multinomial, Systematic, TopK
from sparselogits.store import Cache
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.demo_model import NAME, demo_model
from sparselogits.teacher.loading import keep_tokenizer, load_causal_lm, load_tokenizer
from sparselogits.train import Recipe, RunResult, run
from sparselogits.train.recipe import Student

CHARACTERS = 64_000
WINDOW = 256
HOLDOUT = 0.15
HELDOUT_WINDOWS = 16
BUDGET = 12.0
TOP_K = 12
SEED = 7
STUDENT = Student(hidden_size=128, layers=4, heads=4)


@dataclass(frozen=True)
class _Way:
    """One row of the table: a name, a training method, and the cache it reads."""

    key: str
    name: str
    method: str
    cache: str


WAYS = (
    _Way("ce", "CE (no teacher)", "ce", "systematic"),
    _Way("topk", f"Top-K {TOP_K}", "sparse", "topk"),
    _Way("multinomial", "RS-KD", "sparse", "multinomial"),
    _Way("systematic", "systematic RS-KD", "sparse", "systematic"),
    _Way("full", "full KD (online)", "full", "systematic"),
)

COLUMNS = ("method", "loss", "perplexity", "KL", "entries", "bytes", "seconds")
CAPTION = "loss on held-out pages, KL(teacher || student) there, entries and bytes a token"


@dataclass(frozen=True)
class Row:
    """One line of the table in the terminal: its name and cells, as shown."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found.

    Args:
        rows: table cells by method, in order.
        heldout: measurements by method, the teacher's among them.
        conditions: settings and versions.
        report: path of the page.
    """

    rows: list[Row]
    heldout: dict[str, HeldOut]
    conditions: list[tuple[str, str]]
    report: Path

    def table(self) -> Table:
        """The table, for a terminal."""
        table = Table(*COLUMNS, box=SIMPLE, caption=CAPTION, caption_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(row.name, *row.cells)
        return table

    def remark(self) -> str:
        """What the table can and cannot show, in the light of its own numbers."""
        return _remark(self.heldout)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "heldout": {name: found.to_json() for name, found in self.heldout.items()},
            "rows": [dict(zip(COLUMNS, (r.name, *r.cells), strict=True)) for r in self.rows],
            "conditions": dict(self.conditions),
            "report": str(self.report),
        }


def run_demo(out: Path) -> DemoResult:
    """Run the demo, or what is left of it.

    Args:
        out: directory of everything it makes.

    Raises:
        MissingDependencyError: naming every missing package that the demo needs.
    """
    require_demo()
    started = time.perf_counter()
    text = demo_text(out, CHARACTERS)
    dtype = demo_dtype()
    with _spoken("loading the teacher, SmolLM2-135M-Instruct (4-bit weights)"):
        folder = demo_model()
        tokenizer = load_tokenizer(str(folder))
        teacher = load_teacher(str(folder), tokenizer=tokenizer, dtype=dtype)
    packing = packing_for(
        tokenizer, window_length=WINDOW, separator_id=SEPARATOR_ID, holdout=HOLDOUT
    )
    source = open_source(str(text.path))
    corpus = pack(source, tokenizer, packing, out / "corpus", vocab_size=teacher.vocab_size)
    build_seconds, built = _build(teacher, corpus, tokenizer_fingerprint(tokenizer), out)
    for cache in sorted({way.cache for way in WAYS}):
        keep_tokenizer(tokenizer, out / "caches" / cache)  # students are saved with it
    results = {way.key: _train(way, teacher, out) for way in WAYS}
    students = {key: load_causal_lm(str(found.model_path)) for key, found in results.items()}
    heldout = _evaluate(students, teacher, corpus)
    conditions = _conditions(text, corpus, teacher, build_seconds, built)
    rows = [_teacher_row(heldout["teacher"])]
    rows += [_row(way, heldout[way.key], results[way.key], out) for way in WAYS]
    result = DemoResult(rows, heldout, conditions, out / "report.html")
    with _spoken("samples of text and the report"):
        samples = _samples(students, teacher, corpus, tokenizer)
        systematic = out / "caches" / "systematic"
        window = write_window(out, systematic, tokenizer, teacher, students["systematic"])
        told = [_told(way, results[way.key], out) for way in WAYS]
        parameters = sum(p.numel() for p in students["ce"].parameters())
        write_story(
            result.report,
            told,
            heldout,
            headline=_headline(told, heldout, corpus, parameters, build_seconds, built),
            caution=_remark(heldout),
            continuations=samples,
            window=window,
            next_steps=_next_steps(out),
            conditions=conditions,
        )
        write_whole(out / "results.json", json.dumps(result.to_json(), indent=2) + "\n")
    messages.print(f"demo finished in {time.perf_counter() - started:.0f} s")
    return result


@contextmanager
def _spoken(what: str) -> Iterator[None]:
    started = time.perf_counter()
    messages.print(f"{what} ...")
    yield
    messages.print(f"{what}: {time.perf_counter() - started:.0f} s")


def _build(
    teacher: TransformersTeacher, corpus: PackedCorpus, tokenizer_hash: str, out: Path
) -> tuple[float, BuildReport]:
    """One pass of the teacher, three caches."""
    requests = [
        CacheRequest(out / "caches" / "systematic", Systematic(), budget=BUDGET, seed=SEED),
        CacheRequest(out / "caches" / "multinomial", Multinomial(), budget=BUDGET, seed=SEED),
        CacheRequest(out / "caches" / "topk", TopK(TOP_K), seed=SEED),
    ]
    started = time.perf_counter()
    with stage("teacher's pass, three caches at once", "tokens", per_unit=WINDOW) as update:
        report = build_caches(
            teacher,
            corpus,
            requests,
            tokenizer_hash=tokenizer_hash,
            batch=4,
            windows_per_shard=32,
            progress=update,
        )
    return time.perf_counter() - started, report


def _train(way: _Way, teacher: TransformersTeacher, out: Path) -> RunResult:
    recipe = Recipe(
        cache=out / "caches" / way.cache,
        out=out / "runs" / way.key,
        method=way.method,
        teacher=NAME if way.method == "full" else None,
        student=STUDENT,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        bf16=demo_dtype() == "bfloat16",
        logging_steps=2,
        seed=SEED,
    )
    with stage(f"training with {way.name}", "steps") as update:

        def show(done: int, total: int, line: dict[str, float]) -> None:
            update(done, total, f"loss {line['loss']:.2f}" if "loss" in line else "")

        return run(recipe, teacher=teacher, device="cpu", progress=show)


def _evaluate(
    students: dict[str, Any], teacher: TransformersTeacher, corpus: PackedCorpus
) -> dict[str, HeldOut]:
    windows = TextDataset(corpus, limit=HELDOUT_WINDOWS)
    with stage("evaluating on held-out pages", "windows") as update:
        return evaluate(students, windows, teacher, progress=update)


def _row(way: _Way, found: HeldOut, trained: RunResult, out: Path) -> Row:
    entries, size = "-", "-"
    if way.method == "sparse":
        facts = Cache.open(out / "caches" / way.cache).statistics()
        entries, size = f"{facts.entries_per_position:.1f}", f"{facts.bytes_per_token:.1f}"
    elif way.method == "full":
        entries = "all"
    return Row(way.name, (*_figures(found), entries, size, f"{trained.seconds:.0f}"))


def _teacher_row(found: HeldOut) -> Row:
    return Row("(the teacher)", (*_figures(found), "-", "-", "-"))


def _figures(found: HeldOut) -> tuple[str, str, str]:
    kl = "-" if found.kl is None else f"{max(found.kl, 0.0):.3f}"
    return f"{found.loss:.3f}", f"{found.perplexity:.1f}", kl


def _remark(heldout: dict[str, HeldOut]) -> str:
    order = sorted((way for way in WAYS), key=lambda way: heldout[way.key].loss)
    gap = heldout["ce"].loss - heldout["full"].loss
    noise = _standard_error(heldout["ce"], heldout["full"])
    ranking = " < ".join(way.name for way in order)
    reach = (
        f"The gap between CE and full KD, {gap:.3f} nats, is {abs(gap) / noise:.1f} times the "
        "standard error of their difference over the held-out windows"
    )
    return (
        f"Held-out loss, best first: {ranking}. {reach}; differences much smaller than that say "
        "nothing. One seed and one pass over some twenty thousand tokens show that the whole way "
        "works and what each method costs; they cannot show the paper's effect on a converged "
        "student, which takes orders of magnitude more tokens: all students here are still far "
        "from their teacher."
    )


def _standard_error(a: HeldOut, b: HeldOut) -> float:
    gaps = torch.tensor(a.loss_by_window) - torch.tensor(b.loss_by_window)
    return float(gaps.std() / len(gaps) ** 0.5)


def _conditions(
    text: DemoText,
    corpus: PackedCorpus,
    teacher: TransformersTeacher,
    build_seconds: float,
    built: BuildReport,
) -> list[tuple[str, str]]:
    rounds = {Path(cache.root).name: cache.identity.sampler.get("rounds") for cache in built.caches}
    passed = (
        f"{built.windows_built * WINDOW:,} tokens in {build_seconds:.0f} s, pilot, sampling and "
        "writing of three caches included"
        if built.windows_built
        else "done in an earlier call"
    )
    return [
        ("text", text.description),
        ("training tokens", f"{corpus.windows * WINDOW:,} in windows of {WINDOW}, one pass"),
        ("held-out tokens", f"{min(HELDOUT_WINDOWS, corpus.holdout_windows) * WINDOW:,}"),
        (
            "teacher",
            f"SmolLM2-135M-Instruct, {teacher.identity['quantization']}, "
            f"{teacher.identity['dtype']}",
        ),
        ("teacher's pass", passed),
        (
            "student",
            f"Llama, width {STUDENT.hidden_size}, {STUDENT.layers} layers, same initial "
            "weights and same order for all",
        ),
        (
            "rounds",
            f"RS-KD {rounds.get('multinomial')}, systematic {rounds.get('systematic')}, "
            f"for a budget of {BUDGET:g} entries a token",
        ),
        ("bytes/token", "of the whole cache, the text's own tokens included"),
        ("seconds", "training alone; full KD runs the teacher in every step"),
        (
            "machine",
            f"{platform.machine()}, {torch.get_num_threads()} threads, "
            f"Python {platform.python_version()}, torch {torch.__version__}",
        ),
        ("seed", str(SEED)),
    ]


def _samples(
    students: dict[str, Any], teacher: TransformersTeacher, corpus: PackedCorpus, tokenizer: Any
) -> list[Continuation]:
    """Continue held-out documents with the teacher and two students."""
    names = {way.key: way.name for way in WAYS}
    models = {"the teacher": teacher.model} | {
        names[key]: students[key] for key in ("systematic", "ce")
    }
    return continuations(models, tokenizer, prompts_of(corpus), SEED)


def _told(way: _Way, trained: RunResult, out: Path) -> Told:
    entries, size = None, None
    if way.method == "sparse":
        facts = Cache.open(out / "caches" / way.cache).statistics()
        entries, size = facts.entries_per_position, facts.bytes_per_token
    online = way.method == "full"
    curve = trained.label_curve or trained.curve
    return Told(way.key, way.name, entries, size, trained.seconds, curve, online)


def _headline(
    told: Sequence[Told],
    heldout: dict[str, HeldOut],
    corpus: PackedCorpus,
    parameters: int,
    build_seconds: float,
    built: BuildReport,
) -> str:
    """Say what was distilled, what it cost and what it shows."""
    by_key = {one.key: one for one in told}
    cached, online = by_key["systematic"], by_key["full"]
    passed = f" of {build_seconds:.0f} s" if built.windows_built else ""
    return (
        f"SmolLM2-135M-Instruct taught a student of {parameters / 1e6:.1f} M parameters from "
        f"{corpus.windows * WINDOW:,} tokens: one teacher pass{passed} left "
        f"{cached.bytes_per_token:.1f} bytes per token, training from them took "
        f"{cached.seconds:.0f} s where full KD took {online.seconds:.0f} s, and held-out loss "
        f"ended at {heldout['systematic'].loss:.3f} ({cached.name}), {heldout['full'].loss:.3f} "
        f"(full KD) and {heldout['ce'].loss:.3f} (no teacher)."
    )


def _next_steps(out: Path) -> list[tuple[str, str]]:
    systematic = shlex.quote(str(out / "caches" / "systematic"))
    student = shlex.quote(str(out / "runs" / "systematic"))
    mine = shlex.quote(str(out / "mine"))
    return [
        ("See what the cache holds:", f"sparselogits info {systematic}"),
        (
            "Train another student from it:",
            f"sparselogits train --cache {systematic} --student-config tiny --out {mine}",
        ),
        (
            "Look at another window, with the trained student:",
            f"sparselogits view {systematic} --window 3 --student {student}",
        ),
        (
            "Cache your own text:",
            "sparselogits cache --teacher demo --data TEXT --out my-cache --holdout 0.05",
        ),
    ]
