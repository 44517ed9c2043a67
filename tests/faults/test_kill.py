"""Test SIGKILL at every system call of a commit and at random moments, and resume to equal bytes.

.venv/bin/pytest tests/faults/test_kill.py            a part
.venv/bin/pytest tests/faults/test_kill.py -m slow    200 random moments, one and four writers
"""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import files_of
from tests.faults.builds import CALLS, build, build_and_die, in_child, start, undisturbed


@pytest.mark.parametrize("file", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("call", "number"), CALLS)
def test_killed_at_a_call_and_resumed(tmp_path, call, number, file):
    expected = undisturbed(tmp_path / "whole")
    child = in_child(build_and_die, tmp_path / "killed", call, number, file)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    build(tmp_path / "killed")
    assert files_of(tmp_path / "killed") == expected


def killed_at_random(tmp_path: Path, moments: int, writers: int, seed: int) -> int:
    """Kills a group of writers at each of many random moments; returns writers killed at work.

    Moments are spread over the time that an undisturbed group takes on this machine, which follows
    the machine's speed: other tests may run beside this one.
    """
    expected = undisturbed(tmp_path / "whole")
    begun = time.monotonic()
    for child in [start(tmp_path / "timed", reverse=bool(i % 2)) for i in range(writers)]:
        child.join(60)
    chance, hits, longest = random.Random(seed), 0, time.monotonic() - begun
    for moment in range(moments):
        root = tmp_path / f"killed-{moment}"
        children = [start(root, reverse=bool(i % 2)) for i in range(writers)]
        time.sleep(chance.uniform(0, longest))
        alive = sum(child.is_alive() for child in children)
        hits += alive
        longest *= {0: 0.95, writers: 1.03}.get(alive, 1.0)
        for child in children:
            child.kill()
        for child in children:
            child.join(60)
        leftover = (
            {n: d for n, d in files_of(root).items() if ".tmp-" not in n} if root.exists() else {}
        )
        assert leftover.items() <= expected.items(), "a file stood under its name but not whole"
        build(root)
        assert files_of(root) == expected
    return hits


@pytest.mark.parametrize("writers", [1, 4])
@pytest.mark.parametrize(
    ("moments", "least"), [(12, 1), pytest.param(200, 51, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments(tmp_path, writers, moments, least):
    assert killed_at_random(tmp_path, moments, writers, seed=writers) >= least
