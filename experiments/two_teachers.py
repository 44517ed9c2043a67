"""Compare students of two teachers, of their mixture from caches, and of the mixture online.

    python experiments/two_teachers.py teachers --first SHAKESPEARE --second SPEECHES --work W
    python experiments/compare/documents.py --data W/first/documents.jsonl \\
        W/second/documents.jsonl --out W/part.jsonl --characters 3600000
    python experiments/two_teachers.py run --teachers W --text W/part.jsonl --work W/two-teachers
    python experiments/two_teachers.py collect --work W/two-teachers

SHAKESPEARE and SPEECHES are the text of experiments/deciding.py in two halves: the plays, and the
inaugural and State of the Union addresses. If interrupted, the same command resumes; several
processes may share one FOLDER. `collect` writes experiments/results/two_teachers.json with the
verdict, and the per-window sums as two_teachers_windows.npz. Estimate: experiments/README.md.

**Plan, written before the first run.**

- Teachers: two of the shape of experiments/deciding.py (width 256, 5 layers, 4 heads, vocabulary
  4 096), with one tokenizer, which is trained on both halves. Each is trained on one half, for as
  many passes as that experiment's teacher (3), and run in bfloat16.
- Student: width 72, 3 layers, 4 heads, random weights; one pass over 640 steps of 1 024 tokens of
  both halves in random order; learning rate 4e-3, 5 % warm-up, linear decay, bfloat16 autocast, one
  thread.
- Seeds: 6. A seed sets initial weights and order, which all arms share, and the draws of its
  caches; the two teachers' draws differ.
- Weights: 1/2 each. Caches: per teacher 14 systematic rounds (about 12 entries per token), and
  Top-12.
- Arms: CE; full KD on the mixture, both teachers online; the first teacher alone; the second alone;
  the mixture of all 28 rounds; the mixture of 14 rounds, 7 from each teacher (equal entries to one
  teacher); the teacher with the lower loss in each window ("best"); the mixture of the two Top-12
  lists, missing mass dropped.
- Measured on 96 held-out windows of both halves: loss and KL(mixture || student), nats per token.
  95 % paired t intervals over seeds; margin 0.003 nats.
- **Endpoint**: loss of the mixture of 14 rounds minus that of each teacher alone.
- **Confirmed: a mixture from caches teaches more than either teacher**, if the upper limits of both
  differences are below -0.003.
- **Refuted**, if the lower limit of one of them is above -0.003.
- **Undecided** otherwise.
- Secondary, two-sided paired t tests with Holm's correction at 5 %, on KL to the mixture: 28 and 14
  rounds minus full KD on the mixture; 14 rounds minus Top-12 lists; 28 minus 14 rounds; 14 rounds
  minus CE. Reported without a test: the loss of "best" and of every other arm.
- Changed before the first run: float32 in place of bfloat16 on a processor that has no bfloat16
  products (they are emulated there, nine times slower than float32). The result names the format.
- The result is reported whatever it is. No seed is added or left out after looking.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from experiments import small_teacher  # noqa: E402
from experiments.claims.training import Arm, Size, Work, train  # noqa: E402
from experiments.planned import PRECISION, Means, collect, each_seed, less, secondary  # noqa: E402

from sparselogits.data import CacheDataset  # noqa: E402
from sparselogits.evaluate import evaluate, t_interval  # noqa: E402
from sparselogits.samplers import Systematic, TopK  # noqa: E402
from sparselogits.teacher import MixtureTeacher, load_teacher  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "two_teachers.json"
MARGIN = 0.003
PLAN = Size(seeds=6, windows=4, steps=640, epochs=1, heldout=96, width=72, layers=3, heads=4)
ROUNDS, K = 14, 12
HALVES = ("first", "second")
MIXED = "mixture, 14 rounds"
ARMS = (
    Arm("CE"),
    Arm("full KD", full=True),
    Arm("first teacher", "first"),
    Arm("second teacher", "second"),
    Arm("mixture, 28 rounds", "mixture"),
    Arm(MIXED, "mixture", rounds=ROUNDS),
    Arm("best teacher per window", "best"),
    Arm("mixture of Top-12", "lists"),
)
TITLES = tuple(arm.title for arm in ARMS)
SECONDARY = (
    ("mixture, 28 rounds", "full KD"),
    (MIXED, "full KD"),
    (MIXED, "mixture of Top-12"),
    ("mixture, 28 rounds", MIXED),
    (MIXED, "CE"),
)


class TwoTeachers(Work):
    """The folder of the experiment, with both teachers."""

    def __init__(self, folder: Path, teachers: Path, data: Path, size: Size) -> None:
        super().__init__(folder, teachers / HALVES[0], data, size)
        self.engines = [
            load_teacher(str(teachers / half), tokenizer=self.tokenizer, dtype=PRECISION)
            for half in HALVES
        ]

    def engine(self) -> MixtureTeacher:
        """Return the mixture of the teachers, to which students are compared."""
        return MixtureTeacher(self.engines, [0.5, 0.5])

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Compute the logits of the mixture, [B, L, V]."""
        rows: list[list[Tensor]] = [[] for _ in ids]
        for part in self.engine().logits(ids):
            rows[part.row].append(part.logits)
        return torch.stack([torch.cat(row) for row in rows])

    def datasets(self, seed: int) -> dict[str, CacheDataset]:
        """Build both teachers' caches of a seed, and return the datasets of the arms."""
        samplers = {"drawn": Systematic(ROUNDS), "lists": TopK(K)}
        made = [
            self.caches(
                seed,
                {f"{half}-{name}": sampler for name, sampler in samplers.items()},
                engine,
                draws=2 * seed + place,
            )
            for place, (half, engine) in enumerate(zip(HALVES, self.engines, strict=True))
        ]
        drawn, lists = (
            [str(own[f"{half}-{name}"].cache.root) for own, half in zip(made, HALVES, strict=True)]
            for name in samplers
        )
        return {
            "first": made[0]["first-drawn"],
            "second": made[1]["second-drawn"],
            "mixture": CacheDataset(drawn, seed=seed),
            "best": CacheDataset(drawn, weights="best", seed=seed),
            "lists": CacheDataset(lists, seed=seed),
        }


