"""Run the million inputs of the fuzzer in pieces, whose results are stored for resuming.

A piece is a separate process, because it limits its memory. Its result is stored under a name with
the hash of the source of library and fuzzer, so that a change starts again.
"""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import sparselogits
from tests.faults.fuzz import MEMORY_MIB, SECONDS

ROOT = Path(__file__).parents[2]
PIECE = 20_000
NOT_FUZZED = {
    *("__init__", "card", "copy_folder", "export", "local_copy", "merge", "objects", "place"),
    *("ranges", "repair", "storage", "verify"),
}


def fuzz_in_pieces(work: Path, inputs: int, seed: int = 0) -> dict[str, Any]:
    """Run the inputs that are not stored yet, and return the sums over all pieces."""
    work.mkdir(parents=True, exist_ok=True)
    pieces = [_piece(work, first, inputs, seed) for first in range(0, inputs, PIECE)]
    answers: dict[str, Counter[str]] = {}
    for piece in pieces:
        for door, count in piece["answers"].items():
            answers.setdefault(door, Counter()).update(count)
    return {
        "inputs": sum(piece["inputs"] for piece in pieces),
        "seed": seed,
        "memory_bound_mib": MEMORY_MIB,
        "seconds_an_input_at_most": SECONDS,
        "answers": {door: dict(sorted(count.items())) for door, count in answers.items()},
        "failures": 0,
        "source": _source(),
    }


def _piece(work: Path, first: int, inputs: int, seed: int) -> dict[str, Any]:
    path = work / f"fuzz-{_source()}-{seed}-{first}.json"
    count = min(PIECE, inputs - first)
    if not (path.exists() and json.loads(path.read_text())["inputs"] == count):
        command = [sys.executable, "-m", "tests.faults.fuzz", "--out", f"{path}.part"]
        numbers = ["--first", str(first), "--inputs", str(count), "--seed", str(seed)]
        subprocess.run([*command, *numbers], cwd=ROOT, check=True)
        Path(f"{path}.part").rename(path)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _source() -> str:
    """Return the hash of the source of library and fuzzer."""
    store = Path(sparselogits.__file__).parent / "store"
    read = [path for path in store.glob("*.py") if path.stem not in NOT_FUZZED]
    files = [*read, store.parent / "identity.py", Path(__file__).parent / "fuzz.py"]
    content = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(content).hexdigest()[:12]
