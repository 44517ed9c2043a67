"""Train the arms of the experiments in this folder from text, from caches and from the teacher.

An experiment defines its `Size` and its `Arm`s. `Work` is the folder in which any number of
processes run it: the packed text, one folder per seed with the caches and the trained
students, and one result per seed. A process takes a seed that no other process is running, and
resumes an interrupted one from a state at most 64 steps old.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from experiments.planned import PRECISION, Judge, autocast, collect, optimizer_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparselogits import sparse_cross_entropy
from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import PackedCorpus, open_source, pack, tokenizer_fingerprint
from sparselogits.data import CacheDataset, TextDataset, collate
from sparselogits.data.order import WindowRequest
from sparselogits.evaluate import evaluate
from sparselogits.files import write_whole
from sparselogits.locks import lock_file
from sparselogits.samplers import Sampler
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_language_model, load_tokenizer

SAVE_STEPS = 64
PEAK_RATE = 4e-3


@dataclass(frozen=True)
class Arm:
    """Training method of an experiment.

    Args:
        title: name in tables.
        cache: name of the cache; empty to train without cached targets.
        missing_mass: rule for the missing mass of the cached targets.
        alpha: weight of the cross-entropy on labels in the loss.
        rounds: cached rounds to use per position; None for all.
        frozen: epoch whose choice of rounds all epochs use; None for fresh rounds in each epoch.
        full: whether to train on the teacher's full distribution.
    """

    title: str
    cache: str = ""
    missing_mass: str = "drop"
    alpha: float = 0.0
    rounds: int | None = None
    frozen: int | None = None
    full: bool = False

    @property
    def file(self) -> str:
        """Return the title as a file name."""
        return "".join(c if c.isalnum() else "-" for c in self.title)


@dataclass(frozen=True)
class Size:
    """Sizes of an experiment: seeds, windows per step, steps, epochs, held-out windows, student."""

    seeds: int
    windows: int
    steps: int
    epochs: int
    heldout: int
    width: int
    layers: int
    heads: int

    @property
    def text_windows(self) -> int:
        """Return the number of windows of training text."""
        return self.windows * self.steps // self.epochs


class Work:
    """Folder in which an experiment runs, with its teacher and text.

    Args:
        folder: path of the folder, created if it does not exist.
        teacher: folder that small_teacher.py wrote.
        data: JSON lines of documents, as documents.py writes them.
        size: sizes of the experiment.
    """

    def __init__(self, folder: Path, teacher: Path, data: Path, size: Size) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.teacher, self.size = folder, teacher, size
        self.tokenizer = load_tokenizer(str(teacher))
        packing = PackedCorpus.open(teacher / "corpus").packing
        with lock_file(folder / "corpus.lock", wait=True):
            self.corpus = pack(
                open_source(str(data)),
                self.tokenizer,
                packing,
                folder / "corpus",
                vocab_size=len(self.tokenizer),
            )
        self.text = TextDataset(self.corpus, holdout=False)
        self.heldout = TextDataset(self.corpus, limit=size.heldout)
        if len(self.text) < size.text_windows:
            raise SystemExit(
                f"{data} has {len(self.text)} training windows; the experiment needs "
                f"{size.text_windows}. Give documents.py more --characters"
            )
        self.model = load_language_model(str(teacher), dtype=PRECISION).eval()

    def engine(self) -> Any:
        """Load the teacher as an engine."""
        return load_teacher(str(self.teacher), tokenizer=self.tokenizer, dtype=PRECISION)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Compute the teacher's logits, [B, L, V]."""
        found: Tensor = self.model(ids).logits
        return found

    def caches(
        self,
        seed: int,
        samplers: Mapping[str, Sampler],
        engine: Any = None,
        *,
        draws: int | None = None,
    ) -> dict[str, CacheDataset]:
        """Build a seed's caches, or continue an interrupted build, and open them.

        Args:
            seed: the seed.
            samplers: samplers by the names of their caches.
            engine: the teacher; None for `engine()`.
            draws: seed of the draws; None for `seed`.
        """
        draws = seed if draws is None else draws
        roots = {name: self.folder / f"seed-{seed}" / "caches" / name for name in samplers}
        with lock_file(self.folder / f"caches-{seed}.lock", wait=True):
            build_caches(
                self.engine() if engine is None else engine,
                self.corpus,
                [CacheRequest(roots[name], own, seed=draws) for name, own in samplers.items()],
                tokenizer_hash=str(tokenizer_fingerprint(self.tokenizer)),
                batch=4,
                windows_per_shard=math.gcd(64, self.size.text_windows),
                only=(0, self.size.text_windows),
            )
        return {name: CacheDataset(root, seed=seed) for name, root in roots.items()}

    def student(self, seed: int) -> LlamaForCausalLM:
        """Return the student with random weights from which all arms of a seed start."""
        torch.manual_seed(seed)
        size = self.size
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.model.config.vocab_size,
                hidden_size=size.width,
                intermediate_size=size.width * 8 // 3 // 8 * 8,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                max_position_embeddings=self.corpus.packing.window_length,
                tie_word_embeddings=True,
            )
        )

    def order(self, seed: int) -> list[int]:
        """Return the window numbers in the order in which all arms of a seed read them."""
        generator = torch.Generator().manual_seed(seed)
        windows = self.size.text_windows
        passes = [torch.randperm(windows, generator=generator) for _ in range(self.size.epochs)]
        return torch.cat(passes).tolist()

    def finish(
        self, seed: int, students: Mapping[str, nn.Module], facts: Mapping[str, Any]
    ) -> None:
        """Measure the students of a seed on held-out text and write the results."""
        found = evaluate(students, self.heldout, self.engine(), resamples=1)
        result = {
            **facts,
            "precision": PRECISION,
            "teacher_loss": found["teacher"].loss,
            "positions": list(found["teacher"].positions_by_window),
            "loss": {title: found[title].sums("loss")[:, 0].tolist() for title in students},
            "kl": {title: found[title].sums("kl")[:, 0].tolist() for title in students},
        }
        write_whole(self.result(seed), json.dumps(result) + "\n")
        print(f"seed {seed}:", {t: round(own.loss, 4) for t, own in found.items()}, flush=True)

    def result(self, seed: int) -> Path:
        """Return the file of the results of a seed."""
        return self.folder / f"seed-{seed}.json"


