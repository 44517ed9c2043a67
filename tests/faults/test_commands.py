"""Test a part of the fault runs with whole commands: two writers, full disks.

Both fork from a process that has imported all modules, so they run in a separate process.
"""

from pathlib import Path

from tests.conftest import run_python

SHARE = """
import os, subprocess, sys
from pathlib import Path
from tests.faults.full_disk import full_disk
from tests.faults.two_writers import two_writers

folder = Path(sys.argv[1])
print(two_writers(folder / "pairs", 1, seed=1))
try:
    print(full_disk(folder / "disks", 2, ("cache", "push", "train")))
except subprocess.CalledProcessError as error:
    if os.geteuid() == 0 and "mount" not in error.cmd:  # mounting a tmpfs needs root
        raise
"""


def test_a_share(tmp_path):
    for name in ("pairs", "disks"):
        (tmp_path / name).mkdir()
    done = run_python("-c", SHARE, tmp_path, cwd=Path(__file__).parents[2], timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("both done") + done.stdout.count("one refused") == 5, done.stdout
