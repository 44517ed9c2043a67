"""Generate continuations of a held-out page, and answers to questions, by several models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.corpus import PackedCorpus
from sparselogits.lab.report import Continuation

QUESTIONS = ("What is a list in Python?", "Why does the sky look blue?")
"""Questions asked if the tokenizer has a chat template."""
PROMPT_TOKENS, WRITTEN_TOKENS = 32, 40
"""Number of prompt tokens taken from a held-out page, and largest number of generated tokens."""
TEMPERATURE = 0.7
"""Sampling temperature."""


@dataclass(frozen=True)
class Prompt:
    """Text that models continue.

    Args:
        shown: displayed text, without the chat template.
        tokens: tokens of the text, with the chat template, int64 [L].
    """

    shown: str
    tokens: Tensor


def prompts_of(corpus: PackedCorpus, tokenizer: Any) -> list[Prompt]:
    """Return the beginning of a held-out page, and questions in the chat template.

    If no page begins `PROMPT_TOKENS` tokens or more before the end of a held-out window, the first
    tokens of the first window are used. Without a chat template there are no questions.

    Args:
        corpus: corpus with held-out windows.
        tokenizer: transformers tokenizer that the corpus was packed with.
    """
    windows = [corpus.read_holdout(i, i + 1)[0] for i in range(corpus.holdout_windows)]
    pages = [
        window.tokens[start : start + PROMPT_TOKENS]
        for window in windows
        for start in window.document_starts.tolist()
        if start + PROMPT_TOKENS <= len(window.tokens)
    ]
    page = torch.from_numpy([*pages, windows[0].tokens[:PROMPT_TOKENS]][0].astype("int64"))
    found = [Prompt(_in_a_line(tokenizer.decode(page, skip_special_tokens=True)), page)]
    for question in QUESTIONS if tokenizer.chat_template else ():
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append(Prompt(question, torch.tensor(ids)))
    return found


@torch.no_grad()
def continuations(
    models: Mapping[str, nn.Module], tokenizer: Any, prompts: Sequence[Prompt], seed: int
) -> list[Continuation]:
    """Generate the continuation of each prompt by each model, with the same random seed."""
    found = []
    for prompt in prompts:
        texts = {}
        for name, model in models.items():
            torch.manual_seed(seed)
            written = model.eval().generate(  # type: ignore[operator]
                prompt.tokens[None],
                attention_mask=torch.ones_like(prompt.tokens[None]),
                max_new_tokens=WRITTEN_TOKENS,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                pad_token_id=0,
            )
            said = tokenizer.decode(written[0, len(prompt.tokens) :], skip_special_tokens=True)
            texts[name] = _in_a_line(said)
        found.append(Continuation(prompt.shown, texts))
    return found


def _in_a_line(text: str) -> str:
    """Replace each run of white space by ↵ if it has a line break, otherwise by one space."""
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", " ↵ ", text)).strip()
