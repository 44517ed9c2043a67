"""The demo's page: its numbers in a sentence, charts, samples of text, a window of the cache."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.corpus import PackedCorpus
from sparselogits.data import CacheDataset
from sparselogits.evaluate import HeldOut
from sparselogits.files import write_whole
from sparselogits.lab.report import (
    Continuation,
    Trained,
    Walkthrough,
    WindowViewer,
    view_page,
    write_walkthrough,
)
from sparselogits.lab.report.page import Cell
from sparselogits.teacher import TransformersTeacher

PROMPT_TOKENS, CONTINUED_TOKENS, PROMPTS = 24, 48, 2
TEMPERATURE = 0.7
WINDOW_PAGE = "window-0.html"


@dataclass(frozen=True)
class Told:
    """One method of the demo, as the page needs it.

    Args:
        key: of the method in `heldout`.
        name: as shown.
        entries: stored entries per token; None where nothing is cached.
        bytes_per_token: of its whole cache; None likewise.
        seconds: of training.
        curve: (step, cross-entropy to the labels).
        online: whether the teacher runs in every step.
    """

    key: str
    name: str
    entries: float | None
    bytes_per_token: float | None
    seconds: float
    curve: Sequence[tuple[int, float]]
    online: bool = False


def write_story(
    path: Path,
    told: Sequence[Told],
    heldout: Mapping[str, HeldOut],
    *,
    headline: str,
    caution: str,
    continuations: Sequence[Continuation],
    window: str | None,
    next_steps: Sequence[tuple[str, str]],
    conditions: Sequence[tuple[str, str]],
) -> None:
    """Write the demo's page.

    Args:
        path: of the page.
        told: the methods, in order.
        heldout: measurements by method, those of the teacher under `teacher`.
        headline: what was distilled, what it cost, what it shows.
        caution: what the numbers cannot show.
        continuations: samples of text.
        window: name of the page of a window, beside this one.
        next_steps: (what it does, command) pairs.
        conditions: settings and versions.
    """
    students = [
        Trained(one.name, _cells(one, heldout[one.key]), one.curve, heldout[one.key].loss)
        if one.key == "ce"
        else Trained(
            one.name,
            _cells(one, heldout[one.key]),
            one.curve,
            heldout[one.key].loss,
            _less(heldout[one.key], heldout["ce"]),
        )
        for one in told
    ]
    found = Walkthrough(
        title="sparselogits demo",
        headline=headline,
        caution=caution,
        students=students,
        teacher=[*_metrics(heldout["teacher"]), *[Cell("")] * 3],
        rivals=[one.name for one in told if not one.online],
        continuations=continuations,
        sampled=(
            f"Text after the first {PROMPT_TOKENS} tokens of a held-out page, drawn at temperature "
            f"{TEMPERATURE:g} with one seed for all. Students this far from convergence write no "
            "sentences yet; the teacher shows what the text should look like."
        ),
        window=window,
        next_steps=next_steps,
        conditions=conditions,
    )
    write_walkthrough(found, path)


def _less(one: HeldOut, ce: HeldOut) -> tuple[float, float | None, float | None]:
    gap = one.difference(ce)
    return gap.mean, gap.low, gap.high


def _metrics(found: HeldOut) -> list[Cell]:
    kl = None if found.kl is None else max(found.kl, 0.0)
    return [
        Cell(f"{found.loss:.3f}", found.loss),
        Cell(f"{found.perplexity:.1f}", found.perplexity),
        Cell("-") if kl is None else Cell(f"{kl:.3f}", kl),
    ]


def _cells(one: Told, found: HeldOut) -> list[Cell]:
    def plain(value: float | None) -> Cell:
        return Cell("-") if value is None else Cell(f"{value:.1f}", value)

    entries = Cell("all") if one.online else plain(one.entries)
    seconds = Cell(f"{one.seconds:.0f}", one.seconds)
    return [*_metrics(found), entries, plain(one.bytes_per_token), seconds]


def prompts_of(corpus: PackedCorpus) -> list[Tensor]:
    """Return the first tokens of some held-out documents, or of windows where none begins."""
    begun, others = [], []
    for index in range(corpus.holdout_windows):
        window = corpus.read_holdout(index, index + 1)[0]
        tokens = torch.from_numpy(window.tokens.astype("int64"))
        others.append(tokens[:PROMPT_TOKENS])
        begun += [
            tokens[start : start + PROMPT_TOKENS]
            for start in window.document_starts.tolist()
            if start + PROMPT_TOKENS <= len(tokens)
        ]
        if len(begun) >= PROMPTS:
            break
    return (begun + others)[:PROMPTS]


def continuations(
    models: Mapping[str, nn.Module], tokenizer: Any, prompts: Sequence[Tensor], seed: int
) -> list[Continuation]:
    """Let models continue prompts.

    Args:
        models: transformers models by name.
        tokenizer: of all of them.
        prompts: int64 [L] each.
        seed: of the draws, the same for all models.
    """
    found = []
    for prompt in prompts:
        texts = {}
        for name, model in models.items():
            torch.manual_seed(seed)
            with torch.no_grad():
                written = model.eval().generate(  # type: ignore[operator]
                    prompt[None],
                    attention_mask=torch.ones_like(prompt[None]),
                    max_new_tokens=CONTINUED_TOKENS,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_k=0,
                    pad_token_id=0,
                )
            said = tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
            texts[name] = _in_a_line(said)
        begun = tokenizer.decode(prompt, skip_special_tokens=True)
        found.append(Continuation(_in_a_line(begun), texts))
    return found


def _in_a_line(text: str) -> str:
    """Return a text with its line breaks as signs and its runs of spaces as one."""
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", " ↵ ", text)).strip()


def write_window(
    out: Path,
    cache: Path,
    tokenizer: Any,
    teacher: TransformersTeacher,
    student: nn.Module,
) -> str:
    """Write the page of the first window of a cache; return its name in `out`."""
    dataset = CacheDataset(cache)
    viewer = WindowViewer(dataset, tokenizer=tokenizer, teacher=teacher, student=student)
    text = view_page(viewer.view(0), rounds=dataset.identity.sampler.get("rounds"))
    write_whole(out / WINDOW_PAGE, text)
    return WINDOW_PAGE
