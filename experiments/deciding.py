"""Compare systematic with independent rounds by a plan written before the first run.

    python experiments/small_teacher.py --text FILES --out TEACHER --width 256 --layers 5 \\
        --heads 4 --precision bfloat16 --epochs 3 --batch 4 --learning-rate 2e-3 --threads 1
    python experiments/deciding.py run --teacher TEACHER --work FOLDER
    python experiments/deciding.py bytes --teacher TEACHER --work FOLDER
    python experiments/deciding.py collect --work FOLDER

FILES are Shakespeare's plays, inaugural addresses and State of the Union addresses (1.0 M tokens).
`run` trains the common ancestor, then one seed after another. If interrupted, it resumes from a
state at most 64 steps old; several processes may share one FOLDER, each takes seeds that no other
is running. `bytes` measures what a cache of each arm takes. `collect` writes
experiments/results/deciding.json with the verdict, and the per-window sums as
deciding_windows.npz.

**Plan, written before the first run.**

- Teacher: 5 M parameters, vocabulary 4 096, held-out loss 4.30 nats; run in bfloat16.
- Ancestor: a student of 482 040 parameters (width 72, 3 layers, 4 heads), trained by full KD on
  262 144 tokens, 256 steps of 1 024 tokens, learning rate 4e-3 with 5 % warm-up and linear decay,
  seed 0. All arms start from its weights.
- Arms: a fresh AdamW (weight decay 0.1, gradients clipped at norm 1), 512 steps of 1 024 tokens
  that the ancestor has not read, each read once; learning rate 2e-3, linear decay to zero, no
  warm-up, bfloat16 autocast.
- Seeds: 12. A seed sets the order of the windows, which all arms share, and the draws of every arm,
  which are independent of each other.
- CE; full KD; RS-KD with N = 14, 15, 22; an A/A control, RS-KD with N = 15 and other draws;
  systematic rounds with N = 14 and 28; Top-12; Top-12 and Top-50 with the ghost token.
- Measured: KL(teacher || student) in nats per token on 96 held-out windows.
- **Endpoint**: KL(systematic 14) - KL(RS-KD 15), the two of about equal bytes; 95 % paired t
  interval over seeds.
- **Refuted** if that interval lies inside +-0.003, or if Top-12 with the ghost token matches RS-KD:
  the lower limit of KL(Top-12 ghost) - KL(RS-KD 15) is not above zero. This is checked first.
- **Confirmed** if the upper limit of the endpoint is below -0.003, the interval of A/A - RS-KD 15
  contains zero, and the mean of KL(systematic 14) - KL(RS-KD 22) lies within +-0.003.
- **Undecided** otherwise.
- Secondary: each of the five unbiased arms against each of the two with a ghost token, two-sided
  paired t tests, Holm's correction over the ten at 5 %.
- Changed before the first run: float32 in place of bfloat16 on a processor that has no bfloat16
  products (they are emulated there, nine times slower than float32). The result names the format.
- The result is reported whatever it is. No seed is added or left out after looking.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.planned import (
    PRECISION,
    autocast,
    bytes_per_token,
    collect,
    each_seed,
    less,
    optimizer_of,
    secondary,
)

from sparselogits import sparse_cross_entropy
from sparselogits.corpus import PackedCorpus
from sparselogits.data import TextDataset
from sparselogits.evaluate import Estimate, evaluate, t_interval
from sparselogits.files import write_whole
from sparselogits.locks import lock_file
from sparselogits.samplers import Multinomial, Sampler, Systematic, TopK
from sparselogits.samplers.uniforms import window_uniforms
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer

RESULTS = Path(__file__).parent / "results"
MARGIN = 0.003
SAVE_STEPS = 64


@dataclass(frozen=True)
class Arm:
    """Training method: the targets of a sampler, or full KD or CE without a sampler."""

    title: str
    sampler: Sampler | None = None
    missing_mass: str = "drop"


ARMS = (
    Arm("CE"),
    Arm("full KD"),
    Arm("RS-KD 14", Multinomial(14)),
    Arm("RS-KD 15", Multinomial(15)),
    Arm("RS-KD 15, A/A", Multinomial(15)),
    Arm("RS-KD 22", Multinomial(22)),
    Arm("systematic 14", Systematic(14)),
    Arm("systematic 28", Systematic(28)),
    Arm("Top-12", TopK(12)),
    Arm("Top-12, ghost", TopK(12), "ghost"),
    Arm("Top-50, ghost", TopK(50), "ghost"),
)
UNBIASED = ("RS-KD 14", "RS-KD 15", "RS-KD 22", "systematic 14", "systematic 28")
GHOSTS = ("Top-12, ghost", "Top-50, ghost")


@dataclass(frozen=True)
class Size:
    """Sizes of the experiment; the defaults are those of the plan."""

    seeds: int = 12
    windows: int = 4
    ancestor_steps: int = 256
    steps: int = 512
    heldout: int = 96
    width: int = 72
    layers: int = 3
    heads: int = 4


# -- training --------------------------------------------------------------------------------------


class Material:
    """Teacher and text, and the windows that the ancestor and the arms read."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.teacher = load_language_model(str(folder), dtype=PRECISION).eval()
        self.folder = folder
        self.corpus = PackedCorpus.open(folder / "corpus")
        self.text = TextDataset(self.corpus, holdout=False)
        self.heldout = TextDataset(self.corpus, limit=size.heldout)
        first, second = (size.windows * n for n in (size.ancestor_steps, size.steps))
        if len(self.text) < first + second:
            raise SystemExit(
                f"{folder / 'corpus'} has {len(self.text)} training windows; the experiment needs "
                f"{first + second}. Train the teacher on more text"
            )
        # the corpus is a sequence of files; shuffling spreads both parts over all files
        mixed = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(0)).tolist()
        self.first, self.second = mixed[:first], mixed[first : first + second]
        self._states: dict[int, Tensor] = {}

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids [B, L], labels [P] of positions that have one, and their mask [B, L]."""
        items = [self.text[index] for index in windows]
        labels = torch.stack([own["shift_labels"] for own in items])
        return torch.stack([own["input_ids"] for own in items]), labels[labels >= 0], labels >= 0

    @torch.no_grad()
    def logits(self, windows: Sequence[int], ids: Tensor, kept: Tensor) -> Tensor:
        """Return the teacher's logits at the P positions with a label, float32 [P, V].

        Every seed reads the same windows in another order, so the teacher's last hidden states,
        [L, D] per window, are computed once.
        """
        if not all(index in self._states for index in windows):
            states: Tensor = self.teacher.get_decoder()(ids).last_hidden_state
            self._states.update(zip(windows, states.unbind(), strict=True))
        hidden = torch.stack([self._states[index] for index in windows])[kept]
        found: Tensor = self.teacher.get_output_embeddings()(hidden)
        return found.float()


def loss_of(
    arm: Arm, student: Tensor, teacher: Tensor, labels: Tensor, uniforms: Tensor | None
) -> Tensor:
    """Compute an arm's loss from the student's and the teacher's logits, [P, V] each."""
    if arm.title == "CE":
        return F.cross_entropy(student, labels)
    if arm.sampler is None or uniforms is None:
        return F.cross_entropy(student, teacher.softmax(1))
    ids, weights = arm.sampler(teacher, uniforms).padded()
    return sparse_cross_entropy(student, ids, weights, missing_mass=arm.missing_mass)


