"""Test callbacks, datasets for evaluation and TRL."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.corpus import PackedCorpus
from sparselogits.data import TextDataset
from sparselogits.data.rows import as_windows
from sparselogits.errors import InvalidArgumentError
from sparselogits.store import Cache, export
from tests.conftest import tiny_llama


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        **{"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    }
    return TrainingArguments(str(folder), **(settings | changes))


def test_callbacks_and_early_stopping(tmp_path, cache):
    seen: list[int] = []

    class Watch(TrainerCallback):
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


EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_chat.py"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, example) -> Path:
    """The example, as it is run by hand, with fewer steps."""
    out = tmp_path_factory.mktemp("chat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(EXAMPLE), "--out", str(out), "--steps", "6"])
        patch.setenv("XDG_CACHE_HOME", str(out / "user"))
        example["main"]()
    return out


def test_the_chat_example_caches_and_learns_answers_alone(chat_run):
    cache = CacheDataset(chat_run / "cache")
    windows = [cache[i] for i in range(len(cache))]
    learnt = torch.stack([window["shift_labels"] != -100 for window in windows])
    stored = torch.stack([window["targets"].entries_per_position for window in windows])
    assert 0.2 < learnt.float().mean() < 0.95
    assert stored[~learnt].sum() == 0
    assert (stored[learnt] > 0).all()
    assert (chat_run / "student" / "model.safetensors").exists()


def test_what_is_learnt_is_what_trl_would_train_on(tmp_path, chat_run, example):
    """Token for token; TRL knows no separator between conversations, we learn it as an end."""
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    from sparselogits.corpus import open_source, pack, packing_for

    chats = example["chats_from_python"]().select(range(40))
    tokenizer = AutoTokenizer.from_pretrained(chat_run / "teacher")
    trainer = SFTTrainer(
        example["new_model"](len(tokenizer), width=16),
        example["settings"](tmp_path, 1, "cpu", assistant_only_loss=True),
        train_dataset=chats,
        processing_class=tokenizer,
    )
    packing = packing_for(tokenizer, window_length=64)
    source = open_source(chats, completion_only=True, work=tmp_path / "work")
    corpus = pack(source, tokenizer, packing, tmp_path / "packed", vocab_size=len(tokenizer))
    tokens, learnt = [], []
    for i in range(len(chats)):
        row = trainer.train_dataset[i]
        tokens += [*row["input_ids"], packing.separator_id]
        learnt += [*(label != -100 for label in row["labels"]), True]
    assert corpus.windows == len(tokens) // 64
    for window in corpus.read(0, corpus.windows):
        first, stop = 64 * window.index, 64 * (window.index + 1)
        assert window.tokens.tolist() == tokens[first:stop]
        assert window.mask.tolist() == [*learnt[first + 1 : stop], False]


def test_trl_arguments_and_callbacks(tmp_path, chat_run, cache):
    from trl import BEMACallback, SFTConfig

    def config(**changes: Any) -> SFTConfig:
        settings: dict[str, Any] = {
            **{"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False},
            **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        }
        return SFTConfig(str(tmp_path), **(settings | changes))

    averages = BEMACallback(update_freq=1)
    trainer = SparseKDTrainer(
        tiny_llama(seed=2, vocab_size=1200, max_position_embeddings=256),
        config(completion_only_loss=True, learning_rate=1e-2),  # gradients are checkpointed
        train_dataset=CacheDataset(chat_run / "cache"),
        callbacks=[averages],
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.log_history[-1]["train_loss"] > 0
    everything = CacheDataset(cache)
    for asked in ({"completion_only_loss": True}, {"assistant_only_loss": True}):
        with pytest.raises(InvalidArgumentError, match="--completion-only"):
            SparseKDTrainer(tiny_llama(seed=2), config(**asked), train_dataset=everything)
    with pytest.raises(InvalidArgumentError, match="loss_type='dft'"):
        SparseKDTrainer(tiny_llama(seed=2), config(loss_type="dft"), train_dataset=everything)


def test_tokenised_rows_of_a_dataset_evaluate(tmp_path, cache):
    """Of any length, with labels in the usual convention: as the student's own loss on them."""
    tokens = PackedCorpus.open(cache / "corpus").read(0, 3)
    lengths = (32, 20, 11)
    rows = [{"input_ids": w.tokens[:n].tolist()} for w, n in zip(tokens, lengths, strict=True)]
    labelled = [row | {"labels": [-100] * 5 + row["input_ids"][5:]} for row in rows]
    student = tiny_llama(seed=2)
    expected = []
    for given in (rows, labelled):
        total = count = 0
        for row in given:
            labels = torch.tensor([row.get("labels", row["input_ids"])])
            positions = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                loss = student(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
            total, count = total + float(loss) * positions, count + positions
        expected.append(total / count)
    trainer = SparseKDTrainer(
        student,
        arguments(tmp_path, per_device_eval_batch_size=3),
        train_dataset=CacheDataset(cache),
        eval_dataset={"whole": Dataset.from_list(rows), "ends": Dataset.from_list(labelled)},
    )
    found = trainer.evaluate()
    assert found["eval_whole_loss"] == pytest.approx(expected[0], rel=1e-5)
    assert found["eval_ends_loss"] == pytest.approx(expected[1], rel=1e-5)
    again = trainer.evaluate(Dataset.from_list(rows))
    assert again["eval_loss"] == pytest.approx(expected[0], rel=1e-5)


def test_an_exported_dataset_evaluates_after_its_column_is_renamed(tmp_path, cache):
    """As docs/guide.md says; the column that readers of the export know stays `tokens`."""
    export(Cache.open(cache), tmp_path / "rows", "datasets")
    exported = load_from_disk(str(tmp_path / "rows"))
    assert "input_ids" not in exported.column_names
    found = as_windows(exported.rename_column("tokens", "input_ids"))
    expected = TextDataset(PackedCorpus.open(cache / "corpus"), holdout=False)
    for number in range(3):
        for name in ("input_ids", "shift_labels"):
            assert torch.equal(found[number][name], expected[number][name])


def test_datasets_that_cannot_be_used(tmp_path, cache):
    plain = Dataset.from_list([{"text": "words"}])
    run = arguments(tmp_path)
    with pytest.raises(InvalidArgumentError, match="open_source"):
        SparseKDTrainer(tiny_llama(seed=2), run, train_dataset=plain)
    for given in (plain, Dataset.from_list([{"input_ids": [1, 2]}]).to_iterable_dataset()):
        with pytest.raises(InvalidArgumentError, match="input_ids"):
            SparseKDTrainer(
                tiny_llama(seed=2), run, train_dataset=CacheDataset(cache), eval_dataset=given
            )
