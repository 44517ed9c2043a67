"""README's first figure, table and sample of text, from the JSON that a run of the demo left.

    sparselogits demo --out demo-run && cp demo-run/demo.json experiments/results/demo.json
    python experiments/demo.py --out docs/figures/healing.png

prints the table and the sample, and draws the figure in light and dark colours. Seconds are
processor seconds of training divided by two, so that a run on a busy machine says what two quiet
cores take.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparselogits.lab.compare import Results
from sparselogits.lab.demo.story import share_chart, table
from sparselogits.lab.report.charts import draw_png

STORED = Path(__file__).parent / "results" / "demo.json"
CORES = 2
SHOWN = 1
"""Number of the sample that README shows: a question."""


def read(file: Path = STORED) -> tuple[Results, list[dict[str, Any]]]:
    """Return the results and the samples of text of a stored run."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    return Results.model_validate(stored["results"]), stored["samples"]


def markdown_table(results: Results) -> str:
    """Return the demo's table in Markdown."""
    runs = {run.method: run for run in results.runs}
    found = table(results)
    heads = [column.head for column in found.columns]
    lines = [f"| method | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for name, cells in [*found.lines, ("the teacher", found.last)]:
        texts = [cell.text for cell in cells]
        used = runs[name].cpu_seconds if name in runs else None
        texts[heads.index("seconds")] = f"{used / CORES:.0f}" if used and runs[name].steps else "-"
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def markdown_sample(samples: list[dict[str, Any]]) -> str:
    """Return what the models answer to a question, as a table in Markdown."""
    sample = samples[SHOWN]
    lines = [f"| | {sample['prompt']} |", "|---|---|"]
    lines += [
        f"| {name} | {text.replace('|', '&#124;')} |" for name, text in sample["texts"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=STORED)
    parser.add_argument("--out", type=Path, help="figure; FILE_dark.png is drawn beside it")
    given = parser.parse_args()
    results, samples = read(given.results)
    print(markdown_table(results), markdown_sample(samples), sep="\n\n")
    if given.out is not None:
        for dark, name in ((False, given.out.name), (True, f"{given.out.stem}_dark.png")):
            file = given.out.with_name(name)
            draw_png(share_chart(results), file, width=620, scale=1.25, dark=dark)


if __name__ == "__main__":
    main()
