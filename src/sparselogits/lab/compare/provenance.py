"""Determine the commit, the versions and the machine with which results are computed."""

from __future__ import annotations

import datetime
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Return the commit, versions, GPU or processor, number of threads and date, for results."""
    return {
        "commit": commit(),
        "sparselogits": version("sparselogits"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


@cache
def commit() -> str:
    """Return the commit of the source tree of sparselogits; see `commit_of`."""
    return commit_of(Path(__file__).resolve())


def commit_of(file: Path) -> str:
    """Return the commit of the source tree of a file of `src/sparselogits/lab/compare`.

    The commit is that of `git describe --always --dirty`. The result is "unknown" for an installed
    file, even if it is inside the repository of another project, and if Git fails.
    """
    tree = file.parents[4]
    git = ["git", f"--git-dir={tree / '.git'}", f"--work-tree={tree}"]
    try:
        for command in (
            ["ls-files", "--error-unmatch", str(file)],
            ["describe", "--always", "--dirty"],
        ):
            found = subprocess.run(
                [*git, *command], cwd=tree, capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