def train(
    material: Material,
    students: Mapping[str, PreTrainedModel],
    order: Sequence[int],
    size: Size,
    draws: Callable[[int], int],
    rate: Callable[[int], float],
    checkpoint: Path,
) -> None:
    """Train the students of all arms in one loop, with one teacher pass per batch for all of them.

    Args:
        material: teacher and text.
        students: models by title of the arm.
        order: window numbers in reading order.
        size: sizes of the experiment.
        draws: function from the index of an arm to the seed of its draws.
        rate: function from a step to its learning rate.
        checkpoint: file to which the state is written every `SAVE_STEPS` steps.
    """
    arms = [arm for arm in ARMS if arm.title in students]
    optimizers = {title: optimizer_of(model, rate(0)) for title, model in students.items()}
    steps, first = len(order) // size.windows, 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        first = kept["step"]
        for title, model in students.items():
            model.load_state_dict(kept["models"][title])
            optimizers[title].load_state_dict(kept["optimizers"][title])
    for step in range(first, steps):
        windows = order[step * size.windows : (step + 1) * size.windows]
        ids, labels, kept_positions = material.batch(windows)
        teacher = material.logits(windows, ids, kept_positions)
        for arm in arms:
            uniforms = None
            if arm.sampler is not None:
                columns, seed = arm.sampler.uniforms_per_position, draws(ARMS.index(arm))
                every = [window_uniforms(seed, i, ids.shape[1], columns) for i in windows]
                uniforms = torch.stack(every)[kept_positions]
            model, optimizer = students[arm.title], optimizers[arm.title]
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            with autocast():
                # the head is applied to positions with a label only
                states = model.get_decoder()(ids).last_hidden_state[kept_positions]
                own = model.get_output_embeddings()(states)
            loss_of(arm, own.float(), teacher, labels, uniforms).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % SAVE_STEPS == 0:
            temporary = checkpoint.with_suffix(".tmp")
            state = {
                "step": step + 1,
                "models": {title: model.state_dict() for title, model in students.items()},
                "optimizers": {title: own.state_dict() for title, own in optimizers.items()},
            }
            torch.save(state, temporary)
            temporary.replace(checkpoint)
            print(f"{checkpoint.stem}: step {step + 1} of {steps}", flush=True)
    checkpoint.unlink(missing_ok=True)


