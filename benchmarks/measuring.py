"""Time interleaved runs, summarise them by quantiles, and describe the machine."""

from __future__ import annotations

import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sparselogits.teacher.number_formats import has_products

HEAP_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "99999999999"}
"""Environment in which glibc's allocator keeps freed pages for the next tensor."""


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables with changes, and by default without those of `HEAP_KEPT`."""
    plain = {name: value for name, value in os.environ.items() if name not in HEAP_KEPT}
    return plain | dict(changes)


def machine() -> dict[str, Any]:
    """Return the properties of the machine and the versions that affect times."""
    return {
        "processor": processor(),
        "bfloat16": bool(has_products(torch.bfloat16)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    q = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return {name: round(q[i].item(), digits) for i, name in enumerate(("p20", "median", "p80"))}


def seconds_of(run: Callable[[], object], clock: str = "wall") -> float:
    """Return the seconds of one run.

    Args:
        run: function to measure.
        clock: "wall" for elapsed time, including the work of a device in use; "cpu" for processor
            seconds, which are more stable on a busy machine, but exclude waiting for a disk and
            are valid with one thread only; "cuda" for the time between two events on the device,
            with its second-level cache overwritten before the first event.
    """
    if clock == "cuda":
        _flush_cache()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1000
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    waits = torch.cuda.is_initialized()
    if waits:
        torch.cuda.synchronize()
    started = now()
    run()
    if waits:
        torch.cuda.synchronize()
    return now() - started


def _flush_cache(held: list[torch.Tensor] = []) -> None:  # noqa: B006
    """Overwrite 256 MiB, more than the second-level cache of any current device."""
    if not held:
        held.append(torch.empty(2**28, dtype=torch.int8, device="cuda"))
    held[0].zero_()


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_up: int = 1,
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Return the seconds of every run; each repetition runs all of them in a new random order."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(warm_up + repeats):
        for name in order.sample(list(runs), len(runs)):
            taken = seconds_of(runs[name], clock)
            if repetition >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str, to: str) -> dict[str, float]:
    """Return median and quantiles of the ratio of two runs' times within each repetition."""
    return spread([a / b for a, b in zip(seconds[name], seconds[to], strict=True)])


def publish(report: Mapping[str, Any], out: Path | None) -> None:
    """Print a finished report as JSON, and write it to `--out` if given."""
    text = json.dumps(report, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


def processor() -> str:
    """Return the processor's name, with family and model, which cloud machines omit."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in lines}
        if "model name" in fields:
            more = [f"{key} {fields[own]}" for key, own in _MORE.items() if own in fields]
            return (
                ", ".join([fields["model name"], " ".join(more)]) if more else fields["model name"]
            )
    return platform.processor() or platform.machine()


_MORE = {"family": "cpu family", "model": "model"}
"""Additional fields of /proc/cpuinfo by name in the result."""
