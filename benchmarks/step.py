"""Compare a training step from the cache with a step without a teacher, including loading.

    python benchmarks/step.py [--teacher DIR --text FILE] --out benchmarks/step.json

    ce            labels only: the same loss code with the label as its target; windows come from
                  the packed text, which has no targets
    cache         cached targets, read, decoded and padded in this process
    cache thinned as cache, thinned to 25 % of the rounds with fresh noise
    cache worker  as cache, decoded by one DataLoader worker; --clock cpu excludes the worker's time
                  and, for all methods, waiting for a disk
    full          the teacher's whole distribution, with its forward pass in the step

Each run is one optimiser step (AdamW, no accumulation), interleaved in random order. All methods
share one student and one optimiser, because the same step on copies of a student, at other memory
addresses, differs by up to 5 %. Ratios compare steps of the same repetition, as median with 20th
and 80th percentile. There are two students with the teacher's vocabulary: in "even" the trunk costs
as much as the head, in "head" the head dominates. `loader` is the cost of reading alone:
microseconds of one core per token, and its share of a step. Without options the teacher is the
demo's SmolLM2-135M, with 49 152 ids.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from material import WORK, teacher
from material import corpus as packed
from measuring import interleaved, machine, ratios, spread
from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import PackedCorpus, tokenizer_fingerprint
from sparselogits.data import (
    CacheDataset,
    Schedule,
    TextDataset,
    WindowOrder,
    WindowSampler,
    collate,
)
from sparselogits.samplers import Systematic
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective, bind

STUDENTS = {"even": 16, "head": 2}
"""Number of layers per student. At width 256, 16 layers have as many parameters as the head."""


def student(layers: int, vocabulary: int, length: int) -> nn.Module:
    """Return a Llama of width 256 with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def batches(dataset: Any, batch: int, workers: int, rounds: int | None) -> Iterator[dict]:
    """Yield batches endlessly, in a new order per epoch."""
    thinning = None if rounds is None else Schedule.constant(rounds)
    sampler: Any = WindowSampler(WindowOrder(len(dataset)), thinning=thinning)
    indices = _IndicesOnly(sampler) if isinstance(dataset, TextDataset) else sampler
    loader = DataLoader(
        dataset,
        batch_size=batch,
        sampler=indices,
        collate_fn=collate,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


class _IndicesOnly:
    """Sampler that yields only the window indices of another one, for datasets without rounds."""

    def __init__(self, sampler: WindowSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return (request.index for request in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def stepper(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    loader: Iterator[dict],
    online: TransformersTeacher | None = None,
) -> Callable[[], None]:
    """Return a function that runs one optimiser step with an objective."""
    plain, device = model.forward, next(model.parameters()).device
    bind(model, objective)
    forward, model.forward = model.forward, plain

    def step() -> None:
        batch = {name: tensor.to(device) for name, tensor in next(loader).items()}
        if online is not None:
            batch["teacher_hidden"] = online.hidden(batch["input_ids"])
            del batch["target_ids"], batch["target_weights"]
        optimizer.zero_grad()
        forward(**batch).loss.backward()
        optimizer.step()

    return step


def measure(
    layers: int, cache: CacheDataset, text: TextDataset, online: TransformersTeacher, args: Any
) -> dict[str, Any]:
    """Measure a step of every method with one student."""
    model = student(layers, cache.identity.vocab_size, cache.identity.window_length)
    quarter = max(1, args.rounds // 4)

    def reading(workers: int = 0, rounds: int | None = None) -> Iterator[dict]:
        return batches(cache, args.batch, workers, rounds)

    step = partial(stepper, model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    runs = {
        "ce": step(Objective("ce"), batches(text, args.batch, 0, None)),
        "cache": step(Objective("sparse"), reading()),
        "cache thinned": step(Objective("sparse"), reading(rounds=quarter)),
        "cache worker": step(Objective("sparse"), reading(workers=1)),
        "full": step(Objective("full", teacher_head=online.head), reading(), online),
    }
    seconds = interleaved(runs, args.repeats, warm_up=2, clock=args.clock)
    trunk = sum(p.numel() for p in model.get_decoder().layers.parameters())
    return {
        "trunk_parameters": trunk,
        "head_parameters": model.lm_head.weight.numel(),
        "ce_step_seconds": spread(seconds["ce"]),
        "over_ce": {name: ratios(seconds, name, "ce") for name in runs if name != "ce"},
        "full_over_cache": ratios(seconds, "full", "cache"),
    }


def loader_cost(cache: CacheDataset, text: TextDataset, args: Any) -> dict[str, Any]:
    """Return the microseconds per token of reading in this process, the minimum of ten batches."""

    def least(dataset: Any, rounds: int | None = None) -> float:
        found = batches(dataset, args.batch, 0, rounds)
        taken = []
        for _ in range(12):
            started = time.process_time()
            batch = next(found)
            taken.append(time.process_time() - started)
        return round(1e6 * min(taken[2:]) / batch["input_ids"].numel(), 3)

    quarter = max(1, args.rounds // 4)
    return {
        "text": least(text),
        "cache": least(cache),
        "cache thinned": least(cache, quarter),
    }


def built(online: TransformersTeacher, tokenizer: Any, corpus: PackedCorpus, args: Any) -> Path:
    """Build a cache of the corpus, if it does not exist from an earlier run; return its folder."""
    root = WORK / f"cache-{args.length}-{args.windows}-{args.rounds}"
    build_caches(
        online,
        corpus,
        [CacheRequest(root, Systematic(args.rounds))],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        batch=4,
    )
    return root


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--dtype", default="float32", help="dtype of the teacher")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--build-only", action="store_true", help="build the cache, then stop")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    online, tokenizer = teacher(args.teacher, args.dtype)
    corpus = packed(tokenizer, online.vocab_size, args.text, args.windows, args.length)
    cache = CacheDataset(built(online, tokenizer, corpus, args))
    if args.build_only:
        return
    text = TextDataset(corpus, holdout=False)
    loader = loader_cost(cache, text, args)
    report: dict[str, Any] = {
        "machine": machine(),
        "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "vocabulary": online.vocab_size,
        "entries_per_token": round(cache.cache.statistics().entries_per_position, 2),
        "loader_microseconds_a_token": loader,
        "students": {},
    }
    tokens = args.batch * args.length
    for name in args.students:
        found = measure(STUDENTS[name], cache, text, online, args)
        step = found["ce_step_seconds"]["median"]
        extra = 1e-6 * tokens * (loader["cache"] - loader["text"])
        found["loading_share_of_a_step"] = round(extra / step, 5)
        report["students"][name] = found
        print(json.dumps({name: found}), flush=True)
        if args.out:  # after each student, so that an interrupted run has results
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