def ancestor(material: Material, size: Size, work: Path) -> Path:
    """Train the student from which all arms branch, once; other processes wait for it."""
    folder = work / "ancestor"
    with lock_file(work / "ancestor.lock", wait=True):
        if (folder / "config.json").exists():
            return folder
        vocabulary = material.teacher.config.vocab_size
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=size.width,
                intermediate_size=size.width * 8 // 3 // 8 * 8,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                max_position_embeddings=material.corpus.packing.window_length,
                tie_word_embeddings=True,
            )
        )
        warm, steps = max(1, size.ancestor_steps // 20), size.ancestor_steps

        def rate(step: int) -> float:
            return 4e-3 * min((step + 1) / warm, (steps - step) / (steps - warm + 1))

        checkpoint = work / "ancestor.pt"
        train(material, {"full KD": model}, material.first, size, lambda _: 0, rate, checkpoint)
        model.save_pretrained(work / "ancestor.tmp")
        (work / "ancestor.tmp").replace(folder)
    return folder


def run_seed(material: Material, start: Path, seed: int, size: Size, work: Path) -> None:
    """Train and measure all arms of one seed, and write the results."""
    students: dict[str, PreTrainedModel] = {
        arm.title: load_language_model(str(start), dtype="float32").train() for arm in ARMS
    }
    order = torch.randperm(len(material.second), generator=torch.Generator().manual_seed(seed))
    train(
        material,
        students,
        [material.second[i] for i in order.tolist()],
        size,
        lambda arm: 1_000_000 + 1_000 * arm + seed,
        lambda step: 2e-3 * (1 - step / size.steps),
        work / f"seed-{seed}.pt",
    )
    engine = load_teacher(
        str(material.folder), tokenizer=load_tokenizer(str(material.folder)), dtype=PRECISION
    )
    found = evaluate(students, material.heldout, engine, resamples=1)
    facts = {
        "precision": PRECISION,
        "teacher_loss": found["teacher"].loss,
        "positions": list(found["teacher"].positions_by_window),
        "kl": {title: found[title].sums("kl")[:, 0].tolist() for title in students},
        "loss": {title: found[title].sums("loss")[:, 0].tolist() for title in students},
    }
    write_whole(work / f"seed-{seed}.json", json.dumps(facts) + "\n")
    print(f"seed {seed}:", {t: round(own.kl or 0, 4) for t, own in found.items()}, flush=True)


@torch.no_grad()
def measure_bytes(teacher: Path, work: Path, size: Size) -> None:
    """Write the bytes per token of each arm's targets, coded for held-out windows.

    Real weights are rounded, as caches store them by default; the arms train on exact weights.
    """
    material = Material(teacher, size)
    tokens = [item["input_ids"] for item in material.heldout]
    logits = [material.teacher(own[None]).logits[0].float() for own in tokens]
    found = {
        arm.title: bytes_per_token(arm.sampler, logits, tokens)
        for arm in ARMS
        if arm.sampler is not None
    }
    write_whole(work / "bytes.json", json.dumps(found) + "\n")


def run(teacher: Path, work: Path, size: Size) -> None:
    """Train the ancestor, then all seeds that no other process runs."""
    work.mkdir(parents=True, exist_ok=True)
    material = Material(teacher, size)
    start = ancestor(material, size, work)
    each_seed(work, size.seeds, lambda seed: run_seed(material, start, seed, size, work))


# -- verdict ---------------------------------------------------------------------------------------


def judge(kl: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Apply the plan's rule to the KL of every arm, one value per seed.

    Returns:
        `verdict` and `reason` in words, `endpoints` with their intervals, `secondary` with p-values
        before and after Holm's correction.
    """

    pairs = {
        "systematic 14 - RS-KD 15 (endpoint)": ("systematic 14", "RS-KD 15"),
        "A/A control - RS-KD 15": ("RS-KD 15, A/A", "RS-KD 15"),
        "systematic 14 - RS-KD 22": ("systematic 14", "RS-KD 22"),
        "Top-12 ghost - RS-KD 15": ("Top-12, ghost", "RS-KD 15"),
        "systematic 28 - full KD": ("systematic 28", "full KD"),
    }
    found = {name: t_interval(less(kl, *own)) for name, own in pairs.items()}
    endpoint, same, double, ghost, _ = found.values()
    verdict, reason = _verdict(endpoint, same, double, ghost)
    against = [(one, other) for one in UNBIASED for other in GHOSTS]
    return {
        "verdict": verdict,
        "reason": reason,
        "endpoints": {name: own.to_json() for name, own in found.items()},
        "secondary": secondary(kl, against),
    }


def _verdict(
    endpoint: Estimate, same: Estimate, double: Estimate, ghost: Estimate
) -> tuple[str, str]:
    """Return the verdict and its reason by the rule of the plan."""
    ends = (endpoint.low, endpoint.high, same.low, same.high, ghost.low)
    if any(end is None for end in ends):
        return "none", "An interval needs at least two seeds."
    low, high, same_low, same_high, ghost_low = (float(end or 0.0) for end in ends)
    if low > -MARGIN and high < MARGIN:
        return "refuted", "The difference is smaller than 0.003 nats in both directions."
    if ghost_low <= 0:
        return "refuted", "Top-12 with the ghost token is not distinguishably behind RS-KD 15."
    failed = []
    if high >= -MARGIN:
        failed.append("the upper limit of the endpoint is not below -0.003 nats")
    if not same_low <= 0 <= same_high:
        failed.append("the A/A control differs from RS-KD 15")
    if abs(double.mean) > MARGIN:
        failed.append("systematic 14 is not within 0.003 nats of RS-KD 22")
    if failed:
        return "undecided", f"Neither rule applies: {'; '.join(failed)}."
    return (
        "confirmed",
        "Systematic 14 is ahead of RS-KD 15 by more than 0.003 nats and level with RS-KD 22.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("run", "bytes", "collect"))
    parser.add_argument("--teacher", type=Path, help="folder that small_teacher.py wrote")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "deciding.json")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = parser.parse_args()
    size = Size(**{name: getattr(given, name) for name in vars(Size())})
    if given.what == "collect":
        if size != Size() and given.out == RESULTS / "deciding.json":
            raise SystemExit("other sizes than the plan's are a rehearsal; give --out another file")
        titles = [arm.title for arm in ARMS]
        file = given.work / "bytes.json"
        stored = {"bytes_per_token": json.loads(file.read_text())} if file.exists() else {}
        found = collect(
            given.work, given.out, size, Size(), titles, lambda means: judge(means["kl"]) | stored
        )
        print(json.dumps(found, indent=1))
        return
    if given.teacher is None:
        raise SystemExit(f"`{given.what}` needs --teacher, the folder that small_teacher.py wrote")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    (run if given.what == "run" else measure_bytes)(given.teacher, given.work, size)


if __name__ == "__main__":
    main()
