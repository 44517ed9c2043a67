"""Let models continue a held-out page and answer questions."""

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
PROMPT_TOKENS, WRITTEN_TOKENS = 32, 40
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Prompt:
    """A text that models continue.

    Args:
        shown: the text for readers; a question stands without its chat template.
        tokens: int64 [L], the text for models.
    """

    shown: str
    tokens: Tensor


def prompts_of(corpus: PackedCorpus, tokenizer: Any) -> list[Prompt]:
    """Return the beginning of a held-out page, and questions in the form of the chat template.

    Where no page begins in the held-out windows, the first window's first tokens stand for it. A
    tokenizer without a chat template asks no questions.
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
    """Return what models write after prompts.

    Args:
        models: transformers models by name.
        tokenizer: the tokenizer of all of them.
        prompts: the texts to continue.
        seed: random seed of the sampling, the same for each model and prompt.
    """
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
    """Return a text with its line breaks as signs and its runs of spaces as one."""
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", " ↵ ", text)).strip()
