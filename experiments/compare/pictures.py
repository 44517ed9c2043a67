"""The pictures of docs/results.md, from a stored comparison: those of its page, as PNG.

python experiments/compare/pictures.py experiments/results/compare_small_teacher.json \
    --out docs/figures/small_teacher loss-0 calibration-0 gradient-0 training-0
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from sparselogits.compare import read_results
from sparselogits.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("charts", nargs="+", help="names of figures, without .png")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        write_report(read_results(given.results), Path(scratch))
        for name in given.charts:
            with Image.open(Path(scratch) / "figures" / f"{name}.png") as picture:
                few = picture.convert("RGB").quantize(96)  # a fifth of the bytes
                few.save(given.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
