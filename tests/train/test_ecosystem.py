"""What people bring with them: LoRA students, callbacks, TensorBoard.

pytest tests/train/test_ecosystem.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.corpus import PackedCorpus
from sparselogits.data import TextDataset
from tests.conftest import tiny_llama


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        **{"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    }
    return TrainingArguments(str(folder), **(settings | changes))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_lora_student_trains_its_adapters_alone(
    tmp_path: Path, cache: Path, targets: list[str]
) -> None:
    """With the head adapted too, the loss runs on the model's own logits, and says so."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = tiny_llama(seed=2)
    student = get_peft_model(plain, LoraConfig(target_modules=targets, r=4))
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    run = arguments(tmp_path, learning_rate=1e-2)
    if "lm_head" in targets:
        with pytest.warns(UserWarning, match="cannot be run apart"):
            trainer = SparseKDTrainer(student, run, train_dataset=CacheDataset(cache))
    else:
        trainer = SparseKDTrainer(student, run, train_dataset=CacheDataset(cache))
    trainer.train()
    changed = {n for n, v in student.named_parameters() if not torch.equal(v, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert any("q_proj" in name for name in changed)


def test_callbacks_and_early_stopping(tmp_path: Path, cache: Path) -> None:
    seen: list[int] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            seen.append(state.global_step)

    run = arguments(
        tmp_path,
        **{"max_steps": 20, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"},
        **{"save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True},
        learning_rate=0.0,  # nothing improves
    )
    trainer = SparseKDTrainer(
        tiny_llama(seed=2),
        run,
        train_dataset=CacheDataset(cache),
        eval_dataset=TextDataset(PackedCorpus.open(cache / "corpus"), limit=2),
        callbacks=[Watch(), EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert seen == [1, 2, 3]


def test_tensorboard_by_its_usual_flag(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = arguments(tmp_path / "run", report_to="tensorboard", logging_steps=1)
    SparseKDTrainer(tiny_llama(seed=2), run, train_dataset=CacheDataset(cache)).train()
    (event,) = (tmp_path / "board").rglob("events.*")
    board = EventAccumulator(str(event.parent)).Reload()
    assert {"train/loss", "train/kd", "train/kl", "train/entries"} <= set(board.Tags()["scalars"])
    assert len(board.Scalars("train/kl")) == 3
