"""End a command with its result, with one message, or as interrupted, without a traceback.

Exit codes: 0 success, 2 an error that the message explains, 130 interrupted, 1 a bug of this
package. The traceback of a bug goes to a file, because the run may have been long and the traceback
may quote text of unknown origin. `--debug`, anywhere on the command line, shows tracebacks.
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

_KEPT = "finished parts are kept, and the same command continues from there"
_AFTERWARDS = {
    "cache": _KEPT,
    "compare": _KEPT,
    "demo": _KEPT,
    "merge": _KEPT,
    "push": _KEPT,
    "repair": "shards that were set aside stay there; the same command checks the others",
    "train": "with save_steps in its recipe the same command continues from the last checkpoint, "
    "else it starts again",
}
_NOTHING = "nothing was changed, and the same command starts again"

_ALLOW = "make it readable and writable for this user, or choose another place"
_NEXT_STEPS = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "a file is in the way of a folder: move it, or choose another place",
    errno.ENOTDIR: "a file is in the way of a folder: move it, or choose another place",
    errno.EISDIR: "this is a folder, and a file was expected: check the path",
    errno.EACCES: _ALLOW,
    errno.EPERM: _ALLOW,
    errno.EROFS: _ALLOW,
    errno.ENOSPC: "free some space there, then give the same command again",
    errno.EDQUOT: "free some space there, then give the same command again",
}


def end_of(command_line: Callable[..., Any]) -> NoReturn:
    """Run a command line, and end the process as the module's docstring says."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # without UTF-8 a question mark stands for ± or an arrow
        sys.stdout.reconfigure(errors="replace")
    words = sys.argv[1:]
    debug = "--debug" in _before_dashes(words)
    state: dict[str, Any] = {"debug": debug}
    warnings.showwarning = _show_warning
    arguments = [word for word in words if word != "--debug"] if debug else words
    try:
        command_line(args=arguments, obj=state)
        sys.exit(0)
    except SystemExit as stop:  # typer ends so, with 2 for a usage error and 130 for Ctrl-C
        if stop.code == INTERRUPTED:
            _say_interrupted(state)
        raise
    except KeyboardInterrupt as error:
        if debug:
            messages.print("".join(traceback.format_exception(error)), soft_wrap=True)
        _say_interrupted(state)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output has ended, as in `| head`
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
    """Return the message for an error, with cause and next step; None for a bug."""
    if isinstance(error, SparseLogitsError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        step = _NEXT_STEPS.get(error.errno or 0, "solve this, then give the same command again")
        return f"{error.filename}: {error.strerror}; {step}"
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        first = (str(error).strip() or "out of memory").splitlines()[0]
        return (
            f"{first}. Use a smaller --batch (in a recipe per_device_train_batch_size, with more "
            "gradient_accumulation_steps), a shorter --window, or a smaller --dtype"
        )
    return None


def _report_of(error: BaseException) -> str:
    """Return the message for an unexpected error, and write its traceback to a file."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "sparselogits" in Path(frame.filename).parts]
    place = ours[-1] if ours else frames[-1]
    what = f"{type(error).__name__}: {reason_of(error).splitlines()[0]}"
    where = f"{Path(place.filename).name}, line {place.lineno}, in {place.name}"
    said = f"sparselogits failed with an unexpected error: {printable(what, 500)} ({where})."
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
    # a second Ctrl-C during clean-up ends the process at once; commits are atomic
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    command = state.get("command")
    said = _AFTERWARDS.get(command, _NOTHING) if command else _NOTHING
    messages.print(f"\ninterrupted; {said}", soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SparseLogitsWarning):
        messages.print(styled("note:", "yellow", f" {message}"), soft_wrap=True)


def _before_dashes(words: list[str]) -> list[str]:
    return words[: words.index("--")] if "--" in words else words
