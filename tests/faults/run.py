"""Run all fault tests in full, and write their results as JSON next to this file.

python -m tests.faults.run [--only kills|object_kills|flips|cuts|fuzz|two_writers|full_disk|...]
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults.fuzz import MEMORY_MIB, SECONDS
from tests.faults.test_damage import cut_everywhere, flip_bits
from tests.faults.test_kill import killed_at_random
from tests.faults.test_objects import killed_on_s3_at_random
from tests.store.draws import KINDS
from tests.store.s3 import S3Server

RESULTS = Path(__file__).parent / "results"
FUZZED, PIECE = 1_000_000, 20_000


def kills(folder: Path) -> dict[str, Any]:
    hits = {}
    for writers in (1, 4):
        (folder / str(writers)).mkdir()
        hits[f"{writers}_writers"] = {
            "moments": 200,
            "writers_killed_at_work": killed_at_random(folder / str(writers), 200, writers, 10),
        }
    return hits | {"resumed_to_identical_bytes": "always"}


def object_kills(_: Path) -> dict[str, Any]:
    server, hits = S3Server(), {}
    try:
        for writers in (1, 4):
            hits[f"{writers}_writers"] = {
                "moments": 50,
                "writers_killed_at_work": killed_on_s3_at_random(server, 50, writers, 10),
            }
    finally:
        server.stop()
    versions = {name: version(name) for name in ("s3fs", "moto")}
    return hits | {"resumed_to_identical_objects": "always"} | versions


def flips(folder: Path) -> dict[str, Any]:
    for kind in KINDS:
        flip_bits(folder / kind, kind, 2500, seed=2)
    return {"bits_flipped": 2500 * len(KINDS), "found_and_named": 2500 * len(KINDS)}


def cuts(folder: Path) -> dict[str, Any]:
    steps = {"counts": 1}  # every length of one kind, every boundary and every third of the others
    lengths = {
        kind: cut_everywhere(folder / kind, kind, every=steps.get(kind, 3)) for kind in KINDS
    }
    return {"lengths_tried": lengths, "found_and_named": sum(lengths.values())}


def fuzz(folder: Path) -> dict[str, Any]:
    """Run pieces in separate processes, because each limits its memory; return their sums."""
    answers: dict[str, Counter[str]] = {}
    for first in range(0, FUZZED, PIECE):
        numbers = ["--first", str(first), "--inputs", str(PIECE), "--out", str(folder / "piece")]
        subprocess.run([sys.executable, "-m", "tests.faults.fuzz", *numbers], check=True)
        for door, count in json.loads((folder / "piece").read_text())["answers"].items():
            answers.setdefault(door, Counter()).update(count)
    return {
        "inputs": FUZZED,
        "seed": 0,
        "memory_bound_mib": MEMORY_MIB,
        "seconds_an_input_at_most": SECONDS,
        "answers": {door: dict(sorted(count.items())) for door, count in answers.items()},
        "failures": 0,
    }


def two_writers(folder: Path) -> dict[str, Any]:
    from tests.faults.two_writers import two_writers as pairs

    return {"starts_of_each_pair": 50, **pairs(folder, 50)}


def full_disk(folder: Path) -> dict[str, Any]:
    from tests.faults.full_disk import COMMANDS
    from tests.faults.full_disk import full_disk as levels

    found: dict[str, Any] = {"levels": 20}
    for name in COMMANDS:  # written after each: the run is long
        found |= levels(folder, 20, (name,))
        write("full_disk", found)
    return found


def strangers(folder: Path) -> dict[str, Any]:
    """Run in a separate process, whose allocator reserves no address space per thread."""
    command = [sys.executable, "-m", "tests.faults.strangers", "--out", str(folder / "found.json")]
    subprocess.run(command, env={**os.environ, "MALLOC_ARENA_MAX": "1"}, check=True)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    if found["failures"]:
        raise AssertionError("\n".join(found["failures"]))
    return found


RUNS = (kills, object_kills, flips, cuts, fuzz, two_writers, full_disk, strangers)


def record(name: str, run: Callable[[Path], dict[str, Any]]) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder))
    write(name, {**found, "seconds": round(time.monotonic() - start)})
    print(name, found, flush=True)


def write(name: str, found: dict[str, Any]) -> None:
    conditions = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: version(package) for package in ("pyarrow", "pcodec", "numpy")},
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(found | conditions, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[run.__name__ for run in RUNS], nargs="+")
    only = parser.parse_args().only
    for run in RUNS:
        if only is None or run.__name__ in only:
            record(run.__name__, run)


if __name__ == "__main__":
    main()
