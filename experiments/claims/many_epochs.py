"""Compare fresh with frozen draws where every token is read twelve times.

    python experiments/small_teacher.py --text FILES --out TEACHER --width 256 --layers 5 \\
        --heads 4 --precision bfloat16 --epochs 3 --batch 4 --learning-rate 2e-3 --threads 1
    python experiments/compare/documents.py --data TEACHER/documents.jsonl --out PART.jsonl \\
        --characters 650000
    python experiments/claims/many_epochs.py run --teacher TEACHER --text PART.jsonl --work FOLDER
    python experiments/claims/many_epochs.py collect --work FOLDER

TEACHER is that of experiments/deciding.py, and FILES are its text. If interrupted, the same command
resumes; several processes may share one FOLDER. `collect` writes
experiments/results/many_epochs.json with the verdict, and the per-window sums as
many_epochs_windows.npz. Estimate: see experiments/README.md.

**The setting** is that of the "slowrun" contest (qlabs-eng/slowrun): little text, many epochs. Its
form here would be 5 M tokens and 12 epochs. Scaled down to two cores: the 12 epochs are kept, the
text is divided by 38 (131 072 tokens), and the student has 482 040 parameters: 0.27 tokens of text
and 3.3 tokens of training per parameter. Omitted: a mixture of the caches of two
teachers, which the library did not support when the plan was written.

**Plan, written before the first run.**

- Teacher: 5 M parameters, vocabulary 4 096, held-out loss 4.30 nats, run in bfloat16.
- Student: width 72, 3 layers, 4 heads, random weights; 12 epochs of 128 steps of 1 024 tokens;
  learning rate 4e-3, 5 % warm-up, linear decay, bfloat16 autocast, one thread.
- Seeds: 6. A seed sets initial weights and the order of each epoch, which all arms share, and the
  draws of its cache.
- One cache of 48 systematic rounds per token serves all sampled arms. Thinned to 4 rounds, a
  position has 12 disjoint choices, so 12 epochs with fresh choices read each cached round once.
- Arms: CE; full KD (the teacher's logits, stored once as float16); 4 of 48 rounds, fresh in each
  epoch; 4 of 48 rounds, frozen; an A/A control, frozen at another choice; 12 of 48 rounds, fresh
  and frozen; all 48 rounds in every epoch.
- Measured after the last epoch on 96 held-out windows: KL(teacher || student) and loss, nats per
  token. 95 % paired t intervals over seeds; margin 0.003 nats.
- **Endpoint**: KL(4 rounds, fresh) minus KL(4 rounds, frozen): equal noise per step, and the
  bytes of 48 rounds against those of 4.
- **Confirmed: fresh draws help over twelve epochs**, if the upper limit of the endpoint is below
  -0.003 and the interval of the A/A control minus frozen contains zero.
- **Refuted**, if the lower limit of the endpoint is above -0.003.
- **Undecided** otherwise.
- Secondary, two-sided paired t tests on KL with Holm's correction at 5 %: 12 rounds, fresh minus
  frozen; 4 and 12 fresh minus all 48 (equal bytes in the cache); 4 fresh, 12 frozen and all 48
  minus full KD; 4 frozen minus CE.
- Changed before the first run: float32 in place of bfloat16 on a processor that has no bfloat16
  products (they are emulated there, nine times slower than float32). The result names the format.
- The result is reported whatever it is. No seed is added or left out after looking.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from experiments.claims.training import (  # noqa: E402
    Arm,
    Size,
    Work,
    command,
    train,
)
from experiments.planned import Means, each_seed, less, secondary  # noqa: E402

from sparselogits.evaluate import Estimate, t_interval  # noqa: E402
from sparselogits.locks import lock_file  # noqa: E402
from sparselogits.samplers import Systematic  # noqa: E402

RESULT = ROOT / "experiments" / "results" / "many_epochs.json"
MARGIN = 0.003
PLAN = Size(seeds=6, windows=4, steps=1536, epochs=12, heldout=96, width=72, layers=3, heads=4)
ROUNDS = 48
ARMS = (
    Arm("CE"),
    Arm("full KD", full=True),
    Arm("4 rounds, fresh", "systematic", rounds=4),
    Arm("4 rounds, frozen", "systematic", rounds=4, frozen=0),
    Arm("4 rounds, frozen, A/A", "systematic", rounds=4, frozen=1),
    Arm("12 rounds, fresh", "systematic", rounds=12),
    Arm("12 rounds, frozen", "systematic", rounds=12, frozen=0),
    Arm("48 rounds", "systematic"),
)
TITLES = tuple(arm.title for arm in ARMS)
SECONDARY = (
    ("12 rounds, fresh", "12 rounds, frozen"),
    ("4 rounds, fresh", "48 rounds"),
    ("12 rounds, fresh", "48 rounds"),
    ("4 rounds, fresh", "full KD"),
    ("12 rounds, frozen", "full KD"),
    ("48 rounds", "full KD"),
    ("4 rounds, frozen", "CE"),
)


def stored_logits(work: Work) -> np.ndarray:
    """Compute the teacher's logits of the training text once, float16 [windows, L, V], on disk."""
    file = work.folder / "logits.npy"
    with lock_file(work.folder / "logits.lock", wait=True):
        if not file.exists():
            temporary = file.with_suffix(".tmp")
            windows, length = work.size.text_windows, work.corpus.packing.window_length
            shape = (windows, length, work.model.config.vocab_size)
            out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            for index in range(windows):
                own = work.logits(work.text[index]["input_ids"][None])[0]
                out[index] = own.to(torch.float16).numpy()
            out.flush()
            temporary.replace(file)
    return np.load(file, mmap_mode="r")


