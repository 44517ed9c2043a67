"""A process that runs chat templates, so that a hostile template costs an error and nothing else.

Templates are programs from a tokenizer's folder. transformers runs them in Jinja's sandbox, which
keeps them from files and from Python, but not from endless loops or from gigabytes of text. Limits
of the operating system do: the process ends when one rendering takes more than `CPU_SECONDS` of
processor time, and may take `MEMORY_BYTES` more than it has at its start. One process serves all
conversations that a process packs; it ends with the process that started it, or after
`IDLE_SECONDS` without a conversation, and is started again when there is one.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sparselogits.errors import CorpusError

CPU_SECONDS = 5
"""Processor time that one rendering may take; usual ones take a millisecond."""
MEMORY_BYTES = 1 << 30
"""Memory that renderings may take."""
IDLE_SECONDS = 30
"""Time after which an idle process ends: packing is over long before a build is."""

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from sparselogits.corpus.rendering import serve; serve(*map(int, sys.argv[2:]))"
)
_lock = threading.Lock()
_running: _Running | None = None


class _Running:
    """A started process and the template that it was given last."""

    def __init__(self) -> None:
        limits = [str(CPU_SECONDS), str(MEMORY_BYTES), str(IDLE_SECONDS)]
        self.owner = os.getpid()
        self.template: Mapping[str, Any] | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def send(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request; {} if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()
            if line := self.process.stdout.readline():
                answer: dict[str, Any] = json.loads(line)
                return answer
        return {}

    def end(self) -> int:
        """Shut the process down and return its exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            status = self.process.wait(timeout=CPU_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process.stdout.close()
        return status


def ask(template: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `rendering.Renderer.rendered` makes of a request, in another process.

    Raises:
        CorpusError: a value that JSON cannot hold, or a template that exceeded its limits.
    """
    global _running
    with _lock:
        if _running is not None and _running.owner != os.getpid():
            _running = None  # belongs to the process that this one was forked from
        try:
            answer, status = _answer(template, request)
            if status == 0:  # it ended for idleness in the moment of the request
                answer, status = _answer(template, request)
        except (TypeError, ValueError, RecursionError) as error:
            raise CorpusError(f"it holds a value that is no JSON ({error})") from error
        except BaseException:
            # interrupted between a request and its answer: the next answer would be to this one
            if _running is not None:
                _running.process.kill()
                _running.end()
                _running = None
            raise
    if not answer:
        raise CorpusError(
            f"the chat template was stopped (exit status {status}): one rendering may take "
            f"{CPU_SECONDS} s of processor time and {MEMORY_BYTES >> 20} MiB of memory. Look at "
            "the template's loops, or use a tokenizer with another template"
        )
    return answer


def _answer(
    template: Mapping[str, Any], request: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """Return the answer of the running process, or {} and the exit status of one that ended."""
    global _running
    if _running is None or _running.process.poll() is not None:
        shut_down()
        _running = _Running()
    if _running.template != template:
        _running.template = template
        _running.send({"template": template})
    answer = _running.send(request)
    if answer:
        return answer, None
    status, _running = _running.end(), None
    return {}, status


@atexit.register
def shut_down() -> None:
    """Shut this process's renderer down; the next request starts another."""
    global _running
    if _running is not None and _running.owner == os.getpid():
        _running.end()
    _running = None
