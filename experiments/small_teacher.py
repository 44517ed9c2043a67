"""Train a small teacher and its tokenizer from text, for experiments in a pre-training regime.

    python experiments/small_teacher.py --text FILE [FILE ...] --out FOLDER

Tokenizer (byte-level BPE) and model (a Llama of 8.7 M parameters by default) are trained on the
given text, without the held-out documents. Text files are cut into documents of about 4 000
characters at blank lines. FOLDER becomes a model folder for --teacher of every command, and
contains the documents as `documents.jsonl` for --data. After an interruption the same command
resumes from the last checkpoint. The speed is some million tokens per hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from sparselogits.corpus import open_source, pack, packing_for
from sparselogits.data import TextDataset, collate

DOCUMENT_CHARACTERS = 4000
"""Approximate number of characters per document of a text file."""

END = "<|endoftext|>"


def documents(files: list[Path]) -> Iterator[str]:
    """Yield runs of paragraphs of about DOCUMENT_CHARACTERS characters."""
    for file in files:
        gathered = ""
        for paragraph in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            gathered += paragraph + "\n\n"
            while len(gathered) >= DOCUMENT_CHARACTERS:
                cut = gathered.find("\n", DOCUMENT_CHARACTERS)  # a file may lack blank lines
                cut = len(gathered) if cut < 0 else cut + 1
                yield gathered[:cut]
                gathered = gathered[cut:]
        if gathered.strip():
            yield gathered


def byte_level_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, type=Path, nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    texts = list(documents(arguments.text))
    data = out / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if not (out / "tokenizer.json").exists():
        byte_level_tokenizer(texts, arguments.vocabulary).save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    packing = packing_for(tokenizer, window_length=arguments.window, holdout=0.05)
    corpus = pack(
        open_source(str(data)), tokenizer, packing, out / "corpus", vocab_size=len(tokenizer)
    )
    set_seed(arguments.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.width,
            intermediate_size=arguments.width * 8 // 3 // 8 * 8,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            max_position_embeddings=arguments.window,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    steps = int(arguments.epochs * corpus.windows / arguments.batch)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.1,
            adam_beta2=0.95,
            bf16=arguments.precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            seed=arguments.seed,
            logging_steps=20,
            eval_strategy="steps",
            eval_steps=100,
            save_steps=100,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_drop_last=True,
            remove_unused_columns=False,  # the loss needs all columns
        ),
        train_dataset=TextDataset(corpus, holdout=False),
        eval_dataset=TextDataset(corpus),
        data_collator=collate,
    )
    checkpoints = out / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(out)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in arguments.text},
        "options": {k: v for k, v in vars(arguments).items() if k not in ("text", "out")},
        "training_windows": corpus.windows,
        "heldout_windows": corpus.holdout_windows,
        "steps": steps,
        "curve": [line for line in trainer.state.log_history if "eval_loss" in line],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(checkpoints)


if __name__ == "__main__":
    main()
