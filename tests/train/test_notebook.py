"""Test that the Trainer's table in a notebook has the parts of the loss."""

from transformers import TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from sparselogits import CacheDataset, SparseKDTrainer
from tests.conftest import tiny_llama


class Shown(NotebookProgressCallback):
    """Keeps the table, which transformers' own callback forgets when training ends."""

    def on_train_end(self, *arguments: object, **others: object) -> None:
        self.kept: NotebookTrainingTracker = self.training_tracker
        super().on_train_end(*arguments, **others)


def test_every_line_has_kd_ce_and_kl(cache, tmp_path):
    shown = Shown()
    trainer = SparseKDTrainer(
        tiny_llama(seed=3),
        TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=CacheDataset(cache),
        alpha=0.5,
        callbacks=[shown],
    )
    trainer.train()
    header, *lines = shown.kept.inner_table
    assert header == ["Step", "Training Loss", "KD", "CE", "KL"]
    logged = [line for line in trainer.state.log_history if "loss" in line]
    expected = [[line[k] for k in ("step", "loss", "kd", "ce", "kl")] for line in logged]
    assert [list(line) for line in lines] == expected
    assert len(lines) == 3
    assert "KL" in shown.kept.html_code
