"""Two DDP ranks step exactly like one process with both batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, torch
from transformers import TrainingArguments
from sparselogits import CacheDataset, SparseKDTrainer
from tests.conftest import tiny_llama

cache, out, per_device = sys.argv[1:4]
model = tiny_llama(seed=9)
args = TrainingArguments(
    out, max_steps=4, per_device_train_batch_size=int(per_device), learning_rate=1e-2, seed=3,
    optim="sgd", lr_scheduler_type="constant", report_to="none", use_cpu=True,
    save_strategy="no", disable_tqdm=True, logging_steps=1,
)
trainer = SparseKDTrainer(model, args, train_dataset=CacheDataset(cache), alpha=0.2)
trainer.train()
if trainer.is_world_process_zero():
    torch.save(model.state_dict(), out + "/weights.pt")
"""


@pytest.mark.slow
def test_two_ranks_are_one_process(cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    weights = []
    for ranks, per_device in ((1, 4), (2, 2)):
        out = tmp_path / f"ranks-{ranks}"
        out.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run(
            [sys.executable, *launch, str(script), str(cache), str(out), str(per_device)],
            check=True,
            env=environment,
            timeout=300,
        )
        weights.append(torch.load(out / "weights.pt", weights_only=True))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-4, atol=1e-6, msg=name)
