"""Run all writing commands on a disk with too little free space, at twenty levels.

    python -m tests.faults.run --only full_disk         (as root: a tmpfs is mounted)

The first level leaves no space, the last a little less than the command needs. The command must
succeed, or end with one message that names a path and says what to do; it must leave no temporary
file, and succeed when space is free again.
"""

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparselogits.store import Cache, export, verify
from tests.faults.commands import Bench, Child, run
from tests.faults.two_writers import require_clean

PAGE = 4096
SIZE = 24 << 20

Words = Callable[[Bench, Path], tuple[str, ...]]


def _damaged(bench: Bench, disk: Path) -> Path:
    cache = bench.copy(bench.built(), disk / "c")
    first = min((cache / "shards").iterdir())
    first.write_bytes(first.read_bytes()[:-100])
    return cache


def _collected(bench: Bench) -> str:
    path = bench.folder / "collected.parquet"
    if not path.exists():
        folder = bench.folder / "topk"
        export(Cache.open(bench.built()), folder, "topk", k=4)
        pq.write_table(pa.concat_tables([pq.read_table(p) for p in sorted(folder.iterdir())]), path)
    return str(path)


def _recipe(bench: Bench, disk: Path) -> str:
    path = bench.folder / "recipe.yaml"
    recipe = {
        "teacher": str(bench.teacher),
        "data": str(bench.texts[2]),
        "out": str(disk / "out"),
        "window": 16,
        "holdout": 0.2,
        "heldout_windows": 2,
        "seeds": [0],
        "students": {"tiny": {"layers": 1, "hidden_size": 16, "heads": 2}},
        "methods": [{"method": "ce"}, {"method": "sparse", "sampler": "systematic", "budget": 3}],
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 2},
        "title": "x",
    }
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return str(path)


def _compared(bench: Bench) -> Path:
    out = bench.folder / "compared"
    if not out.exists():
        words = ("compare", _recipe(bench, bench.folder), "--out", str(out), "--device", "cpu")
        child = run(words, bench.folder / "log")
        assert child.code == 0, child.said
    return out


COMMANDS: dict[str, Words] = {
    "cache": lambda b, d: b.cache(0, d / "c"),
    "cache --append": lambda b, d: b.cache(1, b.copy(b.built(), d / "c"), "--append"),
    "repair": lambda b, d: ("repair", str(_damaged(b, d))),
    "merge": lambda b, d: ("merge", str(b.built()), "--out", str(d / "c")),
    "push": lambda b, d: ("push", str(b.built()), f"file://{d}/c"),
    "export lists": lambda b, d: (
        *("export", str(b.built()), "--out", str(d / "o"), "--format", "lists"),
    ),
    "export datasets": lambda b, d: (
        *("export", str(b.built()), "--out", str(d / "o"), "--format", "datasets"),
    ),
    "export topk": lambda b, d: (
        *("export", str(b.built()), "--out", str(d / "o"), "--format", "topk", "--k", "4"),
    ),
    "import": lambda b, d: (
        *("import", _collected(b), "--tokenizer", str(b.teacher)),
        *("--vocab-size", "520", "--out", str(d / "c")),
    ),
    "train": lambda b, d: b.train(b.built(), d / "run"),
    "shrink": lambda b, d: (
        *("shrink", str(b.teacher), "--intermediate-size", "32", "--data", str(b.texts[2])),
        *("--windows", "2", "--window", "16", "--out", str(d / "o"), "--device", "cpu"),
    ),
    "gradients": lambda b, d: (
        *("gradients", str(b.teacher), "--teacher", str(b.teacher), "--data", str(b.texts[2])),
        *("--window", "16", "--device", "cpu", "--out", str(d / "o.json")),
    ),
    "view": lambda b, d: ("view", str(b.built()), "--out", str(d / "o.html")),
    "report": lambda b, d: ("report", str(_compared(b)), "--out", str(d / "o")),
    "compare": lambda b, d: ("compare", _recipe(b, d), "--device", "cpu"),
}


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """Mount a tmpfs.

    Raises:
        subprocess.CalledProcessError: If this user may not mount one.
    """
    path.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path))
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield path
    finally:
        subprocess.run(("umount", "-l", str(path)), check=True)


def full_disk(
    folder: Path, levels: int = 20, only: tuple[str, ...] = tuple(COMMANDS)
) -> dict[str, Any]:
    """Run every command at every level, and return the number of outcomes of each kind."""
    bench, found = Bench.make(folder), {}
    for name in only:
        with small_disk(folder / "disk") as disk:
            words = COMMANDS[name](bench, disk)
            before = _used(disk)
            child = run(words, folder / "log")
            assert child.code == 0, child.said
            needs = _used(disk) - before
            outcomes: Counter[str] = Counter()
            for level in range(levels):
                _empty(disk)
                words = COMMANDS[name](bench, disk)
                room = level * needs // levels // PAGE * PAGE
                outcomes[_at_level(words, disk, room, folder / "log")] += 1
            found[name] = {"needs_bytes": needs, **dict(sorted(outcomes.items()))}
        (folder / "disk").rmdir()
    return found


def _at_level(words: tuple[str, ...], disk: Path, room: int, log: Path) -> str:
    ballast = disk / ".ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, free - room))
    child = run(words, log)
    require_clean(child)
    if child.code:
        _require_message(child, disk)
    left = [path for path in disk.rglob("*") if path.name.startswith(".tmp-")]
    assert not left, (words, left)
    ballast.unlink()
    again = run(words, log)
    assert again.code == 0, (words, room, child.said, again.said)
    if (disk / "c/cache.json").exists() and words[0] != "repair":
        assert verify(Cache.open(disk / "c")).ok
    return "refused, then done" if child.code else "done"


def _require_message(child: Child, disk: Path) -> None:
    said = child.said
    assert "No space left" in said, said
    assert str(disk) in said, said
    assert "oom" in said or "space" in said, said


def _used(disk: Path) -> int:
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _empty(disk: Path) -> None:
    for path in disk.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
