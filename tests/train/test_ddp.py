"""Test that two DDP ranks step like one process, and resume bit for bit, also on one rank."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sparselogits import CacheDataset
from sparselogits.data import WindowOrder, collate
from tests.conftest import run_python
from tests.train.test_masked import make_cache

SCRIPT = """
import json, sys, torch
from transformers import TrainingArguments
from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.data import Schedule, Stage
from sparselogits.train import leave_process_group
from tests.conftest import tiny_llama

cache, out, per_device, steps, resume = sys.argv[1:]
model = tiny_llama(seed=9)
args = TrainingArguments(
    out, max_steps=int(steps), per_device_train_batch_size=int(per_device), learning_rate=1e-2,
    seed=3, optim="sgd", lr_scheduler_type="constant", report_to="none", use_cpu=True,
    save_strategy="steps", save_steps=int(steps) - 2, disable_tqdm=True, logging_steps=1,
    max_grad_norm=0.0,  # clipping would hide a factor
)
trainer = SparseKDTrainer(
    model, args, train_dataset=CacheDataset(cache), alpha=0.2,
    rounds=Schedule((Stage(5, until=0.5), Stage(12))),
)
trainer.train(resume_from_checkpoint=resume or None)
if trainer.is_world_process_zero():
    torch.save(model.state_dict(), out + "/weights.pt")
    lines = [x for x in trainer.state.log_history if "kd" in x]
    with open(out + "/lines.json", "w") as file:
        json.dump(lines, file)
leave_process_group()
"""


def torchrun(ranks: int, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, on some ranks; it finds this repository's tests."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return run_python(*launcher, *words, check=True, env={"PYTHONPATH": path}, **options)


def train(
    cache: Path, out: Path, *, ranks: int, batch: int, steps: int, resume: Path | None = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    out.mkdir(exist_ok=True)
    script = out / "train.py"
    script.write_text(SCRIPT)
    torchrun(ranks, script, cache, out, batch, steps, resume or "")
    weights = torch.load(out / "weights.pt", weights_only=True)
    return weights, json.loads((out / "lines.json").read_text())


@pytest.mark.slow
def test_two_ranks_are_one_process(answers, tmp_path):
    """Labels are spread unevenly: a mean over ranks of their means would be another step."""
    cache = answers[1.0]
    dataset = CacheDataset(cache)
    order = WindowOrder(len(dataset), 3, dataset.identity.fingerprint)
    batches = [collate([dataset[order[0, at + i]] for i in (0, 1)]) for at in range(0, 16, 2)]
    counts = [int((batch["shift_labels"] != -100).sum()) for batch in batches]
    assert all(a != b for a, b in zip(counts[::2], counts[1::2], strict=True))
    one, line = train(cache, tmp_path / "one", ranks=1, batch=4, steps=4)
    two, same = train(cache, tmp_path / "two", ranks=2, batch=2, steps=4)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    for key in ("loss", "kd", "ce", "kl", "entries"):
        assert [x[key] for x in same] == pytest.approx([x[key] for x in line], rel=1e-4), key

    # what two ranks began goes on with one: the same windows a step, in the same order
    fewer, line_of_fewer = train(
        *(cache, tmp_path / "fewer"),
        ranks=1,
        batch=4,
        steps=4,
        resume=tmp_path / "two/checkpoint-2",
    )
    for name, weight in one.items():
        torch.testing.assert_close(fewer[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    for key in ("loss", "kd", "ce", "kl", "entries"):
        assert [x[key] for x in line_of_fewer] == pytest.approx([x[key] for x in line], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_resume_in_their_second_epoch(cache, tmp_path):
    """The order of that epoch, not of the first: 231 windows are four steps of 64 at most."""
    whole, _ = train(cache, tmp_path / "two", ranks=2, batch=32, steps=7)
    checkpoint = tmp_path / "two/checkpoint-5"
    assert 1 < json.loads((checkpoint / "trainer_state.json").read_text())["epoch"] < 2
    again, _ = train(cache, tmp_path / "two", ranks=2, batch=32, steps=7, resume=checkpoint)
    for name, weight in whole.items():
        assert torch.equal(again[name], weight), name


@pytest.mark.slow
def test_the_command_trains_on_the_ranks_of_torchrun(cache, tmp_path):
    """One student, one report, and the step of a batch from both ranks."""
    recipe = {
        "cache": str(cache),
        "out": str(tmp_path / "run"),
        "student": {"hidden_size": 32, "layers": 1, "heads": 2},
        "per_device_train_batch_size": 32,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ("-m", "sparselogits", "train", tmp_path / "recipe.yaml", "--device", "cpu", "--json")
    done = torchrun(2, *words)
    assert json.loads(done.stdout)["steps"] == 3  # 231 windows, 64 a step, the rest left out
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"recipe.json", "run.json", "model"}


EVALUATES = """
import json, sys
from pathlib import Path
from transformers import TrainingArguments
from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.train import leave_process_group
from tests.masked_models import tiny_bert

cache, out = sys.argv[1:]
dataset, found = CacheDataset(cache), {}
for size, drops in ((5, True), (8, False)):
    args = TrainingArguments(
        out, per_device_eval_batch_size=size, report_to="none", use_cpu=True,
        dataloader_drop_last=drops,
    )
    trainer = SparseKDTrainer(tiny_bert(), args, train_dataset=dataset, eval_dataset=dataset)
    metrics = trainer.evaluate()
    found[size] = [metrics[name] for name in ("eval_loss", "eval_kd", "eval_kl")]
if trainer.is_world_process_zero():
    Path(out, "found.json").write_text(json.dumps(found))
leave_process_group()
"""


@pytest.mark.slow
def test_two_ranks_evaluate_like_one_process(tmp_path):
    """Twelve windows: the last batches of two ranks repeat windows, and are not dropped."""
    make_cache(tmp_path / "cache", rate=None)
    script, found = tmp_path / "evaluate.py", {}
    script.write_text(EVALUATES)
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        out.mkdir()
        torchrun(ranks, script, tmp_path / "cache", out)
        found[ranks] = json.loads((out / "found.json").read_text())
    for values in (*found[1].values(), *found[2].values()):
        assert values == pytest.approx(found[1]["8"], rel=1e-5)
