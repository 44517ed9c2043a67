"""Measure what on-policy training with the reverse KL adds to healing from a cache.

    python experiments/healing/on_policy.py run     --grid FOLDER/layers24 --out FOLDER/on-policy
    python experiments/healing/on_policy.py collect --out FOLDER/on-policy

`run` starts from a finished setting of healing.py: its pruned student, and the student that its
seed 0 healed from systematic rounds of 12 entries per token. Each arm is trained for a given
processor time and measured; `collect` writes the finished results to
experiments/results/healing_on_policy.json. An interrupted arm starts again, finished arms are
kept, and several processes may work on one folder.

Arms, with T seconds of on-policy training (--seconds), H seconds of the healing that the grid did,
and P seconds of the teacher's pass over the cached windows:

    pruned                    nothing                                                  0
    on-policy                 from the pruned start, T                                 T
    healed                    the grid's student                                       P + H
    healed, then on-policy    the grid's student, then T                               P + H + T
    healed for longer         from the pruned start on the same cache, H + T           P + H + T
    full KD                   from the pruned start, teacher online, P + H + T         P + H + T
    on-policy for longer      from the pruned start, P + H + T                         P + H + T

All seconds are processor seconds of one process. The learning rate falls linearly to zero over an
arm's seconds, after three steps of warm-up. The trainer of on-policy training is that of
examples/on_policy.py: TRL's, KL(student || teacher) over the whole vocabulary, samples at
temperature 1. Its prompts are runs of 32 tokens of the training windows, completed with 32 tokens.

Measured on the grid's held-out windows: loss, KL(teacher || student), expected acceptance, ECE. On
the student's own text: every held-out window gives four prompts of 32 tokens, which the student
completes at temperature 1 by at most 32 tokens, up to the end of text. The reverse KL of a sequence
is KL(q || p) = E_y~q[log q(y|x) - log p(y|x)] for student q, teacher p, prompt x and completion y,
the quantity that MiniLLM (arXiv 2306.08543) minimises. It is estimated by the sum over y's tokens
of the KL between the two next-token distributions, which has the same expectation and less
variance than the difference of log-probabilities.

Decided before the first run:

- Primary endpoint: the reverse KL of a sequence, "healed, then on-policy" less "healed for longer",
  at equal total time; paired by window and bootstrapped over windows for one seed, Student's t over
  seeds for several. On-policy training adds something if the interval lies below zero.
- Value of the cache: "healed, then on-policy" less "on-policy for longer", likewise.
- Cost, reported in any case: held-out KL(teacher || student) and acceptance on given text.
- Learning rates of on-policy training: 5e-5, 1e-4, 2e-4, for each start by the reverse KL on
  the student's own text after a quarter of T, on prompts from eight training windows that no arm
  uses. "healed for longer" and full KD use the rates that the grid chose.
- Seeds set the order and the samples; the pruned and the healed start are the same for all.

Changed before three seeds were run: teacher and products are float32 in place of bfloat16 on a
processor without bfloat16 products. All arms of a result are run on one machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from on_policy import make_trainer
from planned import PRECISION, autocast
from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.corpus import PackedCorpus
from sparselogits.data import TextDataset
from sparselogits.evaluate import evaluate
from sparselogits.files import write_whole
from sparselogits.lab.compare import read_results
from sparselogits.lab.compare.provenance import provenance
from sparselogits.locks import Held, lock_file
from sparselogits.teacher import TransformersTeacher, load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer

RESULT = Path(__file__).parents[1] / "results" / "healing_on_policy.json"
RATES = (5e-5, 1e-4, 2e-4)
HEALED = "systematic 12"
PROMPT, COMPLETION, BATCH = 32, 32, 8
PROMPTS_PER_WINDOW = 4
WINDOWS_PER_BATCH = 4
"""Number of windows whose prompts are completed in one batch."""
TUNING_WINDOWS = 8
EVALUATION_SEED = 1234


@dataclass(frozen=True)
class Arm:
    """Arm of the experiment: an initial student and its further training.

    Args:
        start: initial student, "pruned" or "healed".
        method: "on-policy", "sparse" or "full"; None for no further training.
        seconds: processor seconds of further training, as a sum of T, H and P.
        before: processor seconds spent on the initial student, as a sum of T, H and P.
    """

    start: str
    method: str | None
    seconds: str
    before: str


ARMS = {
    "pruned": Arm("pruned", None, "", ""),
    "healed": Arm("healed", None, "", "PH"),
    "on-policy": Arm("pruned", "on-policy", "T", ""),
    "healed, then on-policy": Arm("healed", "on-policy", "T", "PH"),
    "healed for longer": Arm("pruned", "sparse", "HT", "P"),
    "full KD": Arm("pruned", "full", "PHT", ""),
    "on-policy for longer": Arm("pruned", "on-policy", "PHT", ""),
}

AT_EQUAL_TIME = (
    "healed, then on-policy",
    "healed for longer",
    "full KD",
    "on-policy for longer",
)


@dataclass(frozen=True)
class Grid:
    """Parts of a finished setting of the grid that this experiment uses.

    Args:
        starts: folders of the pruned and of the healed student.
        cache: folder of the cache that the healed student was trained from.
        corpus: packed windows.
        rates: learning rates that the grid chose, by method.
        window_batch: windows per step of the grid's training.
        heldout_windows: number of held-out windows of the grid.
        teacher: name of the teacher and dtype of its weights.
        healing_seconds: processor seconds of the healed student's training.
    """

    starts: dict[str, Path]
    cache: Path
    corpus: PackedCorpus
    rates: dict[str, float]
    window_batch: int
    heldout_windows: int
    teacher: tuple[str, str]
    healing_seconds: float

    @classmethod
    def read(cls, folder: Path) -> Grid:
        """Read results.json and the folders next to it."""
        results = read_results(folder)
        recipe = results.settings["recipe"]
        row = next(row for row in results.methods if row.method == HEALED)
        full = next(row for row in results.methods if row.family == "full")
        (run,) = (r for r in results.runs if r.method == HEALED and r.seed == row.seeds_done[0])
        healed = folder / str(run.folder)
        (pruned,) = (file.parent for file in (folder / "students").glob("*/config.json"))
        assert run.tokens is not None
        assert run.steps is not None
        # a resumed run has no time; all methods that read a cache train at the same speed
        speeds = [r.tokens_per_cpu_second for r in (row, *results.methods) if r.sampler]
        speed = next(one for one in speeds if one)
        cache = Path(json.loads((healed / "recipe.json").read_text())["cache"])
        return cls(
            {"pruned": pruned, "healed": healed / "model"},
            folder / "caches" / cache.name,
            PackedCorpus.open(folder / "corpus"),
            {"sparse": row.spec["learning_rate"], "full": full.spec["learning_rate"]},
            run.tokens // (run.steps * recipe["window"]),
            recipe["heldout_windows"],
            (recipe["teacher"], recipe["teacher_dtype"]),
            run.tokens / speed,
        )


def prompts_of(read: Callable[[int, int], list[Any]], windows: range) -> list[list[Tensor]]:
    """Return equally spaced prompts of each window, int64 [PROMPT] each."""
    found = []
    for window in read(windows.start, windows.stop):
        tokens = torch.from_numpy(window.tokens).long()
        step = len(tokens) // PROMPTS_PER_WINDOW
        found.append([tokens[k * step :][:PROMPT] for k in range(PROMPTS_PER_WINDOW)])
    return found


class Clock(TrainerCallback):  # type: ignore[misc]
    """Callback that stops training after a processor time and decays the learning rate to zero."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started: float | None = None
        self.spent = 0.0

    def scale(self, step: int) -> float:
        """Return the factor of the learning rate at a step."""
        if self.started is not None:
            self.spent = time.process_time() - self.started
        return max(0.0, 1 - self.spent / self.seconds) * min(1.0, (step + 1) / 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the clock."""
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop training if the time is over."""
        assert self.started is not None
        self.spent = time.process_time() - self.started
        control.should_training_stop = self.spent >= self.seconds


@dataclass
class Bench:
    """Models, text and folders that all arms share."""

    grid: Grid
    out: Path
    teacher: TransformersTeacher
    tokenizer: Any

    def train(
        self, start: str, method: str, seconds: float, rate: float, seed: int
    ) -> tuple[nn.Module, dict[str, float]]:
        """Train a student for a processor time.

        Returns:
            The student, and its learning rate, steps, tokens and seconds of training.
        """
        torch.manual_seed(seed)
        student = load_language_model(str(self.grid.starts[start]), dtype="float32")
        student.requires_grad_(True)
        clock = Clock(seconds)
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        common: dict[str, Any] = {
            "max_steps": 100_000,
            "use_cpu": True,
            "seed": seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
        }
        if method == "on-policy":
            windows = range(self.grid.corpus.windows - TUNING_WINDOWS)
            prompts = [p for own in prompts_of(self.grid.corpus.read, windows) for p in own]
            trainer = make_trainer(
                student,
                self.teacher.model,
                self.tokenizer,
                Dataset.from_list([{"prompt": self.tokenizer.decode(p)} for p in prompts]),
                self.out / "trainer",
                per_device_train_batch_size=BATCH,
                max_completion_length=COMPLETION,
                bf16=False,
                **common,
            )
            # only for the loss: generation is faster in float32 than with a cast per token
            trainer.compute_loss_context_manager = autocast
        else:
            trainer = SparseKDTrainer(
                student,
                TrainingArguments(
                    str(self.out / "trainer"),
                    per_device_train_batch_size=self.grid.window_batch,
                    bf16=PRECISION == "bfloat16",
                    **common,
                ),
                train_dataset=CacheDataset(self.grid.cache, seed=seed),
                method=method,
                teacher=self.teacher if method == "full" else None,
            )
        trainer.optimizer = optimizer
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.scale)
        trainer.add_callback(clock)
        trainer.train()
        for model in (student, self.teacher.model):
            vars(model).pop("forward", None)  # set by accelerate
        steps = trainer.state.global_step
        read = steps * self.grid.window_batch * self.grid.corpus.packing.window_length
        if method == "on-policy":
            lengths = [line.get("completions/mean_length", 0) for line in trainer.state.log_history]
            read = round(sum(lengths) * BATCH)
        return student.eval(), {
            "learning_rate": rate,
            "steps": steps,
            "tokens": read,
            "trained_seconds": clock.spent,
        }

    @torch.no_grad()
    def own_text(
        self, student: nn.Module, prompts: Sequence[Sequence[Tensor]]
    ) -> dict[str, list[float]]:
        """Measure a student on the completions that it generates for prompts.

        Returns:
            Sums per window: reverse KL in nats, expected acceptance, student's entropy, tokens.
        """
        torch.manual_seed(EVALUATION_SEED)
        ends = torch.tensor(
            [student.generation_config.eos_token_id or self.tokenizer.eos_token_id]
        ).flatten()
        found: dict[str, list[float]] = {
            name: [] for name in ("reverse_kl", "acceptance", "entropy", "tokens")
        }
        for first in range(0, len(prompts), WINDOWS_PER_BATCH):
            some = prompts[first : first + WINDOWS_PER_BATCH]
            given = torch.stack([prompt for own in some for prompt in own])
            everything = student.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=COMPLETION,
                eos_token_id=ends.tolist(),
                pad_token_id=self.tokenizer.eos_token_id,
            )
            for ids in everything.split(PROMPTS_PER_WINDOW):
                at_end = torch.isin(ids[:, PROMPT:], ends)
                counted = at_end.cumsum(1) - at_end.long() == 0  # up to the first end, included
                log_s, log_p = (
                    model(ids).logits[:, PROMPT - 1 : -1][counted].float().log_softmax(-1)
                    for model in (student, self.teacher.model)
                )
                s = log_s.exp()
                metrics = {
                    "reverse_kl": s * (log_s - log_p),
                    "acceptance": torch.minimum(s, log_p.exp()),
                    "entropy": -s * log_s,
                }
                for name, terms in metrics.items():
                    found[name].append(float(terms.sum(-1).double().sum()))
                found["tokens"].append(float(counted.sum()))
        return found

    def teacher_seconds(self) -> float:
        """Estimate the processor seconds of a teacher pass over all training windows from eight."""
        windows = self.grid.corpus.read(0, min(8, self.grid.corpus.windows))
        tokens = torch.stack([torch.from_numpy(window.tokens).long() for window in windows])
        started = time.process_time()
        for part in tokens.split(4):
            for _ in self.teacher.logits(part):
                pass
        spent = time.process_time() - started
        return spent / len(windows) * self.grid.corpus.windows


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Read a JSON file, or create it by `make`; return None if another process is creating it."""
    with lock_file(file.with_suffix(".lock")) as lock:
        if not file.exists():
            if lock.held is Held.TAKEN:
                return None
            write_whole(file, json.dumps(make(), indent=1) + "\n")
    return json.loads(file.read_text())


def tuned(bench: Bench, start: str, rate: float, seconds: float) -> dict[str, Any]:
    """Measure a learning rate of on-policy training on the prompts reserved for tuning."""
    corpus = bench.grid.corpus
    student, facts = bench.train(start, "on-policy", seconds, rate, seed=100)
    windows = range(corpus.windows - TUNING_WINDOWS, corpus.windows)
    own = bench.own_text(student, prompts_of(corpus.read, windows))
    return {"start": start, **facts, "reverse_kl": sum(own["reverse_kl"]) / sum(own["tokens"])}


def measured(bench: Bench, name: str, seed: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Train the student of an arm and measure it."""
    arm, corpus = ARMS[name], bench.grid.corpus
    facts: dict[str, float] = {"trained_seconds": 0.0}
    if arm.method is None:
        student = load_language_model(str(bench.grid.starts[arm.start]), dtype="float32").eval()
    else:
        rate = bench.grid.rates.get(arm.method) or best_rate(bench.out, arm.start)
        budget = sum(seconds[part] for part in arm.seconds)
        student, facts = bench.train(arm.start, arm.method, budget, rate, seed)
    heldout = TextDataset(corpus, limit=bench.grid.heldout_windows)
    found = evaluate({"student": student}, heldout, bench.teacher, resamples=1)["student"]
    own = bench.own_text(student, prompts_of(corpus.read_holdout, range(len(heldout))))
    total, prompts = sum(own["tokens"]), len(heldout) * PROMPTS_PER_WINDOW
    return {
        "arm": name,
        "seed": seed,
        **facts,
        "total_seconds": facts["trained_seconds"] + sum(seconds[part] for part in arm.before),
        "loss": found.loss,
        "kl": found.kl,
        "acceptance": found.acceptance,
        "ece": found.calibration.equal_width.ece,
        "kl_by_window": list(found.kl_by_window),
        "reverse_kl": sum(own["reverse_kl"]) / total,
        "reverse_kl_of_a_sequence": sum(own["reverse_kl"]) / prompts,
        "own_acceptance": sum(own["acceptance"]) / total,
        "own_entropy": sum(own["entropy"]) / total,
        "prompts_per_window": PROMPTS_PER_WINDOW,
        "own_text": own,
    }