Teacher = Callable[[Sequence[int], Tensor], Tensor]
"""Function from windows and their ids [B, L] to the teacher's logits [B, L, V]."""


def step_loss(
    arm: Arm,
    work: Work,
    cache: CacheDataset | None,
    teacher: Teacher,
    model: nn.Module,
    windows: Sequence[int],
    epoch: int,
) -> Tensor:
    """Read a batch and compute the loss of an arm on it."""
    if cache is None:
        batch = collate([work.text[i] for i in windows])
    else:
        chosen = epoch if arm.frozen is None else arm.frozen
        batch = collate([cache[WindowRequest(i, chosen, arm.rounds)] for i in windows])
    ids, kept = batch["input_ids"], batch["shift_labels"] >= 0
    labels = batch["shift_labels"][kept]
    with autocast():
        own = model(ids).logits[kept]
    own = own.float()
    if arm.full:
        return F.cross_entropy(own, teacher(windows, ids)[kept].float().softmax(1))
    if cache is None:
        return F.cross_entropy(own, labels)
    return sparse_cross_entropy(
        own,
        batch["target_ids"][kept],
        batch["target_weights"][kept],
        labels=labels if arm.alpha else None,
        missing_mass=arm.missing_mass,
        alpha=arm.alpha,
    )


def train(
    arm: Arm,
    work: Work,
    cache: CacheDataset | None,
    teacher: Teacher,
    seed: int,
    steps: int,
    name: str = "",
) -> nn.Module:
    """Train the student of an arm, or load it if it is already trained.

    AdamW (weight decay 0.1, gradients clipped at norm 1), learning rate 4e-3 with 5 % warm-up and
    linear decay over `steps`, bfloat16 autocast.

    Args:
        arm: training method.
        work: folder of the experiment.
        cache: cache of the arm; None to train without cached targets.
        teacher: function that returns the teacher's logits.
        seed: random seed of weights and order.
        steps: number of training steps; fewer than in the plan read only a part of the text.
        name: file name of the student; by default that of the arm.
    """
    folder = work.folder / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    done, checkpoint = (folder / f"{name or arm.file}{end}" for end in (".pt", ".state"))
    model = work.student(seed).train()
    if done.exists():
        model.load_state_dict(torch.load(done, weights_only=True))
        return model
    optimizer, order, first = optimizer_of(model, 0.0), work.order(seed), 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        first = kept["step"]
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
    warm, per_epoch = max(1, steps // 20), work.size.steps // work.size.epochs
    for step in range(first, steps):
        windows = order[step * work.size.windows : (step + 1) * work.size.windows]
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        update(arm, work, cache, teacher, model, optimizer, windows, step // per_epoch)
        if (step + 1) % SAVE_STEPS == 0:
            state = {"step": step + 1, "model": model.state_dict()}
            _save({**state, "optimizer": optimizer.state_dict()}, checkpoint)
            print(f"seed {seed}, {name or arm.title}: step {step + 1} of {steps}", flush=True)
    _save(model.state_dict(), done)
    checkpoint.unlink(missing_ok=True)
    return model


def update(
    arm: Arm,
    work: Work,
    cache: CacheDataset | None,
    teacher: Teacher,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Sequence[int],
    epoch: int = 0,
) -> None:
    """Run one optimiser step."""
    step_loss(arm, work, cache, teacher, model, windows, epoch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds_per_step(
    arms: Sequence[Arm],
    work: Work,
    caches: Mapping[str, CacheDataset],
    teacher: Teacher,
    *,
    blocks: int,
    steps: int,
) -> dict[str, float]:
    """Measure the processor seconds per step of every arm, as the median over interleaved blocks.

    One thread; the time includes reading and decoding the cache and running the teacher. Processor
    time is used because other processes on the machine do not affect it.
    """
    students = {arm.title: work.student(0).train() for arm in arms}
    optimizers = {title: optimizer_of(model, 1e-4) for title, model in students.items()}
    found: dict[str, list[float]] = {arm.title: [] for arm in arms}
    for _ in range(blocks + 1):  # the first block warms up
        for arm in arms:
            start = time.process_time()
            for step in range(steps):
                windows = range(step * work.size.windows, (step + 1) * work.size.windows)
                cache, own = caches.get(arm.cache), optimizers[arm.title]
                update(arm, work, cache, teacher, students[arm.title], own, windows)
            found[arm.title].append((time.process_time() - start) / steps)
    return {title: float(np.median(own[1:])) for title, own in found.items()}


def _save(state: Mapping[str, Any], file: Path) -> None:
    """Write a state to a file atomically."""
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


def command(
    doc: str | None,
    plan: Size,
    result: Path,
    titles: Sequence[str],
    judge: Judge,
    run: Callable[[Work], None],
) -> None:
    """Parse the command line of an experiment and run the experiment or collect its results."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("what", choices=("run", "collect"))
    parser.add_argument("--teacher", type=Path, help="folder that small_teacher.py wrote")
    parser.add_argument("--text", type=Path, help="JSON lines that documents.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--out", type=Path, default=result, help="result of `collect`")
    for name, value in asdict(plan).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"plan: {value}")
    given = parser.parse_args()
    size = Size(**{name: getattr(given, name) for name in asdict(plan)})
    if given.what == "collect":
        if size != plan and given.out == result:
            parser.error("other sizes than the plan's are a rehearsal; give --out another file")
        print(json.dumps(collect(given.work, given.out, size, plan, titles, judge), indent=1))
        return
    if given.teacher is None or given.text is None:
        parser.error("`run` needs --teacher and --text; see the docstring of this script")
    if size.steps % size.epochs:
        parser.error(f"{size.steps} steps are not a multiple of {size.epochs} epochs")
    torch.set_num_threads(1)
    run(Work(given.work, given.teacher, given.text, size))