def run(work: TwoTeachers) -> None:
    """Train every arm with every seed that is not done."""
    alone = {
        half: evaluate({}, work.heldout, engine, resamples=1)["teacher"].loss
        for half, engine in zip(HALVES, work.engines, strict=True)
    }

    def teacher(_: Sequence[int], ids: Tensor) -> Tensor:
        return work.logits(ids)

    def run_seed(seed: int) -> None:
        datasets = work.datasets(seed)
        students = {
            arm.title: train(arm, work, datasets.get(arm.cache), teacher, seed, work.size.steps)
            for arm in ARMS
        }
        found = datasets["first"].cache.statistics()
        facts = {
            "training_tokens": found.tokens,
            "entries_per_token": found.entries / found.positions,
            "loss_of_teachers": alone,
        }
        work.finish(seed, students, facts)

    each_seed(work.folder, work.size.seeds, run_seed)


# -- verdict ---------------------------------------------------------------------------------------


def judge(means: Means) -> dict[str, Any]:
    """Apply the plan's rule to the loss of every arm, one value per seed."""
    endpoints = {
        f"{MIXED} - {half} teacher": t_interval(less(means["loss"], MIXED, f"{half} teacher"))
        for half in HALVES
    }
    verdict, reason = "undecided", "An interval of the endpoint contains -0.003 nats."
    if any(own.low is None or own.high is None for own in endpoints.values()):
        verdict, reason = "none", "An interval needs at least two seeds."
    elif any((own.low or 0.0) > -MARGIN for own in endpoints.values()):
        verdict = "refuted"
        reason = "The mixture is not ahead of a teacher alone by more than 0.003 nats."
    elif all((own.high or 0.0) < -MARGIN for own in endpoints.values()):
        verdict = "confirmed"
        reason = "The mixture is ahead of each teacher alone by more than 0.003 nats."
    return {
        "verdict": verdict,
        "reason": reason,
        "endpoints": {name: own.to_json() for name, own in endpoints.items()},
        "secondary": secondary(means["kl"], SECONDARY),
    }


# -- teachers and commands -------------------------------------------------------------------------

SHAPE = (
    "--width 256 --layers 5 --heads 4 --precision bfloat16 --epochs 3 --batch 4 "
    "--learning-rate 2e-3 --threads 1"
)


def train_teachers(texts: Sequence[Sequence[Path]], work: Path, options: Sequence[str]) -> None:
    """Train both teachers with a tokenizer of all text; a finished one is not trained again."""
    shape = argparse.ArgumentParser()
    shape.add_argument("--vocabulary", type=int, default=4096)
    vocabulary = shape.parse_known_args(options)[0].vocabulary
    both = list(small_teacher.documents([file for files in texts for file in files]))
    tokenizer = small_teacher.byte_level_tokenizer(both, vocabulary)
    for half, files in zip(HALVES, texts, strict=True):
        folder = work / half
        if (folder / "training.json").exists():
            continue
        if not (folder / "tokenizer.json").exists():
            tokenizer.save_pretrained(folder)
        sys.argv = ["small_teacher", "--text", *map(str, files), "--out", str(folder), *options]
        small_teacher.main()


def main() -> None:
    """Parse the command line, and train the teachers, run or collect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    teachers = commands.add_parser("teachers", help="train both teachers")
    teachers.add_argument("--first", type=Path, nargs="+", required=True)
    teachers.add_argument("--second", type=Path, nargs="+", required=True)
    teachers.add_argument("--work", type=Path, required=True)
    for name in ("run", "collect"):
        own = commands.add_parser(name)
        own.add_argument("--work", type=Path, required=True, help="folder of the experiment")
        for field, value in asdict(PLAN).items():
            own.add_argument(f"--{field}", type=int, default=value, help=f"the plan has {value}")
        if name == "run":
            own.add_argument("--teachers", type=Path, required=True, help="folder with both")
            own.add_argument("--text", type=Path, required=True, help="of documents.py")
        else:
            own.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    given, options = parser.parse_known_args()
    if options and given.what != "teachers":
        parser.error(f"unknown options: {' '.join(options)}")
    if given.what == "teachers":
        train_teachers([given.first, given.second], given.work, [*SHAPE.split(), *options])
        return
    size = Size(**{name: getattr(given, name) for name in asdict(PLAN)})
    if given.what == "collect":
        if size != PLAN and given.out == RESULT:
            parser.error("other sizes than the plan's are a rehearsal; give --out another file")
        print(json.dumps(collect(given.work, given.out, size, PLAN, TITLES, judge), indent=1))
        return
    torch.set_num_threads(1)
    run(TwoTeachers(given.work, given.teachers, given.text, size))


if __name__ == "__main__":
    main()
