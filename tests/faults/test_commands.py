"""A share of what `make faults` does with whole commands: two writers, full disks.

Both need a Python that has everything imported, and fork from it, so they run in one of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TWO_WRITERS = """
import sys
from pathlib import Path
from tests.faults.two_writers import two_writers
print(two_writers(Path(sys.argv[1]), 2, seed=1))
"""

FULL_DISK = """
import sys
from pathlib import Path
from tests.faults.full_disk import full_disk
print(full_disk(Path(sys.argv[1]), 2, ("cache", "push", "train")))
"""


@pytest.mark.parametrize("script", [TWO_WRITERS, FULL_DISK], ids=["two writers", "full disk"])
def test_a_share(tmp_path: Path, script: str) -> None:
    if script is FULL_DISK and os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "mount" in done.stderr and "CalledProcessError" in done.stderr:
        pytest.skip("mounting a tmpfs needs root")
    assert done.returncode == 0, done.stderr
