"""Write docs/benchmarks.md from the JSON files of the benchmarks.

    python benchmarks/report.py

A missing file or value is reported as not measured; this script contains no results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

`python benchmarks/report.py` writes this page from the JSON files next to the scripts in
`benchmarks/`. `make bench` runs the benchmarks of the loss, a training step, building, reading and
sampling (and of sizes, if text is given) and writes this page; `make bench-gpu` runs the benchmark
for a GPU. Compared runs are interleaved in one process; a ratio compares runs of the same
repetition, as median with the 20th and 80th percentile in brackets. Seconds depend on the machine,
ratios on the code and on the memory allocator: if both memory conditions were measured, both are
printed. **Bold: the target is missed.**
"""


def number(value: Any) -> str:
    """Format a number for a table."""
    if isinstance(value, dict) and "median" in value:
        low, high = number(value.get("p20")), number(value.get("p80"))
        return f"{number(value['median'])} ({low}-{high})"
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1 else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def marked(value: Any, *, most: float | None = None, least: float | None = None) -> str:
    """Format a number, in bold if its median, as printed, misses the target."""
    text = number(value)
    printed = float(re.sub(r" .*|,", "", text))
    missed = (most is not None and printed > most) or (least is not None and printed < least)
    return f"**{text}**" if missed else text


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(number(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested values with their paths; a median with quantiles is one leaf."""
    if isinstance(value, dict) and "median" not in value:
        return [leaf for k, v in value.items() for leaf in flat(v, f"{path} / {k}" if path else k)]
    return [(path, value)]


def conditions(found: dict[str, Any]) -> str:
    """Return the machine and the settings of a run in one line."""
    machine = found.get("machine", "not recorded")
    if isinstance(machine, dict):
        machine = ", ".join(f"{k} {v}" for k, v in machine.items())
    settings = found.get("settings") or {}
    said = ", ".join(f"{k} {v}" for k, v in settings.items() if v not in (None, "None", False))
    return f"Machine: {machine}." + (f" Settings: {said}." if said else "")


def step(found: dict[str, Any]) -> str:
    """Return the tables of a training step from the cache."""
    rows = []
    for name, student in found["students"].items():
        for method, ratio in student["over_ce"].items():
            most = STEP_TARGET if method.startswith("cache") else None
            rows.append((name, method, marked(ratio, most=most)))
    students = [
        (name, s["trunk_parameters"], s["head_parameters"], s["ce_step_seconds"],
         s["full_over_cache"], f"{100 * s['loading_share_of_a_step']:.2f} %")
        for name, s in found["students"].items()
    ]  # fmt: skip
    shape = ("student", "trunk", "head", "CE step, s", "full KD / cache", "loading")
    parts = [table(("student", "method", "over a CE step"), rows), table(shape, students)]
    if loader := found.get("loader_microseconds_a_token"):
        said = ", ".join(f"{name} {value:.2f}" for name, value in loader.items())
        parts.append(
            f"Reading and decoding alone, microseconds of one core per token: {said}; "
            f"{found['entries_per_token']} entries per token."
        )
    parts.append("The paper's full KD takes 1.7 to 2.6 times its cached step.")
    return "\n\n".join(parts)


def cache_build(found: dict[str, Any]) -> str:
    """Return the table of a build divided by the teacher's forward pass."""
    rows = [
        ("forward + sampling, loss, entropy", found["compute_over_forward"]),
        (
            "the whole build: + encoding, reading back, writing",
            marked(found["build_over_forward"], most=BUILD_TARGET),
        ),
    ]
    return (
        table(("what", "over the forward pass"), rows)
        + f"\n\nThe forward pass reads {found['forward_tokens_per_second']:,} tokens per second, "
        f"V = {found['vocabulary']:,}."
    )


def forward_share(found: dict[str, Any]) -> str:
    """Return the table of the parts of a build's elapsed time."""
    parts = ("forward", "sampling", "rest")
    rows = [
        (
            *(r["dtype"], r["threads"], r["tokens_per_second"]),
            marked(r["forward_share"], least=FORWARD_TARGET),
            *(r["sampling_share"], r["rest_share"]),
        )
        for r in found["results"]
    ]
    header = ("dtype", "threads", "tokens per second", *(f"{part}, of wall time" for part in parts))
    return table(header, rows)


def loss(found: dict[str, Any]) -> str:
    """Return the table of losses divided by the three matrix products."""
    rows = found["results"]
    methods = list(dict.fromkeys(m for row in rows for m in row["ratio_to_products"]))
    known = ("dtype", "D", "V", "memory", "rows", "repeats", "torch_tuned_rows")
    shape = [k for k in known if any(k in row for row in rows)]

    def cells(row: dict[str, Any]) -> list[Any]:
        measured = row["ratio_to_products"]
        most = LOSS_TARGET if row["D"] >= 512 else NARROW_LOSS_TARGET
        return [
            *(str(row.get(k, "-")) for k in shape),
            *(
                marked(measured[m], most=most if m.startswith("ours") else None)
                if m in measured
                else "-"
                for m in methods
            ),
        ]

    return table((*shape, *methods), map(cells, rows))


LOSS_MEMORY = """`memory`: "default" is the system's allocator, which maps every large tensor again
at each allocation; "kept" keeps freed pages (`MALLOC_MMAP_MAX_=0`), in another process.
`F.cross_entropy` allocates the most memory and differs the most between the two. Files without this
column are measured with the default. `torch_chunked` is torch's chunked loss with its automatic
choice of chunks, `torch_tuned` the same with the fastest `batch_chunk_size` of those tried, a power
of two from 64 rows to all of them (`torch_tuned_rows`)."""


def anything(found: dict[str, Any]) -> str:
    """Return a table of all numbers by path, for benchmarks without a specific table."""
    skipped = ("machine", "settings", "torch")
    leaves = [leaf for k, v in found.items() if k not in skipped for leaf in flat(v, k)]
    rows = []
    for path, value in leaves:
        parts = path.split(" / ")
        target = TARGETS.get(parts[0]) or TARGETS.get(parts[-1])
        rows.append((path, marked(value, **target) if target else value))
    return table(("metric", "value"), rows)


def sampling(found: dict[str, Any]) -> str:
    """Return a table of all conditions; the target applies to warm memory with a compiler."""
    measured = ("warm", "warm_without_compiler", "default")
    ratios = [found[condition]["ratio_to_softmax"] for condition in measured]
    rows = [
        (name, marked(warm, most=SAMPLING_TARGET), *(others[name] for others in ratios[1:]))
        for name, warm in ratios[0].items()
    ]
    seconds = [found[condition]["softmax_seconds"] for condition in ("warm", "default")]
    return (
        table(
            (
                "sampler",
                "warm memory",
                "warm memory, no C compiler",
                "the system's default",
            ),
            rows,
        )
        + f"\n\nThe softmax itself takes {number(seconds[0])} s in warm memory and "
        f"{number(seconds[1])} s by default, where its result is written to pages that are mapped "
        "again, which causes the ratios below one in the last column. Largest error of a marginal: "
        f"{number(found['warm']['marginal_error'])}. On CUDA a Triton kernel sums the blocks"
        + ("." if (HERE / "gpu.json").exists() else ", which is not measured on a GPU.")
    )


def rows_of_results(found: dict[str, Any]) -> str:
    """Return a table of `results` with a column per key."""
    rows = found["results"]
    header = list(dict.fromkeys(k for row in rows for k in row))
    return table(header, [[row.get(k, "-") for k in header] for row in rows])


def gpu(found: dict[str, Any]) -> str:
    """Return the measured parts of the GPU benchmark, and the missing parts with their reasons."""
    if found["rehearsal"]:
        return "Not measured: this file is from a rehearsal on the CPU."
    parts = found["parts"]
    text = [
        f"### {name}\n\n{GPU_PARTS[name](part['results'])}"
        for name, part in parts.items()
        if "results" in part
    ]
    missing = {name: part["reason"] for name, part in parts.items() if part["reason"]}
    for row in parts["loss"].get("results", {}).get("problems", []):
        at = f"D = {row['D']}, {row['rows']} rows"
        for name, record in row["tuning"].items():
            if "not_measured" in record:
                missing[f"loss, {name}, {at}"] = record["not_measured"]
    if missing:
        text += ["### Not measured, or incomplete", table(("part", "reason"), missing.items())]
    packages = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    return "\n\n".join([*text, f"Versions: {packages}."])


def gpu_loss(results: dict[str, Any]) -> str:
    """Return the tables of the loss on a GPU: relative times, peak memory, chosen settings."""
    rows = [row for row in results["problems"] if "over_products" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["over_products"]))
    shape = ("D", "V", "rows")

    def of_losses(kind: str, row: dict[str, Any], most: float | None) -> list[Any]:
        return [
            "-"
            if name not in row.get(kind, {})
            else marked(row[kind][name], most=most if name in GPU_OURS else None)
            for name in names
        ]

    def lines(kind: str, most: float | None) -> list[list[Any]]:
        return [[*(str(row[k]) for k in shape), *of_losses(kind, row, most)] for row in rows]

    text = ["Over the products:", table((*shape, *names), lines("over_products", LOSS_TARGET))]
    if any("over_quack" in row for row in rows):
        text += ["Over quack:", table((*shape, *names), lines("over_quack", 1.0))]
    text += [
        "Peak of memory beyond the input in GiB, gradients included:",
        table((*shape, *names), lines("peak_gib", None)),
        "Chosen chunk settings:",
        table(
            (*shape, *names),
            [
                [
                    *(str(row[k]) for k in shape),
                    *(row["tuning"][name].get("chosen", "-") for name in names),
                ]
                for row in rows
            ],
        ),
    ]
    return "\n\n".join(text)


def gpu_sampling(results: dict[str, Any]) -> str:
    """Return the table of the samplers on a GPU."""
    rows = [
        (
            *(dtype, name, "yes" if found["kernel"] else "no"),
            marked(ratio, most=SAMPLING_TARGET),
            found.get("by_pytorch", {}).get(name, "not measured"),
            found["softmax_seconds"],
        )
        for dtype, found in results.items()
        for name, ratio in found["ratio_to_softmax"].items()
    ]
    header = ("logits", "sampler", "Triton kernel", "over a softmax", "without kernel")
    return table((*header, "softmax, s"), rows)


def gpu_build(results: dict[str, Any]) -> str:
    """Return the table of a build on a GPU."""
    rows = [
        ("sampling, loss, entropy", marked(results["compute_over_forward"], most=BUILD_TARGET)),
        ("the whole build", marked(results["build_over_forward"], most=BUILD_TARGET)),
    ]
    speed = results["forward_tokens_per_second"]
    return (
        table(("what", "over the forward pass"), rows)
        + f"\n\n{results['parameters']:,} parameters; the forward pass reads {speed:,} tokens per "
        "second."
    )


def gpu_step(results: dict[str, Any]) -> str:
    """Return the table of a training step on a GPU."""
    rows = [(name, marked(ratio, most=STEP_TARGET)) for name, ratio in results["over_ce"].items()]
    seconds = number(results["ce_step_seconds"])
    return table(("method", "over a CE step"), rows) + f"\n\nThe CE step takes {seconds} s."


def gpu_demo(results: dict[str, Any]) -> str:
    """Return the time of the demo in words."""
    return f"{len(results['runs'])} methods, {results['seconds']} s in total."


GPU_PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "loss": gpu_loss,
    "sampling": gpu_sampling,
    "build 1B": gpu_build,
    "step": gpu_step,
    "build 8B": gpu_build,
    "demo": gpu_demo,
}
"""Functions that format the parts of the GPU benchmark."""

