"""All fault runs in full; writes their results as JSON beside this file.

python -m tests.faults.run [--only kills|flips|fuzz]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.faults.test_damage import flip_bits
from tests.faults.test_kill import killed_at_random
from tests.store.draws import KINDS

RESULTS = Path(__file__).parent / "results"


def kills(folder: Path) -> dict[str, Any]:
    hits = {}
    for writers in (1, 4):
        (folder / str(writers)).mkdir()
        hits[f"{writers}_writers"] = {
            "moments": 200,
            "writers_killed_at_work": killed_at_random(folder / str(writers), 200, writers, 10),
        }
    return hits | {"resumed_to_identical_bytes": "always"}


def flips(folder: Path) -> dict[str, Any]:
    for kind in KINDS:
        flip_bits(folder / kind, kind, 2500, seed=2)
    return {"bits_flipped": 2500 * len(KINDS), "found_and_named": 2500 * len(KINDS)}


def record(name: str, run: Callable[[Path], dict[str, Any]]) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder))
    versions = {"python": platform.python_version(), "pyarrow": pa.__version__}
    result = found | {"seconds": round(time.monotonic() - start)} | versions
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(name, result, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("kills", "flips", "fuzz"))
    only = parser.parse_args().only
    for name, run in (("kills", kills), ("flips", flips)):
        if only in (None, name):
            record(name, run)
    if only in (None, "fuzz"):  # in a process of its own, because it limits its memory
        command = [sys.executable, "-m", "tests.faults.fuzz", "--out", str(RESULTS / "fuzz.json")]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
