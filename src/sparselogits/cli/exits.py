"""Run a command line and end the process with one message and an exit code.

Exit codes: 0 success, 2 an error that the message explains, 130 interrupted, 1 a bug in this
package. The traceback of a bug is written to a file, because the run may have been long and the
traceback may quote text of unknown origin. The option `--debug`, anywhere before `--` on the
command line, prints the traceback of an exception.
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
from sparselogits.files import user_cache, with_home, write_whole
from sparselogits.untrusted import printable

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
"""Exit codes for an error that the message explains, for a bug, and for an interruption."""

_RESUMES = "finished parts are kept, and the same command continues from there"
_AFTER_INTERRUPTION = {
    "cache": _RESUMES,
    "compare": _RESUMES,
    "demo": _RESUMES,
    "merge": _RESUMES,
    "push": _RESUMES,
    "retokenize": _RESUMES,
    "repair": "shards already moved stay where they are; the same command checks the others",
    "train": "if the recipe sets save_steps, the same command continues from the last checkpoint, "
    "otherwise it starts again",
}
"""State on disk after an interruption, and the effect of running the command again, by command."""

_STARTS_AGAIN = "nothing was changed, and the same command starts again"
_PERMISSIONS = "make it readable and writable for this user, or choose another path"
_FILE_IN_THE_WAY = "a file exists where a folder is needed: move it, or choose another path"
_NO_SPACE = "free some space there, then run the same command again"
_NEXT_STEPS = {
    errno.ENOENT: "check the path",
    errno.EEXIST: _FILE_IN_THE_WAY,
    errno.ENOTDIR: _FILE_IN_THE_WAY,
    errno.EISDIR: "a file was expected, found a folder: check the path",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: _PERMISSIONS,
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
}
"""Advice to the user, by `errno` of an operating-system error."""


def run_and_exit(command_line: Callable[..., Any]) -> NoReturn:
    """Run a command line, report an error or interruption, and exit with the matching code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # an output encoding without ± or arrows prints question marks instead
        sys.stdout.reconfigure(errors="replace")
    words = sys.argv[1:]
    options = words[: words.index("--")] if "--" in words else words  # "--" ends the options
    debug = "--debug" in options
    state: dict[str, Any] = {"debug": debug}
    warnings.showwarning = _show_warning
    arguments = [word for word in words if word != "--debug"] if debug else words
    try:
        command_line(args=[_with_home(word) for word in arguments], obj=state)
        sys.exit(0)
    except SystemExit as stop:  # typer exits with 2 for a usage error and 130 for Ctrl-C
        if stop.code == INTERRUPTED:
            _print_interrupted(state)
        raise
    except KeyboardInterrupt as error:
        if debug:
            messages.print("".join(traceback.format_exception(error)), soft_wrap=True)
        _print_interrupted(state)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has exited, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if debug:
            messages.print("".join(traceback.format_exception(error)), soft_wrap=True)
        explained = explanation(error)
        if explained is None:
            messages.print(styled("bug:", "bold red", f" {_report_of(error)}"), soft_wrap=True)
            sys.exit(BUG)
        messages.print(styled("error:", "bold red", f" {explained}"), soft_wrap=True)
        sys.exit(USER_ERROR)


def _with_home(word: str) -> str:
    """Return an argument with the home folder in place of `~`, also after the `=` of an option."""
    name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{name}{equals}{with_home(value)}"


def explanation(error: BaseException) -> str | None:
    """Return the message for an error, with its cause and the next step; None for a bug."""
    if isinstance(error, SparseLogitsError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        step = _NEXT_STEPS.get(error.errno or 0, "resolve this, then run the same command again")
        return f"{error.filename}: {error.strerror}; {step}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        first = (str(error).strip() or "out of memory").splitlines()[0]
        return (
            f"{first}. Use a smaller --batch (in a recipe per_device_train_batch_size, with more "
            "gradient_accumulation_steps), a shorter --window, or a smaller --dtype"
        )
    return None


def _report_of(error: BaseException) -> str:
    """Write the traceback of an unexpected error to a file, and return the message for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if "sparselogits" in Path(frame.filename).parts]
    frame = own_frames[-1] if own_frames else frames[-1]
    what = f"{type(error).__name__}: {reason_of(error).splitlines()[0]}"
    where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    message = f"sparselogits failed with an unexpected error: {printable(what, 500)} ({where})."
    file = user_cache() / "bugs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        write_whole(file, printable("".join(traceback.format_exception(error))))
    except SparseLogitsError:  # the file cannot be written
        return f"{message} Please report it with the command and the output of --debug"
    return f"{message} Please report it with the command and the traceback in {file}"


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch raised an error because it could not allocate memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _print_interrupted(state: dict[str, Any]) -> None:
    """Print the state on disk after an interruption, and how to continue."""
    # a second Ctrl-C during clean-up ends the process at once; commits are atomic
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    advice = _AFTER_INTERRUPTION.get(state.get("command") or "", _STARTS_AGAIN)
    messages.print(f"\ninterrupted; {advice}", soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print the warnings of this package as notes; ignore those of other packages."""
    if issubclass(category, SparseLogitsWarning):
        messages.print(styled("note:", "yellow", f" {message}"), soft_wrap=True)