GPU_OURS = ("ours", "triton", "ours_labels", "triton_labels")

LOSS_TARGET = 1.10  # D >= 512
NARROW_LOSS_TARGET = 1.35
STEP_TARGET = 1.02
BUILD_TARGET = 1.05
FORWARD_TARGET = 0.95
SAMPLING_TARGET = 1.5
TARGETS: dict[str, dict[str, float]] = {
    "million_entries_per_second": {"least": 30},
    "random_window_ms": {"most": 2},
    "sequential_million_tokens_per_second": {"least": 2},
}
"""Targets of the metrics of `anything`, by the first or the last part of their path."""

SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    ("loss", "The loss, over its three matrix products (at most 1.10, at D = 128 1.35)", loss),
    ("memory", "Peak memory of the loss beyond its inputs and gradients", rows_of_results),
    ("step", "A training step from the cache, over a step without a teacher (at most 1.02)", step),
    ("cache_build", "Building a cache, over the teacher's forward pass (at most 1.05)",
     cache_build),
    ("forward_share", "Share of a build's wall time in the teacher's forward pass (at least 0.95)",
     forward_share),
    ("packing", "Tokenising and packing, and reading packed text again", anything),
    ("sampling", "Sampling, over one softmax of the same logits (at most 1.5)", sampling),
    ("decode", "Reading a cache (30 M entries and 2 M tokens per second, 2 ms per random window)",
     anything),
    ("size", "Size of a cache", anything),
    ("many_shards", "Memory of a cache's statistics", anything),
    ("retokenize", "Rewriting a cache for another tokenizer", anything),
    ("gpu", "On one GPU (the loss at most 1.10, and no slower than quack)", gpu),
]  # fmt: skip


def section(name: str, title: str, render: Callable[[dict[str, Any]], str]) -> str:
    """Return the section of one benchmark."""
    script = f"`benchmarks/{name}.py`"
    files = sorted(HERE.glob(f"{name}.json")) + sorted(HERE.glob(f"{name}_*.json"))
    parts = [f"## {title}", f"From {script}."]
    for file in files:
        if len(files) > 1:
            parts.append(f"### {file.stem}")
        found = json.loads(file.read_text())
        try:
            parts += [render(found), conditions(found)]
            parts += [LOSS_MEMORY] if file.name == "loss_rivals.json" else []
        except (KeyError, TypeError, AttributeError) as error:
            parts.append(f"Not measured: {file.name} lacks {error}; run the script again.")
    if not files:
        parts.append("Not measured.")
    return "\n\n".join(parts)


def page() -> str:
    """Return the text of docs/benchmarks.md."""
    return "\n\n".join([INTRODUCTION.strip(), *(section(*s) for s in SECTIONS)]) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
