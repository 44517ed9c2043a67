"""Draw the charts of docs/results/SETTING.md from a stored comparison, as PNG files.

python experiments/compare/pictures.py experiments/results/compare_small_teacher.json \
    --out docs/figures/small_teacher loss-0 gradient-0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparselogits.lab.compare import read_results
from sparselogits.lab.report.charts import draw_png
from sparselogits.lab.report.comparison_charts import drawings_of, students_of, with_methods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("charts", nargs="+", help="names of charts, without .png")
    parser.add_argument("--methods", nargs="+", help="methods to show [default: all]")
    given = parser.parse_args()
    results = read_results(given.results)
    if given.methods:
        results = with_methods(results, given.methods)
    drawings = [d for student in students_of(results) for d in drawings_of(results, student)]
    by_name = {drawing.key: drawing for drawing in drawings}
    for name in given.charts:
        draw_png(by_name[name], given.out / f"{name}.png", width=560, scale=1.25)


if __name__ == "__main__":
    main()
