"""Measure a cache of many shards: listing, opening, memory of readers and DataLoader workers.

    python benchmarks/scale.py --shards 100000 --out scale.json

`opening` lists a folder of empty files with the names of shards, because opening reads no shard:
the first listing in a separate process, a second one, and the memory of the list. `reading` reads
real shards, more than a reader keeps open, window by window in a shuffled order: resident memory
after the first windows and after all of them, in one process and in the DataLoader's workers,
forked and spawned (the largest of them).
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from decode import PACKING, L, V, made_up
from sparselogits.data import CacheDataset, WindowOrder, WindowSampler
from sparselogits.identity import Identity
from sparselogits.store import Cache, WindowRecord

CODEC = {"name": "inverted-lists", "version": 1, "weights": "counts", "rounds": 21}
ROWS = 8


def identity() -> Identity:
    """Return the identity of a cache with `ROWS` windows per shard."""
    return Identity({"name": "made up"}, "", V, "all", L, ROWS, PACKING, {}, 0, 1.0, CODEC)


def resident_mib() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def opening(folder: Path, shards: int) -> dict[str, Any]:
    """Measure the listing of many shards, which are empty files."""
    Cache.create(folder, identity())
    directory = folder / "shards"
    directory.mkdir()
    for i in range(shards):
        (directory / f"windows-{ROWS * i:012d}-{ROWS * i + ROWS:012d}.parquet").touch()
    first = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--look", str(folder)], capture_output=True, check=True
        ).stdout
    )
    tracemalloc.start()
    cache = Cache.open(folder)
    windows = len(cache)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"shards": shards, "windows": windows, **first, "ranges_mib": held / 2**20}


def look(folder: Path) -> dict[str, float]:
    """Measure the seconds of opening a cache twice in this process."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        len(Cache.open(folder))
        seconds.append(time.perf_counter() - start)
    return {"first_listing_s": seconds[0], "opening_again_s": seconds[1]}


class Weighed(Dataset[dict[str, float]]):
    """Dataset that reads and discards windows, and returns the reading worker and its memory."""

    def __init__(self, folder: Path) -> None:
        self.windows = CacheDataset(folder)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, request: Any) -> dict[str, float]:
        assert self.windows[request]["targets"].entries > 0
        worker = torch.utils.data.get_worker_info()
        return {"worker": -1 if worker is None else worker.id, "mib": resident_mib()}


def reading(folder: Path, shards: int, epochs: int) -> dict[str, Any]:
    """Measure the memory of readers in one process and in forked and spawned workers."""
    cache, windows = Cache.create(folder, identity()), made_up(21, ROWS)
    none = np.zeros(0, np.int32)
    for start in range(0, shards * ROWS, ROWS):
        cache.commit(
            [
                WindowRecord(start + i, w.tokens, none, None, w.targets, 0.0, 0.0)
                for i, w in enumerate(windows)
            ],
            {},
        )
    dataset, found = Weighed(folder), {}
    for method in (None, "fork", "spawn"):
        sampler, held = WindowSampler(WindowOrder(len(dataset))), {}
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=2 if method else 0,
            multiprocessing_context=method,
            persistent_workers=bool(method),
        )
        start, count = time.perf_counter(), 0
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for item in loader:
                held.setdefault(item["worker"], []).append(item["mib"])
                count += 1
        found[method or "one process"] = {
            "windows": count,
            "ms_per_window": 1e3 * (time.perf_counter() - start) / count,
            "resident_mib_after_64_windows": max(m[min(63, len(m) - 1)] for m in held.values()),
            "resident_mib_after_all": max(m[-1] for m in held.values()),
        }
    return {"shards": shards, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--real-shards", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--look", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        print(json.dumps(look(options.look)))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as many, tempfile.TemporaryDirectory() as real:
        result = {
            "machine": platform.processor() or platform.machine(),
            "opening": opening(Path(many), options.shards),
            "reading": reading(Path(real), options.real_shards, options.epochs),
        }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
