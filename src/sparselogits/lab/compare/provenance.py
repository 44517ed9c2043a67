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
    """Return `git describe --always --dirty` for this file's folder; "unknown" if Git fails."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
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