def run(work: Work) -> None:
    """Train and measure all arms of every seed that no other process runs."""
    logits = stored_logits(work)

    def teacher(windows: Sequence[int], _: Tensor) -> Tensor:
        return torch.from_numpy(logits[list(windows)])

    def run_seed(seed: int) -> None:
        caches = work.caches(seed, {"systematic": Systematic(ROUNDS)})
        students = {
            arm.title: train(arm, work, caches.get(arm.cache), teacher, seed, work.size.steps)
            for arm in ARMS
        }
        found = caches["systematic"].cache.statistics()
        facts = {
            "training_tokens": found.tokens,
            "entries_per_token": found.entries / found.positions,
            "bytes_per_token": (found.bytes_on_disk - found.text_bytes) / found.positions,
        }
        work.finish(seed, students, facts)

    each_seed(work.folder, work.size.seeds, run_seed)


# -- verdict ---------------------------------------------------------------------------------------


def judge(means: Means) -> dict[str, Any]:
    """Apply the rule of the plan to the KL of every arm, one value per seed."""
    kl = means["kl"]
    endpoint = t_interval(less(kl, "4 rounds, fresh", "4 rounds, frozen"))
    same = t_interval(less(kl, "4 rounds, frozen, A/A", "4 rounds, frozen"))
    verdict, reason = _verdict(endpoint, same)
    return {
        "verdict": verdict,
        "reason": reason,
        "endpoints": {
            "4 rounds, fresh - frozen (endpoint)": endpoint.to_json(),
            "A/A control - frozen": same.to_json(),
        },
        "secondary": secondary(kl, SECONDARY),
    }


def _verdict(endpoint: Estimate, same: Estimate) -> tuple[str, str]:
    """Return the verdict and its reason by the rule of the plan."""
    ends = (endpoint.low, endpoint.high, same.low, same.high)
    if any(end is None for end in ends):
        return "none", "An interval needs at least two seeds."
    low, high, same_low, same_high = (float(end or 0.0) for end in ends)
    if low > -MARGIN:
        return "refuted", "Fresh draws are not ahead of frozen ones by more than 0.003 nats."
    if high >= -MARGIN:
        return "undecided", "The interval of the endpoint contains -0.003 nats."
    if not same_low <= 0 <= same_high:
        return "undecided", "The A/A control differs from the frozen draws."
    return "confirmed", "Fresh draws are ahead of frozen ones by more than 0.003 nats."


if __name__ == "__main__":
    command(__doc__, PLAN, RESULT, TITLES, judge, run)
