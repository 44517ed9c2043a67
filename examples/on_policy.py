"""Train a cache-trained student further on its own completions, with the teacher online (TRL).

    python examples/on_policy.py --student runs/mine/model --teacher MODEL \
        --prompts prompts.jsonl --out runs/on-policy --steps 200 --learning-rate 1e-5

In each step the student completes a batch of prompts at temperature 1, the teacher reads
the completions, and the student minimises KL(student || teacher) over the whole vocabulary at every
token of the completions. This is the objective of MiniLLM (arXiv 2306.08543) without the part of
its gradient that passes through the sampling of the tokens, or GKD (arXiv 2306.13649) with beta 1
and lambda 1. Training uses TRL's `DistillationTrainer`, the successor of `GKDTrainer` for this
setting; TRL no longer has a trainer for MiniLLM. Needs trl 1.16 or newer.

PROMPTS is a file of JSON lines with `prompt` (text, or a list of messages for the chat template),
or plain text with one prompt per line. docs/training.md lists the pitfalls.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from sparselogits.teacher.loading import load_language_model, load_tokenizer


def read_prompts(path: Path) -> Dataset:
    """Read the prompts, one per line, into the `prompt` column that TRL trains on."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else []
    return Dataset.from_list(
        [{"prompt": row["prompt"]} for row in rows] or [{"prompt": line} for line in lines]
    )


class OnPolicyTrainer(DistillationTrainer):
    """TRL trainer that computes the loss in bfloat16 if `bf16` is set.

    In TRL 1.16 `bf16` affects only generation: the loss is computed in a forward that replaces the
    one that accelerate runs under autocast.
    """

    def compute_loss_context_manager(self) -> Any:
        """Return the context in which the Trainer computes the loss."""
        return self.accelerator.autocast()


def make_trainer(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    prompts: Dataset,
    out: Path,
    **settings: Any,
) -> OnPolicyTrainer:
    """Return a trainer that minimises the reverse KL on the student's own completions.

    Args:
        student: model with float32 weights, because small updates are lost in bfloat16 weights.
        teacher: model with the same vocabulary size, in any dtype.
        tokenizer: tokenizer of student and teacher.
        prompts: dataset with a column `prompt`.
        out: output folder of the trainer.
        settings: fields of `DistillationConfig` to change.
    """
    given: dict[str, Any] = {
        "beta": 1.0,  # the reverse KL; 0 is the forward KL
        "temperature": 1.0,  # applies to the samples and to both distributions of the loss
        "max_completion_length": 128,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.05,  # below 1: a fraction of all steps
        "gradient_checkpointing": False,  # on by default, and slower where memory suffices
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    config = DistillationConfig(str(out), **(given | settings))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if len(prompts) < batch:  # TRL drops incomplete batches, and would train on nothing
        raise SystemExit(
            f"found {len(prompts)} prompts, expected at least one batch of {batch}; give more "
            "prompts, or a smaller --batch"
        )
    return OnPolicyTrainer(
        student, teacher, config, train_dataset=prompts, processing_class=tokenizer
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True, help="folder of the student's model")
    parser.add_argument(
        "--teacher", required=True, help="folder or hub name of the teacher, or demo"
    )
    parser.add_argument("--prompts", required=True, type=Path, help="JSON lines or plain text")
    parser.add_argument("--out", required=True, type=Path, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="peak rate of AdamW")
    parser.add_argument("--batch", type=int, default=8, help="prompts per step")
    parser.add_argument("--completion", type=int, default=128, help="maximum tokens per completion")
    parser.add_argument("--seed", type=int, default=0, help="random seed of order and samples")
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts)
    tokenizer = load_tokenizer(arguments.student)
    dtype = "bfloat16" if torch.cuda.is_available() else "auto"
    trainer = make_trainer(
        load_language_model(arguments.student, dtype="float32"),
        load_language_model(arguments.teacher, dtype=dtype),
        tokenizer,
        prompts,
        arguments.out,
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch,
        max_completion_length=arguments.completion,
        seed=arguments.seed,
    )
    trainer.train()
    first, last = (
        next(line["loss"] for line in lines if "loss" in line)
        for lines in (trainer.state.log_history, trainer.state.log_history[::-1])
    )
    print(f"KL(student || teacher) on the student's own text: {first:.3f} first, {last:.3f} last")
    trainer.model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"saved to {arguments.out}; evaluate it with: sparselogits eval {arguments.out}")


if __name__ == "__main__":
    main()