def best_rate(out: Path, start: str) -> float:
    """Return the learning rate with the lowest reverse KL for an initial student."""
    found = [json.loads(file.read_text()) for file in out.glob(f"tuning--{start}--*.json")]
    return float(min(found, key=lambda one: one["reverse_kl"])["learning_rate"])


def run(folder: Path, out: Path, seeds: Sequence[int], seconds: float) -> None:
    """Tune the learning rates, then train and measure every arm that is not finished."""
    grid = Grid.read(folder)
    name, dtype = grid.teacher
    tokenizer = load_tokenizer(name)
    teacher = load_teacher(name, tokenizer=tokenizer, dtype=dtype)
    bench = Bench(grid, out, teacher, tokenizer)
    with lock_file(out / ".teacher", wait=True):
        times = kept(out / "pass.json", lambda: {"P": bench.teacher_seconds()})
    assert times is not None
    times = {"T": seconds, "H": grid.healing_seconds, **times}
    settings = {
        "seconds": times,
        "teacher": teacher.identity,
        "windows": {"training": grid.corpus.windows, "heldout": grid.heldout_windows},
        "prompt": PROMPT,
        "completion": COMPLETION,
        "batch": BATCH,
        "precision": PRECISION,
        "provenance": provenance(),
    }
    kept(out / "settings.json", lambda: settings)
    missing = False
    for start in grid.starts:
        for rate in RATES:
            file = out / f"tuning--{start}--{rate:g}.json"
            found = kept(file, functools.partial(tuned, bench, start, rate, seconds / 4))
            missing |= found is None
            print(f"{start}, rate {rate:g}: {found and found['reverse_kl']}", flush=True)
    if missing:
        raise SystemExit(
            "another process is still tuning learning rates; run this again when it has finished"
        )
    for seed in seeds:
        for name, arm in ARMS.items():
            if arm.method is None and seed != seeds[0]:
                continue  # the same student for every seed
            file = out / f"arm--{name.replace(' ', '-').replace(',', '')}--{seed}.json"
            found = kept(file, functools.partial(measured, bench, name, seed, times))
            if found is not None:
                said = {k: v for k, v in found.items() if isinstance(v, float)}
                print(name, seed, {k: round(v, 4) for k, v in said.items()}, flush=True)


def collect(out: Path, result: Path) -> None:
    """Write the finished arms and the tuning to one file."""
    arms = [json.loads(file.read_text()) for file in sorted(out.glob("arm--*.json"))]
    arms.sort(key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
    tuning = [json.loads(file.read_text()) for file in sorted(out.glob("tuning--*.json"))]
    stored = {"settings": json.loads((out / "settings.json").read_text())}
    write_whole(result, json.dumps(stored | {"tuning": tuning, "arms": arms}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "collect"))
    parser.add_argument("--grid", type=Path, help="folder of a finished setting of healing.py")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="T, processor seconds of one core"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULT, help="file of `collect`")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "collect":
        collect(arguments.out, arguments.result)
    else:
        run(arguments.grid, arguments.out, arguments.seeds, arguments.seconds)


if __name__ == "__main__":
    main()
