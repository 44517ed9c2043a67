"""Run `sparselogits` in forks of a process that has imported all modules, which takes seconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from sparselogits.__main__ import main


def fork_command(
    words: Sequence[str],
    said: Path,
    before: Callable[[], None] = lambda: None,
    after: Callable[[int], int] = lambda code: code,
) -> int:
    """Start a command in a fork, with its output in a file; return the id of its process.

    `before` runs in the fork before the command, and `after` turns its exit code into the fork's.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.argv = ["sparselogits", *words]
        before()
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)  # else a profile function could interrupt the following lines
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(after(code))


def wait_for(child: int, seconds: float = float("inf")) -> int:
    """Return the exit code of a fork, or minus the signal that ended it; kill it after a time."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG if end < float("inf") else 0)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.005)
