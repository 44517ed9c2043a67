"""Measure the bits per entry and bytes per token of a cache, and the gain of each coding idea.

    python benchmarks/size.py --teacher DIR --text a.txt b.txt c.txt --windows 8 --out size.json

The teacher reads the first windows of the second half of each text. Nothing is fitted on them:
token frequencies, which some ideas need, are fitted on the *other* texts. Prints JSON:

    methods   per sampler: a real shard of all windows, all bytes except those of the text's tokens
    ideas     per sampler: bits per entry of ids and counts with each further idea, pages only
    synthetic the same as `methods` at V = 128 256, on synthetic targets

`--hidden FOLDER` stores the teacher's final hidden states, so that a second run needs no forward
pass.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparselogits.identity import Identity
from sparselogits.samplers import Multinomial, Sampler, Systematic, TopK, window_uniforms
from sparselogits.store import Cache, WindowRecord, codec_for
from sparselogits.store.codec.columns import encode_column
from sparselogits.targets import SparseTargets

L = 1024
SAMPLERS: dict[str, Sampler] = {
    "systematic N=21": Systematic(21),
    "systematic N=50": Systematic(50),
    "independent N=21": Multinomial(21),
    "independent N=50": Multinomial(50),
    "top-50": TopK(50),
    "top-100": TopK(100),
}


@dataclass
class Draw:
    """Entries of a window: ids and counts [E], entries per position [L], tokens [L]."""

    ids: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray

    @property
    def owner(self) -> np.ndarray:
        """Return the position of each entry, int64 [E]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def hidden_states(options: argparse.Namespace, text: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Return hidden states bf16 [W, L, D] and tokens int32 [W, L]."""
    kept = options.hidden and options.hidden / f"{text.stem}.safetensors"
    if kept and kept.exists():
        found = load_file(kept)
        return found["hidden"][: options.windows], found["tokens"].numpy().astype(np.int32)
    words = text.read_text(encoding="utf-8", errors="replace")
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    ids = tokenizer(words[len(words) // 2 :], add_special_tokens=False).input_ids
    tokens = torch.tensor(ids[: options.windows * L]).view(-1, L)
    model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = torch.cat([model.model(window[None]).last_hidden_state for window in tokens])
    if kept:
        save_file({"hidden": hidden.contiguous(), "tokens": tokens.contiguous()}, kept)
    return hidden, tokens.numpy().astype(np.int32)


def targets_of(
    hidden: torch.Tensor, head: torch.Tensor, samplers: dict[str, Sampler], window: int
) -> dict[str, SparseTargets]:
    """Draw the targets of one window with every sampler."""
    parts: dict[str, list[SparseTargets]] = {name: [] for name in samplers}
    for start in range(0, L, 128):
        logits = hidden[start : start + 128].float() @ head
        for name, sampler in samplers.items():
            uniforms = window_uniforms(0, window, L, sampler.uniforms_per_position)
            parts[name].append(sampler(logits, uniforms[start : start + 128]))
    return {name: SparseTargets.cat(part) for name, part in parts.items()}


def in_a_shard(sampler: Sampler, targets: list[SparseTargets], tokens: np.ndarray) -> dict:
    """Write a shard of these windows and return its bytes per token and bits per entry."""
    V = targets[0].vocab_size
    codec = codec_for(sampler, exact_weights=True)  # rounded_weights.py measures rounded ones
    identity = Identity({"name": "benchmark"}, "", V, "all", L, len(targets), {}, {}, 0, 1.0, codec)
    none = np.zeros(0, np.int32)
    records = [
        WindowRecord(i, tokens[i], none, None, target, 0.0, 0.0) for i, target in enumerate(targets)
    ]
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache.create(folder, identity)
        cache.commit(records, {})
        statistics = cache.statistics()
    return {
        "entries_per_token": round(statistics.entries_per_position, 2),
        "bits_per_entry": round(statistics.bits_per_entry, 3),
        "target_bytes_per_token": round(
            statistics.bits_per_entry * statistics.entries_per_position / 8, 2
        ),
        "text_bytes_per_token": round(statistics.text_bytes / statistics.tokens, 2),
        "windows_in_shard": statistics.windows,
    }


def pages(columns: list[np.ndarray], classes: list[np.ndarray] | None = None) -> int:
    """Return the bits of the pages of one column, or of one column per class."""
    if classes is None:
        return 8 * sum(map(len, encode_column([c.astype(np.uint32) for c in columns]).pages))
    kinds = np.unique(np.concatenate(classes))
    return sum(
        pages([c[k == kind] for c, k in zip(columns, classes, strict=True)]) for kind in kinds
    )


def row_gaps(draws: list[Draw], rank: np.ndarray) -> list[np.ndarray]:
    """Return the gaps between sorted ids of each position; `rank` renumbers the ids."""
    out = []
    for d in draws:
        key = np.sort(d.owner.astype(np.int64) << 32 | rank[d.ids])
        owner, ids = key >> 32, key & 0xFFFFFFFF
        gaps = np.diff(ids, prepend=0)
        first = np.diff(owner, prepend=-1) > 0
        gaps[first] = ids[first]
        out.append(gaps)
    return out


def unigram_bits(draws: list[Draw], frequency: np.ndarray) -> float:
    """Return the ideal code length of the unordered sets under a held-out unigram model."""
    p = frequency + 0.5
    cost = -np.log2(p / p.sum())
    factorial = np.concatenate([[0], np.cumsum(np.log2(np.arange(1, 200)))])
    return sum(cost[d.ids].sum() - factorial[d.lengths].sum() for d in draws)


def inverted(
    draws: list[Draw], *, by_token: bool, classes: bool, hits: bool = False, joint: int = 1
) -> int:
    """Return the bits of ids as lists of positions per id; `joint` windows share their lists."""
    heads, sizes, gaps, kinds, flags = [], [], [], [], []
    for start in range(0, len(draws), joint):
        group = draws[start : start + joint]
        tokens = np.concatenate([d.tokens for d in group])
        following = np.append(tokens[1:], -1)
        order = np.argsort(tokens, kind="stable") if by_token else np.arange(len(tokens))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        owner = np.repeat(np.arange(len(tokens)), np.concatenate([d.lengths for d in group]))
        ids = np.concatenate([d.ids for d in group])
        kept = ids != following[owner] if hits else np.ones(len(ids), bool)
        flags.append(np.bincount(place[owner[~kept]], minlength=len(tokens)))
        key = np.sort(ids[kept].astype(np.int64) << 32 | place[owner[kept]])
        listed, starts, size = np.unique(key >> 32, return_index=True, return_counts=True)
        places = key & 0xFFFFFFFF
        gap = np.diff(places, prepend=-1) - 1
        gap[starts] = places[starts]
        heads.append(np.diff(listed, prepend=-1) - 1)
        sizes.append(size - 1)
        gaps.append(gap)
        kinds.append(np.repeat(np.minimum(np.frexp(size)[1] - 1, 7), size))
    bits = pages(heads) + pages(sizes) + pages(gaps, kinds if classes else None)
    return bits + (pages(flags) if hits else 0)


def counts_ideas(draws: list[Draw]) -> dict[str, int]:
    told, told_classes, firsts = [], [], []
    for d in draws:
        untold = np.cumsum(d.lengths) - d.lengths
        first = np.ones(len(d.ids), bool)
        first[untold] = False
        hit = np.flatnonzero(d.ids == np.append(d.tokens[1:], -1)[d.owner])
        untold[d.owner[hit]] = hit
        kept = np.ones(len(d.ids), bool)
        kept[untold] = False
        told.append(d.counts[kept] - 1)
        firsts.append(d.counts[first] - 1)
        told_classes.append(np.frexp(np.repeat(d.lengths, d.lengths)[kept])[1])
    return {
        "counts, all told": pages([d.counts - 1 for d in draws]),
        "counts, the first one derived": pages(firsts),
        "counts, the next token's derived (the format)": pages(told),
        "the same, coded by the position's number of entries": pages(told, told_classes),
    }


def ideas(draws: list[Draw], frequency: np.ndarray) -> dict[str, float]:
    """Return the bits per entry with each idea."""
    V = len(frequency)
    identity, rank = np.arange(V), np.empty(V, np.int64)
    rank[np.argsort(-frequency, kind="stable")] = np.arange(V)
    steps: dict[str, Callable[[], float]] = {
        "ids by position, gaps": lambda: pages(row_gaps(draws, identity)),
        "ids by position, renumbered by held-out frequency": lambda: pages(row_gaps(draws, rank)),
        "ideal code under a held-out unigram, order divided out": lambda: unigram_bits(
            draws, frequency
        ),
        "inverted lists, time order": lambda: inverted(draws, by_token=False, classes=False),
        "inverted lists, by token": lambda: inverted(draws, by_token=True, classes=False),
        "inverted lists, by token and size class": lambda: inverted(
            draws, by_token=True, classes=True
        ),
        "the same, the next token apart (the format)": lambda: inverted(
            draws, by_token=True, classes=True, hits=True
        ),
        "the same, eight windows in one block (not taken: no window could be read alone)": (
            lambda: inverted(draws, by_token=True, classes=True, hits=True, joint=8)
        ),
    }
    entries = sum(len(d.ids) for d in draws)
    bits = {name: step() for name, step in steps.items()} | counts_ideas(draws)
    return {name: round(value / entries, 3) for name, value in bits.items()}


def draw_of(target: SparseTargets, tokens: np.ndarray) -> Draw:
    """Convert the targets of a window to numpy arrays."""
    assert target.counts is not None
    lengths = target.entries_per_position.numpy()
    return Draw(target.ids.numpy(), target.counts.numpy(), lengths, tokens)


def synthetic(vocab_size: int = 128256, windows: int = 4) -> Iterator[tuple[str, dict]]:
    """Draw targets over Zipf-like priors in which equal tokens share likely ids."""
    chance = np.random.default_rng(0)
    prior = torch.from_numpy(-np.log(np.arange(vocab_size) + 20.0)).float()
    tokens = chance.zipf(1.3, (windows, L)).clip(max=vocab_size - 1).astype(np.int32)
    for name in ("systematic N=21", "independent N=50", "top-50", "top-100"):
        made = []
        for window in range(windows):
            parts = []
            for start in range(0, L, 128):
                logits = torch.stack(
                    [_made_up(int(t), prior) for t in tokens[window, start:][:128]]
                )
                logits += torch.from_numpy(chance.gumbel(size=logits.shape).astype(np.float32))
                uniforms = torch.from_numpy(
                    chance.random((len(logits), SAMPLERS[name].uniforms_per_position))
                )
                parts.append(SAMPLERS[name](1.5 * logits, uniforms))
            made.append(SparseTargets.cat(parts))
        yield name, in_a_shard(SAMPLERS[name], made, tokens)


def _made_up(token: int, prior: torch.Tensor) -> torch.Tensor:
    """Return synthetic logits [V] after a token: the prior, with some ids raised."""
    logits = prior.clone()
    likely = torch.from_numpy(np.random.default_rng(token).zipf(1.2, 60).clip(max=len(prior)) - 1)
    logits[likely] += 3.0
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--hidden", type=Path)
    parser.add_argument("--no-synthetic", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.bfloat16)
    head = model.get_output_embeddings().weight.detach().float().T.contiguous()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    found: dict[str, dict[str, list[SparseTargets]]] = {}
    tokens: dict[str, np.ndarray] = {}
    frequencies: dict[str, np.ndarray] = {}
    for text in options.text:
        hidden, tokens[text.stem] = hidden_states(options, text)
        drawn = [targets_of(h, head, SAMPLERS, i) for i, h in enumerate(hidden)]
        found[text.stem] = {name: [d[name] for d in drawn] for name in SAMPLERS}
        words = text.read_text(encoding="utf-8", errors="replace")
        ids = tokenizer(words[: len(words) // 2], add_special_tokens=False).input_ids
        frequencies[text.stem] = np.bincount(ids, minlength=head.shape[1]).astype(np.float64)
    result: dict[str, dict] = {"methods": {}, "ideas": {}, "synthetic": {}}
    every_token = np.concatenate(list(tokens.values()))
    for name, sampler in SAMPLERS.items():
        windows = [target for text in found.values() for target in text[name]]
        result["methods"][name] = in_a_shard(sampler, windows, every_token)
        if sampler.rounds is None:
            continue
        for text, targets in found.items():
            others = sum(f / f.sum() for t, f in frequencies.items() if t != text)
            draws = [draw_of(t, w) for t, w in zip(targets[name], tokens[text], strict=False)]
            frequency = np.asarray(others) * 1e5
            result["ideas"].setdefault(name, {})[text] = ideas(draws, frequency)
    if not options.no_synthetic:
        result["synthetic"] = dict(synthetic())
    output = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(output + "\n")
    print(output)


if __name__ == "__main__":
    main()
