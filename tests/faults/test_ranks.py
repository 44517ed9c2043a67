"""Test training after one of four ranks is killed: two ranks resume like one undisturbed rank."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparselogits.data import CacheDataset, WindowOrder
from tests.conftest import tiny_llama

EPOCHS, SAVE_EVERY, SEED = 2, 25, 5
GLOBAL_BATCH = 4
DIES_AT = 95  # in the second epoch, which begins after 57 steps

OBSERVED = """
import os, runpy, sys
from pathlib import Path
from sparselogits.data import CacheDataset
reads = Path(sys.argv.pop(1)) / f"{os.environ['RANK']}-{os.getpid()}"
read = CacheDataset.__getitem__
def noted(self, request):
    with reads.open("a") as file:
        print(request.epoch, request.index, file=file)
    return read(self, request)
CacheDataset.__getitem__ = noted
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Script that runs the unchanged example and records the windows that each rank reads."""


@contextmanager
def training(
    out: Path, reads: Path, cache: Path, student: Path, ranks: int
) -> Iterator[subprocess.Popen[str]]:
    reads.mkdir(parents=True)
    script = reads.parent / "observed.py"
    script.write_text(OBSERVED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        *(sys.executable, *torchrun, str(script), str(reads), "examples/fsdp2.py"),
        *("--cache", str(cache), "--student", str(student), "--out", str(out)),
        *("--epochs", str(EPOCHS), "--global-batch", str(GLOBAL_BATCH), "--workers", "0"),
        *("--save-every", str(SAVE_EVERY), "--seed", str(SEED), "--lr", "1e-2", "--alpha", "0.3"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as job:
        try:
            yield job
        finally:
            job.kill()


def steps_of(job: subprocess.Popen[str]) -> Iterator[tuple[int, float]]:
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("{"):
            told = json.loads(line)
            yield told["step"], told["loss"]


def order_read(reads: Path, ranks: int) -> list[tuple[int, int]]:
    """(epoch, window) as all ranks together read them: rank r holds places r, r + ranks, ..."""
    files = sorted(reads.iterdir())
    assert len(files) == ranks
    per_rank = [[tuple(map(int, x.split())) for x in f.read_text().splitlines()] for f in files]
    return [(e, w) for places in zip(*per_rank, strict=False) for e, w in places]


@pytest.mark.slow
def test_a_killed_rank_and_a_restart_on_fewer(cache, tmp_path):
    student = tmp_path / "student"
    tiny_llama(seed=9).save_pretrained(student)
    dataset = CacheDataset(cache)
    order = WindowOrder(len(dataset), SEED)
    steps = len(dataset) // GLOBAL_BATCH  # of an epoch; what fills no step is left out
    places = [(e, order[e, p]) for e in range(EPOCHS) for p in range(steps * GLOBAL_BATCH)]
    total = EPOCHS * steps
    assert steps < DIES_AT - SAVE_EVERY, "the checkpoint is of the second epoch"

    whole, whole_reads = tmp_path / "whole", tmp_path / "whole-reads" / "reads"
    with training(whole, whole_reads, cache, student, ranks=1) as job:
        undisturbed = dict(steps_of(job))
        assert job.wait(60) == 0
    assert list(undisturbed) == list(range(1, total + 1))
    assert order_read(whole_reads, 1) == places

    out, before = tmp_path / "out", tmp_path / "before" / "reads"
    losses: dict[int, float] = {}
    with training(out, before, cache, student, ranks=4) as job:
        for step, loss in steps_of(job):
            losses[step] = loss
            if step == DIES_AT:
                victim = next(before.glob("1-*")).name.split("-")[1]
                os.kill(int(victim), signal.SIGKILL)
        assert job.wait(60) != 0
    last = max(int(p.name.split("-")[1]) for p in out.glob("step-*"))
    assert DIES_AT - SAVE_EVERY < last < total
    assert not (out / "model").exists()

    after = tmp_path / "after" / "reads"
    with training(out, after, cache, student, ranks=2) as job:
        resumed = dict(steps_of(job))
        assert job.wait(60) == 0
    assert list(resumed) == list(range(last + 1, total + 1))
    kept = order_read(before, 4)[: last * GLOBAL_BATCH]
    assert kept + order_read(after, 2) == places, (
        "every window of a step once an epoch, in one order"
    )

    curve = [losses[n] for n in range(1, last + 1)] + list(resumed.values())
    assert curve == pytest.approx(list(undisturbed.values()), rel=1e-5)
    assert max(curve[-20:]) < min(curve[:5]), "it learns, so lost weights would show"
    expected, found = (load_file(f / "model" / "model.safetensors") for f in (whole, out))
    # a fifth of one step: AdamW enlarges the rounding of tokens that hardly occur
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-3, msg=name)
