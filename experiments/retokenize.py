"""Compare students with a tokenizer of their own: cross-entropy and retokenized targets.

    python experiments/compare/documents.py --data FILES --out W/part.jsonl --characters 1400000
    python experiments/retokenize.py run --text W/part.jsonl --work W/retokenize
    python experiments/retokenize.py collect --work W/retokenize

FILES are those of experiments/README.md. If interrupted, the same command resumes; several
processes may share one FOLDER. `collect` writes experiments/results/own_tokenizer.json with the
verdict, and the per-window sums as own_tokenizer_windows.npz. It takes about one core-hour, most of
it the teacher's pass over 0.26 M tokens and the rewriting of the caches.

**Plan, written before the first run.**

- Teacher: SmolLM2-135M-Instruct (49 152 ids), bfloat16, windows of 256 tokens, one tenth of the
  text held out by document.
- Student: byte-level BPE of 4 096 ids, trained on the text; width 128, 3 layers, 4 heads, random
  weights; one pass over 256 steps of 4 windows in random order; learning rate 4e-3, 5 % warm-up,
  linear decay, bfloat16 autocast, one thread.
- Seeds: 4. A seed sets initial weights and order, which all arms share, and the draws.
- Caches: 14 systematic rounds (about 12 entries per token), 14 independent rounds (RS-KD), Top-12;
  each is retokenized by the same rule, with the text's token where no boundary is shared.
- Arms: CE; systematic; systematic with every token mapped by itself (followed 0); RS-KD; Top-12,
  missing mass dropped.
- Measured on 96 held-out windows: loss per byte of text; and, at the boundaries that both
  tokenizers share, KL from the teacher's whole distribution, mapped token by token, to the
  student, per byte. 95 % paired t intervals over seeds; margin 0.002 nats per byte.
- **Endpoint**: loss per byte of systematic minus that of CE.
- **Confirmed: a retokenized cache teaches more than the text**, if the upper limit is below -0.002.
- **Refuted**, if the lower limit is above -0.002.
- **Undecided** otherwise.
- Secondary, two-sided paired t tests with Holm's correction at 5 %, on loss per byte: systematic
  minus RS-KD, minus Top-12, and minus systematic by itself; Top-12 minus CE. KL per byte is
  reported without a test, because its reference maps every token by itself.
- Changed before the first run: float32 in place of bfloat16 on a processor that has no bfloat16
  products (they are emulated there, nine times slower than float32). The result names the format.
- The result is reported whatever it is. No seed is added or left out after looking.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from experiments.claims.training import Arm, Size, Work, train  # noqa: E402
from experiments.planned import PRECISION, Means, collect, each_seed, less, secondary  # noqa: E402

from sparselogits.caching import CacheRequest, build_caches, retokenize  # noqa: E402
from sparselogits.caching.pushforward import FOLLOWED  # noqa: E402
from sparselogits.caching.retokenized import conversion  # noqa: E402
from sparselogits.corpus import (  # noqa: E402
    PackedCorpus,
    open_source,
    pack,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.data import CacheDataset, TextDataset  # noqa: E402
from sparselogits.evaluate import t_interval  # noqa: E402
from sparselogits.files import write_whole  # noqa: E402
from sparselogits.locks import lock_file  # noqa: E402
from sparselogits.samplers import Multinomial, Sampler, Systematic, TopK  # noqa: E402
from sparselogits.store import Cache  # noqa: E402
from sparselogits.teacher import load_teacher  # noqa: E402
from sparselogits.teacher.loading import load_tokenizer  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "own_tokenizer.json"
MARGIN = 0.002
PLAN = Size(seeds=4, windows=4, steps=256, epochs=1, heldout=96, width=128, layers=3, heads=4)
VOCABULARY, WINDOW = 4096, 256
SAMPLERS: dict[str, Sampler] = {
    "systematic": Systematic(14),
    "independent": Multinomial(14),
    "lists": TopK(12),
}
DRAWN, ALONE = "systematic", "systematic, by itself"
ARMS = (
    Arm("CE"),
    Arm(DRAWN, "systematic"),
    Arm(ALONE, "alone"),
    Arm("RS-KD", "independent"),
    Arm("Top-12", "lists"),
)
TITLES = tuple(arm.title for arm in ARMS)
SECONDARY = ((DRAWN, "RS-KD"), (DRAWN, "Top-12"), (DRAWN, ALONE), ("Top-12", "CE"))


class Retokenized(Work):
    """The folder of the experiment: the teacher's text and caches, and those of the student.

    Args:
        folder: path of the folder.
        teacher: teacher's folder, or "demo".
        data: JSON lines of documents.
        size: sizes of the experiment.
        vocabulary: number of ids of the student's tokenizer.
        window: number of the teacher's tokens per window.
    """

    def __init__(
        self, folder: Path, teacher: str, data: Path, size: Size, vocabulary: int, window: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size, self.name = folder, size, teacher
        self.tokenizer = load_tokenizer(teacher)
        self.reader = load_teacher(teacher, tokenizer=self.tokenizer, dtype=PRECISION)
        first = folder / "teacher" / "systematic-0"
        with lock_file(folder / "work.lock", wait=True):
            self.corpus = pack(
                open_source(str(data)),
                self.tokenizer,
                packing_for(self.tokenizer, window_length=window, holdout=0.1),
                first / "corpus",
                vocab_size=self.reader.vocab_size,
            )
            self.own = self._students_tokenizer(folder / "tokenizer", vocabulary)
            self._build()
            self._rewrite("systematic", 0, FOLLOWED)
        if self.corpus.windows < size.text_windows:
            raise SystemExit(
                f"{data} has {self.corpus.windows} training windows; the experiment needs "
                f"{size.text_windows}. Give documents.py more --characters"
            )
        packed = PackedCorpus.open(folder / "student" / "systematic-0" / "corpus")
        self.length = packed.packing.window_length
        self.text = TextDataset(packed, holdout=False)
        self.heldout = TextDataset(packed, limit=size.heldout)

    def _students_tokenizer(self, folder: Path, vocabulary: int) -> Any:
        """Train the student's tokenizer on the training text, or load it."""
        if not (folder / "tokenizer.json").exists():
            windows = (self.corpus.read(i, i + 1)[0].tokens for i in range(self.corpus.windows))
            texts = (self.tokenizer.decode(own, skip_special_tokens=True) for own in windows)
            made = self.tokenizer.train_new_from_iterator(texts, vocabulary, show_progress=False)
            made.save_pretrained(folder)
        return load_tokenizer(str(folder))

    def _build(self) -> None:
        """Build the caches of all samplers and seeds by one pass of the teacher."""
        build_caches(
            self.reader,
            self.corpus,
            [
                CacheRequest(self.folder / "teacher" / f"{name}-{seed}", sampler, seed=seed)
                for name, sampler in SAMPLERS.items()
                for seed in range(self.size.seeds if sampler.is_random else 1)
            ],
            tokenizer_hash=tokenizer_fingerprint(self.tokenizer),
            batch=4,
            windows_per_shard=math.gcd(64, self.size.text_windows),
            only=(0, self.size.text_windows),
        )

    def _rewrite(self, name: str, seed: int, followed: int) -> Path:
        """Retokenize a cache, or continue, and return its folder."""
        source = self.folder / "teacher" / f"{name}-{seed}"
        out = self.folder / "student" / f"{name if followed else 'alone'}-{seed}"
        window = getattr(self, "length", None)
        retokenize(
            source,
            self.own,
            out,
            cache_tokenizer=self.tokenizer,
            followed=followed,
            window=window,
        )
        return out

    def datasets(self, seed: int) -> dict[str, CacheDataset]:
        """Return the retokenized caches of a seed by the names of the arms' caches."""
        made = {"alone": self._rewrite("systematic", seed, 0)}
        for name, sampler in SAMPLERS.items():
            made[name] = self._rewrite(name, seed if sampler.is_random else 0, FOLLOWED)
        return {name: CacheDataset(root, seed=seed) for name, root in made.items()}

    def student(self, seed: int) -> LlamaForCausalLM:
        """Return the student with random weights from which all arms of a seed start."""
        torch.manual_seed(seed)
        size = self.size
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.own),
                hidden_size=size.width,
                intermediate_size=size.width * 8 // 3 // 8 * 8,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                max_position_embeddings=self.length,
                tie_word_embeddings=True,
            )
        )

    @torch.no_grad()
    def measure(self, students: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the sums per held-out window of loss and KL, and the bytes of each window."""
        identity = Cache.open(self.folder / "teacher" / "systematic-0").identity
        convert, _ = conversion(identity, self.tokenizer, self.own, followed=0)
        images = torch.from_numpy(convert.images_of(np.arange(self.reader.vocab_size)))
        loss: dict[str, list[float]] = {title: [] for title in students}
        kl: dict[str, list[float]] = {title: [] for title in students}
        covered = []
        for i in range(len(self.heldout)):
            old, item = self.corpus.read_holdout(i, i + 1)[0], self.heldout[i]
            aligned = convert.align(old.tokens.tolist(), old.document_starts.tolist(), old.mask)
            covered.append(max(1, aligned.text_bytes - aligned.left_out))
            source = torch.from_numpy(aligned.source[: self.length])
            shared = ((source >= 0) & (item["shift_labels"][: len(source)] >= 0)).nonzero()[:, 0]
            p = self._teacher_probabilities(old.tokens)[source[shared]]
            label = item["shift_labels"][shared]
            target = torch.zeros(len(shared), len(self.own), dtype=torch.float64)
            known = images >= 0
            target.index_add_(1, images[known], p[:, known])
            target.scatter_add_(1, label[:, None], p[:, ~known].sum(1, keepdim=True))
            for title, model in students.items():
                logs = model.eval()(item["input_ids"][None]).logits[0].double().log_softmax(-1)
                labelled = item["shift_labels"] >= 0
                labels = item["shift_labels"][labelled]
                loss[title].append(-float(logs[labelled].gather(1, labels[:, None]).sum()))
                kl[title].append(float(torch.special.entr(target).neg().sum()))
                kl[title][-1] -= float((target * logs[shared]).sum())
        return {"positions": covered, "loss": loss, "kl": kl}

    def _teacher_probabilities(self, tokens: Any) -> Tensor:
        """Return the teacher's distributions at the positions of a window, float64 [L, V]."""
        rows = self.reader.logits(torch.from_numpy(tokens.astype(np.int64))[None], None)
        return torch.cat([part.logits.double().softmax(-1) for part in rows])


def run(work: Retokenized) -> None:
    """Train every arm with every seed that is not done."""

    def teacher(_: Sequence[int], ids: Tensor) -> Tensor:
        raise AssertionError("no arm runs the teacher")

    def run_seed(seed: int) -> None:
        datasets = work.datasets(seed)
        students = {
            arm.title: train(arm, work, datasets.get(arm.cache), teacher, seed, work.size.steps)
            for arm in ARMS
        }
        found = datasets["systematic"].cache.statistics()
        facts = {
            "tokens_of_the_student": found.tokens,
            "entries_per_position": found.entries_per_position,
            "window_length": work.length,
            "precision": PRECISION,
        }
        write_whole(work.result(seed), json.dumps({**facts, **work.measure(students)}) + "\n")

    each_seed(work.folder, work.size.seeds, run_seed)


def judge(means: Means) -> dict[str, Any]:
    """Apply the plan's rule to the loss per byte of every arm, one value per seed."""
    endpoint = t_interval(less(means["loss"], DRAWN, "CE"))
    verdict, reason = "undecided", "The interval of the endpoint contains -0.002 nats per byte."
    if endpoint.low is None or endpoint.high is None:
        verdict, reason = "none", "An interval needs at least two seeds."
    elif endpoint.low > -MARGIN:
        verdict, reason = "refuted", "The cache is not ahead of the text by 0.002 nats per byte."
    elif endpoint.high < -MARGIN:
        verdict, reason = "confirmed", "The cache is ahead of the text by 0.002 nats per byte."
    return {
        "verdict": verdict,
        "reason": reason,
        "endpoints": {f"{DRAWN} - CE": endpoint.to_json()},
        "secondary": secondary(means["loss"], SECONDARY),
    }


def main() -> None:
    """Parse the command line, and run or collect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("run", "collect"))
    parser.add_argument("--teacher", default="demo", help="the plan has demo, SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="JSON lines that documents.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the result")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="ids of the student")
    parser.add_argument("--window", type=int, default=WINDOW, help="teacher's tokens per window")
    for name, value in asdict(PLAN).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"the plan has {value}")
    given = parser.parse_args()
    size = Size(**{name: getattr(given, name) for name in asdict(PLAN)})
    if given.what == "collect":
        if size != PLAN and given.out == RESULT:
            parser.error("other sizes than the plan's are a rehearsal; give --out another file")
        print(json.dumps(collect(given.work, given.out, size, PLAN, TITLES, judge), indent=1))
        return
    if given.text is None:
        parser.error("`run` needs --text; see the docstring of this script")
    torch.set_num_threads(1)
    run(Retokenized(given.work, given.teacher, given.text, size, given.vocabulary, given.window))


if __name__ == "__main__":
    main()
