"""Print the README's figure, table and samples of text from the JSON that the demo wrote.

    sparselogits demo --out demo-run && cp demo-run/demo.json experiments/results/demo.json
    python experiments/demo.py --out docs/figures/healing.png

This prints the table and the samples, and draws the figure in light and dark colours. Seconds are
elapsed time, so the demo has to run on a machine without other work.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from sparselogits.lab.compare import Results
from sparselogits.lab.demo.story import share_chart, table
from sparselogits.lab.report.charts import draw_png

STORED = Path(__file__).parent / "results" / "demo.json"
SHOWN = (1, 2)
"""Indices of the samples that README.md shows."""


def read(file: Path = STORED) -> tuple[Results, list[dict[str, Any]]]:
    """Return the results and the samples of text of a stored run."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    return Results.model_validate(stored["results"]), stored["samples"]


def markdown_table(results: Results) -> str:
    """Return the demo's table in Markdown."""
    found = table(results)
    heads = [column.head for column in found.columns]
    lines = [f"| method | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for name, cells in [*found.lines, ("the teacher", found.last)]:
        lines.append(f"| {name} | {' | '.join(cell.text for cell in cells)} |")
    return "\n".join(lines)


def markdown_samples(samples: list[dict[str, Any]]) -> str:
    """Return the completions of the prompts of `SHOWN` by all models, as a table in Markdown."""

    def literal(text: str) -> str:
        return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text)

    shown = [samples[number] for number in SHOWN]
    lines = [f"| | {' | '.join(literal(sample['prompt']) for sample in shown)} |", "|---" * 3 + "|"]
    lines += [
        f"| {name} | {' | '.join(literal(sample['texts'][name]) for sample in shown)} |"
        for name in shown[0]["texts"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=STORED)
    parser.add_argument("--out", type=Path, help="FILE.png; FILE_dark.png is written too")
    given = parser.parse_args()
    results, samples = read(given.results)
    print(markdown_table(results), markdown_samples(samples), sep="\n\n")
    if given.out is not None:
        for dark, name in ((False, given.out.name), (True, f"{given.out.stem}_dark.png")):
            file = given.out.with_name(name)
            draw_png(share_chart(results), file, width=620, scale=1.25, dark=dark)


if __name__ == "__main__":
    main()
