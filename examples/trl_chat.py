"""Fine-tune a chat teacher with TRL, cache targets of its answers, and distil a student.

    python examples/trl_chat.py --out runs/chat
    python examples/trl_chat.py --out runs/chat --teacher MODEL --chats chats.jsonl --window 1024

Both trainers read one `datasets.Dataset` with a `messages` column, have one `SFTConfig`, and learn
only the assistant's turns: TRL by `assistant_only_loss`, the cache by
`completion_only` (the teacher reads the prompts, but they are neither cached nor trained on).

Without --teacher, a small teacher is created and fine-tuned on questions and answers from the
language reference that comes with Python; this takes seconds on a CPU.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.data import TextDataset
from sparselogits.samplers import Systematic
from sparselogits.teacher import load_teacher
from sparselogits.teacher.loading import load_tokenizer

# ChatML; the `generation` blocks mark the assistant's text for TRL
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>
{% endgeneration %}{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chats_from_python() -> Dataset:
    """Return conversations of two questions and two answers from the language reference."""
    rows = []
    for name, page in sorted(topics.items()):
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n\n+", page)]
        answers = [part for part in paragraphs if 80 < len(part) < 400]
        for first, second in list(zip(answers[::2], answers[1::2], strict=False))[:3]:
            texts = [f"Explain `{name}`.", first, "Go on.", second]
            roles = ("user", "assistant", "user", "assistant")
            turns = [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)]
            rows.append({"messages": turns})
    return Dataset.from_list(rows)


def make_teacher(chats: Dataset, folder: Path, steps: int, device: str) -> None:
    """Create a small teacher and fine-tune it on the assistant's turns with TRL."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((t["content"] for c in chats["messages"] for t in c), learner)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[0], pad_token=special[0]
    )
    tokenizer.chat_template = TEMPLATE
    trainer = SFTTrainer(
        new_model(len(tokenizer), width=96),
        settings(folder / "sft", steps, device, assistant_only_loss=True),
        train_dataset=chats,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_model(vocab_size: int, *, width: int) -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(shape)


def settings(out: Path, steps: int, device: str, **changes: object) -> SFTConfig:
    """Return the settings that both trainers share, with changes."""
    given: dict[str, object] = {
        **{"max_steps": steps, "learning_rate": 3e-3, "per_device_train_batch_size": 8},
        **{"logging_steps": 10, "save_strategy": "no", "report_to": "none", "bf16": False},
        **{"gradient_checkpointing": False, "disable_tqdm": True, "use_cpu": device == "cpu"},
    }
    return SFTConfig(str(out), **(given | changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--teacher", help="chat model; default: a new small one")
    parser.add_argument("--chats", help="JSON lines with `messages`; default: from Python's manual")
    parser.add_argument("--window", type=int, default=128, help="tokens per window")
    parser.add_argument("--rounds", type=int, default=21, help="sampling rounds per token")
    parser.add_argument("--steps", type=int, default=40, help="steps of each training")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chats = chats_from_python()
    if arguments.chats:
        chats = load_dataset("json", data_files=arguments.chats, split="train")
    folder = arguments.teacher or str(arguments.out / "teacher")
    if arguments.teacher is None and not (arguments.out / "teacher" / "config.json").exists():
        make_teacher(chats, Path(folder), arguments.steps, device)

    # the teacher reads the conversations once; only the assistant's turns are cached
    tokenizer = load_tokenizer(folder)
    teacher = load_teacher(folder, tokenizer=tokenizer, device=device)
    corpus = pack(
        open_source(chats, completion_only=True, work=arguments.out),
        tokenizer,
        packing_for(tokenizer, window_length=arguments.window, holdout=0.1),
        arguments.out / "cache" / "corpus",
        vocab_size=teacher.vocab_size,
    )
    build_caches(
        teacher,
        corpus,
        [CacheRequest(arguments.out / "cache", Systematic(arguments.rounds))],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
    )

    cache = CacheDataset(arguments.out / "cache")
    windows = [cache[i] for i in range(len(cache))]
    learnt = torch.stack([window["shift_labels"] != -100 for window in windows])
    stored = torch.stack([window["targets"].entries_per_position for window in windows])
    print(f"{len(windows)} windows; {learnt.float().mean():.0%} of the positions are learnt")
    print(f"entries stored where nothing is learnt: {int(stored[~learnt].sum())}")
    print(f"entries per learnt position: {stored[learnt].float().mean():.1f}")

    trainer = SparseKDTrainer(
        new_model(teacher.vocab_size, width=64),
        settings(arguments.out / "student", arguments.steps, device, assistant_only_loss=True),
        train_dataset=cache,
        eval_dataset=TextDataset(corpus),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss of the answers: {before:.3f} before, {after:.3f} after")
    trainer.model.save_pretrained(arguments.out / "student")


if __name__ == "__main__":
    main()
