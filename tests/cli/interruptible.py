"""Run commands in forks of one process, each with a real Ctrl-C at a given moment.

    python -m tests.cli.interruptible < cases.json

A moment is the n-th call of a function, `module:function:n`, counted by a profile function in the
main thread that then raises SIGINT as a terminal would. So no test waits for a time, and
each moment is reached on fast and on slow machines. The parent imports all modules and runs no
command: a fork is fast, and inherits no threads.

`any:n` is the n-th call of any function, to interrupt a command at many moments:

    python -m tests.cli.interruptible --sweep 40 sparselogits verify CACHE

prints the moments after which the command did not exit cleanly.
"""

import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import TypedDict

from tests.forks import fork_command, wait_for

ANY = "any"
PASSED = 77
"""Exit code of a command that ended before the moment was reached."""


class Case(TypedDict):
    """Arguments of a command, its working folder, the moment of Ctrl-C, and its output file."""

    words: list[str]
    folder: str
    moment: str
    said: str


def load() -> None:
    """Import all modules of the commands, so that forks share them."""
    import torch
    import transformers.trainer  # noqa: F401

    import sparselogits.caching
    import sparselogits.cli
    import sparselogits.evaluate
    import sparselogits.lab.compare
    import sparselogits.lab.demo
    import sparselogits.lab.report
    import sparselogits.train  # noqa: F401

    torch.set_num_threads(1)


class Interruption:
    """Profile function that raises SIGINT once, at a moment."""

    def __init__(self, moment: str) -> None:
        *place, nth = moment.split(":")
        self.nth, self.seen = int(nth), 0
        self._name = None if place == [ANY] else place[-1]
        file = place[0].replace(".", "/")
        self._ends = (f"/{file}.py", f"/{file}/__init__.py")

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        if self._name is not None:
            code = frame.f_code
            if code.co_name != self._name or not code.co_filename.endswith(self._ends):
                return
        self.seen += 1
        if self.seen == self.nth:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)


def carry_out(case: Case) -> int:
    """Run a case in a fork; return its exit code, or minus the signal that killed it."""
    interruption = Interruption(case["moment"])

    def before() -> None:
        os.chdir(case["folder"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.setprofile(interruption)

    def after(code: int) -> int:
        if interruption.seen < interruption.nth:
            Path(f"{case['said']}.calls").write_text(str(interruption.seen))
            return PASSED
        return code

    return wait_for(fork_command(case["words"], Path(case["said"]), before, after))


def sweep(times: int, words: list[str]) -> None:
    """Interrupt a command at evenly spread moments; `{out}` is a new path each time."""
    with tempfile.TemporaryDirectory() as folder:

        def carried_out(number: int, nth: int) -> tuple[int, str]:
            told = [word.replace("{out}", f"{folder}/{number}") for word in words]
            said = Path(folder) / "said"
            case = Case(words=told, folder=".", moment=f"{ANY}:{nth}", said=str(said))
            return carry_out(case), said.read_text()

        carried_out(0, sys.maxsize)
        calls = int((Path(folder) / "said.calls").read_text())
        clean = 0
        for number in range(1, times + 1):
            nth = round(calls * (number - 0.5) / times)
            code, said = carried_out(number, nth)
            if code == 130 and "interrupted; " in said and "Traceback" not in said:
                clean += 1
            else:
                print(f"--- call {nth} of {calls}: exit code {code}\n{said}", flush=True)
        print(f"{clean} of {times} ended cleanly: {' '.join(words)}", flush=True)


def main() -> None:
    """Run cases from standard input, one per line, and print one exit code per line."""
    load()
    if sys.argv[1:2] == ["--sweep"]:
        sweep(int(sys.argv[2]), sys.argv[4:])
        return
    for line in sys.stdin:
        print(carry_out(json.loads(line)), flush=True)
    os._exit(0)  # a normal exit takes seconds to unload the modules


if __name__ == "__main__":
    main()
