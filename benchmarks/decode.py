"""Measure the speed of reading a cache: decoding, random and sequential windows, opening.

    python benchmarks/decode.py --out decode.json

Targets are synthetic: Zipf-like sets whose sizes and sharing resemble a language model's (SmolLM2
on English prose: 10.9 entries per position, 2 900 lists per window at N = 21), 1 024 positions per
window, V = 49 152. Windows are decoded eight at a time, as in sequential reading, and one at a
time, as in random reading. Times are the minimum over many repetitions of the same window, summed
over windows, in one process on one core; on a busy machine a mean would depend on the other
processes. `against_plain` divides by the time of the simplest codec in the same run (sorted ids as
gaps and all counts, by pcodec, decoded into the same arrays), which needs 20 % more bytes. `--clock
cpu` measures the thread's processor time instead of elapsed time, for machines that do other work
at the same time (which shares the processor's caches, so times are slightly too long).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from measuring import machine
from sparselogits.data import CacheDataset
from sparselogits.identity import Identity
from sparselogits.store import Cache, WindowRecord
from sparselogits.store.codec import BlockDecoder, TargetCodec, TargetWindow
from sparselogits.store.codec.columns import ColumnDecoder, encode_column
from sparselogits.targets import SparseTargets

V, L = 49152, 1024
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
clock = time.perf_counter
PACKING = {"reset_attention": False}


def made_up(rounds: int, windows: int) -> list[TargetWindow]:
    """Draw windows of targets in which equal tokens share likely ids, over a Zipf-like prior."""
    chance = np.random.default_rng(0)
    out = []
    for _ in range(windows):
        tokens = chance.zipf(1.25, L).clip(max=V - 1).astype(np.int32)
        likely = np.stack([np.random.default_rng(t).zipf(1.15, 100) % V for t in tokens])
        mixed = np.where(
            chance.random((L, rounds)) < 0.82,
            np.take_along_axis(likely, (100 * chance.random((L, rounds)) ** 6).astype(int), 1),
            chance.zipf(1.1, (L, rounds)) % V,
        )
        following = np.append(tokens[1:], 0)
        mixed[:, : rounds // 5] = np.where(
            chance.random((L, 1)) < 0.6, following[:, None], mixed[:, : rounds // 5]
        )
        keys, counts = np.unique(mixed + (np.arange(L) << 17)[:, None], return_counts=True)
        lengths = np.bincount(keys >> 17, minlength=L)
        out.append(
            TargetWindow(
                SparseTargets(
                    torch.from_numpy(keys & (1 << 17) - 1),
                    torch.from_numpy(counts.astype(np.float32) / np.float32(rounds)),
                    torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
                    V,
                    counts=torch.from_numpy(counts.astype(np.int32)),
                    rounds=rounds,
                ),
                tokens,
                np.ones(L, np.bool_),
            )
        )
    return out


def least(actions: list[Callable[[], object]], repeats: int) -> float:
    """Return the sum of the minimum time of each action, in seconds."""
    best = np.full(len(actions), np.inf)
    for _ in range(repeats):
        for i, action in enumerate(actions):
            start = clock()
            action()
            best[i] = min(best[i], clock() - start)
    return float(best.sum())


def plain(windows: list[TargetWindow]) -> tuple[list[Callable[[], object]], int]:
    """Return a decoder per window and the coded bytes of the simplest codec."""
    gaps, counts = [], []
    for window in windows:
        ids, starts = window.targets.ids.numpy(), window.targets.offsets.numpy()[:-1]
        gap = np.diff(ids, prepend=0)
        gap[starts] = ids[starts]
        gaps.append(gap.astype(np.uint32))
        counts.append(window.targets.counts.numpy().astype(np.uint32))
    coded = [encode_column(gaps), encode_column(counts)]
    decoders = [ColumnDecoder(np.uint32, column.tables) for column in coded]

    def decode(i: int, entries: int) -> object:
        gap, count = np.empty(entries, np.uint32), np.empty(entries, np.uint32)
        decoders[0].decode_into(gap, i, coded[0].pages[i])
        decoders[1].decode_into(count, i, coded[1].pages[i])
        rounds = windows[i].targets.rounds or 1
        ends = np.flatnonzero(np.cumsum(count, dtype=np.int64) % rounds == 0) + 1
        steps = np.cumsum(gap, dtype=np.int64)
        lengths = np.diff(ends, prepend=0)
        before = np.concatenate([[0], steps])[ends - lengths]
        return steps - np.repeat(before, lengths), count.astype(np.float32) / np.float32(rounds)

    actions = [partial(decode, i, len(gap)) for i, gap in enumerate(gaps)]
    return actions, sum(len(p) for column in coded for p in column.pages)


def decoding(rounds: int, repeats: int) -> dict[str, float]:
    """Measure the decoding of eight windows, together and one at a time."""
    windows = made_up(rounds, 8)
    codec = TargetCodec("counts", V, rounds)
    tables, blocks = codec.encode(windows)
    decoder = BlockDecoder(codec, tables)
    entries = sum(w.targets.entries for w in windows)
    alone = [
        lambda i=i, w=w: decoder.decode(i, blocks[i], w.tokens, w.present)
        for i, w in enumerate(windows)
    ]
    tokens, present = (np.stack([getattr(w, n) for w in windows]) for n in ("tokens", "present"))
    together = [lambda: decoder.decode_run(0, blocks, tokens, present)]
    theirs, plain_bytes = plain(windows)
    seconds, plain_seconds = least(together, repeats * 4), least(theirs, repeats)
    return {
        "entries_per_position": entries / (8 * L),
        "bits_per_entry": 8 * sum(map(len, blocks)) / entries,
        "plain_bits_per_entry": 8 * plain_bytes / entries,
        "lists_per_window": sum(int.from_bytes(b[:4], "little") for b in blocks) / 8,
        "million_entries_per_second": entries / seconds / 1e6,
        "million_entries_per_second_one_window_at_a_time": entries / least(alone, repeats) / 1e6,
        "million_tokens_per_second": 8 * L / seconds / 1e6,
        "against_plain": seconds / plain_seconds,
    }


def reading(repeats: int) -> dict[str, float]:
    """Measure the reading of random and of consecutive windows from a cache on disk."""
    windows = made_up(21, 128)
    none = np.zeros(0, np.int32)
    codec = {"name": "inverted-lists", "version": 1, "weights": "counts", "rounds": 21}
    identity = Identity({"name": "made up"}, "", V, "all", L, 128, PACKING, {}, 0, 1.0, codec)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache.create(folder, identity)
        for start in (0, 128):
            cache.commit(
                [
                    WindowRecord(start + i, w.tokens, none, None, w.targets, 0.0, 0.0)
                    for i, w in enumerate(windows)
                ],
                {},
            )
        order = np.random.default_rng(0).permutation(256)
        warm = [lambda i=i: cache.read(int(i)) for i in order]
        cold = [lambda i=i: Cache.open(folder).read(int(i)) for i in order[:32]]
        sequential = [
            lambda i=i: [cache.read(j) for j in range(i, i + 8)] for i in range(0, 256, 8)
        ]
        dataset = CacheDataset(folder)
        items = [lambda i=i: [dataset[j] for j in range(i, i + 8)] for i in range(0, 256, 8)]
        return {
            "random_window_ms": 1e3 * least(warm, repeats) / len(warm),
            "first_window_of_a_new_reader_ms": 1e3 * least(cold, repeats) / len(cold),
            "sequential_million_tokens_per_second": 256 * L / least(sequential, repeats) / 1e6,
            "dataset_million_tokens_per_second": 256 * L / least(items, repeats) / 1e6,
        }


def opening(shards: int) -> dict[str, float]:
    """Measure opening a cache of many shards, which are empty files, because none is read."""
    codec = {"name": "inverted-lists", "version": 1, "weights": "counts", "rounds": 21}
    identity = Identity({"name": "made up"}, "", V, "all", L, 512, {}, {}, 0, 1.0, codec)
    with tempfile.TemporaryDirectory() as folder:
        Cache.create(folder, identity)
        directory = Path(folder) / "shards"
        directory.mkdir()
        for i in range(shards):
            (directory / f"windows-{512 * i:012d}-{512 * i + 512:012d}.parquet").touch()
        start = clock()
        count = len(Cache.open(folder))
        return {"shards": shards, "windows": count, "seconds": clock() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    global clock
    clock = CLOCKS[options.clock]
    torch.set_num_threads(1)
    result = {
        "machine": machine(),
        "clock": options.clock,
        "decoding": {f"N={n}": decoding(n, options.repeats) for n in (21, 50)},
        "reading": reading(max(2, options.repeats // 4)),
        "opening": opening(options.shards),
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
