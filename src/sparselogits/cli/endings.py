"""How a command ends: with its result, with one message, or interrupted; without a traceback.

Exit codes: 0 done, 2 a mistake or a refusal that the message explains, 130 interrupted, 1 a bug of
ours. A bug is one message too: its traceback goes to a file, because the run may have been long and
because what it quotes may be a stranger's. `--debug`, anywhere on the command line, shows the
traceback of everything.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sparselogits.console import messages, styled
from sparselogits.errors import SparseLogitsError, SparseLogitsWarning, reason_of
from sparselogits.files import user_cache, write_whole
from sparselogits.untrusted import printable

MISTAKE, BUG, INTERRUPTED = 2, 1, 130

_KEPT = "what was finished is kept, and the same command goes on from there"
_AFTERWARDS = {
    "cache": _KEPT,
    "compare": _KEPT,
    "demo": _KEPT,
    "merge": _KEPT,
    "push": _KEPT,
    "repair": "shards already set aside stay so; the same command looks at the rest",
    "train": "with save_steps in its recipe the same command goes on from the last checkpoint, "
    "else it starts again",
}
_NOTHING = "nothing was changed, and the same command starts again"

_ALLOW = "make it readable and writable for this user, or choose another place"
_NEXT_STEPS = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "a file is in the way of a folder: move it, or choose another place",
    errno.ENOTDIR: "a file is in the way of a folder: move it, or choose another place",
    errno.EISDIR: "a folder is there where a file was expected: check the path",
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EROFS: _ALLOW,
    errno.ENOSPC: "free some space there, then give the same command again",
    errno.EDQUOT: "free some space there, then give the same command again",
}


def end_of(command_line: Callable[..., Any]) -> NoReturn:
    """Run a command line and leave the process as this module's head says."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal or a pipe without UTF-8 shows a question mark in the place of ± or an arrow
        sys.stdout.reconfigure(errors="replace")
    words = sys.argv[1:]
    debug = "--debug" in _before_dashes(words)
    state: dict[str, Any] = {"debug": debug}
    warnings.showwarning = _show_warning
    arguments = [word for word in words if word != "--debug"] if debug else words
    try:
        command_line(args=arguments, obj=state)
        sys.exit(0)
    except SystemExit as stop:  # how typer ends, a usage error (2) or Ctrl-C (130) included
        if stop.code == INTERRUPTED:
            _say_interrupted(state)
        raise
    except KeyboardInterrupt as error:
        if debug:
            messages.print("".join(traceback.format_exception(error)), soft_wrap=True)
        _say_interrupted(state)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            messages.print("".join(traceback.format_exception(error)), soft_wrap=True)
        said = explanation(error)
        if said is None:
            messages.print(styled("bug:", "bold red", f" {_report_of(error)}"), soft_wrap=True)
            sys.exit(BUG)
        messages.print(styled("error:", "bold red", f" {said}"), soft_wrap=True)
        sys.exit(MISTAKE)


def explanation(error: BaseException) -> str | None:
    """What a user is told of an error: the cause and the next step. None for a bug."""
    if isinstance(error, SparseLogitsError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        step = _NEXT_STEPS.get(error.errno or 0, "see to it, then give the same command again")
        return f"{error.filename}: {error.strerror}; {step}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        first = (str(error).strip() or "out of memory").splitlines()[0]
        return (
            f"{first}. Use a smaller --batch (in a recipe per_device_train_batch_size, with more "
            "gradient_accumulation_steps), a shorter --window, or a smaller --dtype"
        )
    return None


def _report_of(error: BaseException) -> str:
    """Say what an unexpected error is, and where its traceback is to be found."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "sparselogits" in Path(frame.filename).parts]
    place = ours[-1] if ours else frames[-1]
    what = f"{type(error).__name__}: {reason_of(error).splitlines()[0]}"
    where = f"{Path(place.filename).name}, line {place.lineno}, in {place.name}"
    said = f"sparselogits failed in a way it does not foresee: {printable(what, 500)} ({where})."
    file = user_cache() / "bugs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        write_whole(file, printable("".join(traceback.format_exception(error))))
    except OSError:
        return f"{said} Please report this, with the command and what --debug shows"
    return f"{said} Please report this, with the command and the traceback in {file}"


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _say_interrupted(state: dict[str, Any]) -> None:
    # a second Ctrl-C while threads and files are let go of ends at once: commits are atomic
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    command = state.get("command")
    said = _AFTERWARDS.get(command, _NOTHING) if command else _NOTHING
    messages.print(f"\ninterrupted; {said}", soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SparseLogitsWarning):
        messages.print(styled("note:", "yellow", f" {message}"), soft_wrap=True)


def _before_dashes(words: list[str]) -> list[str]:
    return words[: words.index("--")] if "--" in words else words
