"""Render conversations to text with a tokenizer's chat template, in a separate process.

A conversation is rendered as a whole by transformers' renderer, as in `apply_chat_template`, but
with a fixed date, and with content in a form that the template supports; `rendering` also
determines which characters are in the loss mask.

Templates are untrusted programs from a tokenizer's folder. transformers runs them in Jinja's
sandbox, which blocks access to files and to Python, but not endless loops or gigabytes of text.
Therefore the operating system, if it can, limits the processor time and the memory of the rendering
process. A packing process has one rendering process at a time; if the rendering process has ended,
the next conversation starts another one.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sparselogits.corpus.conversation import Conversation
from sparselogits.errors import CorpusError
from sparselogits.identity import canonical_json

CPU_SECONDS = 5
"""Maximum processor time per rendering, in seconds; a typical rendering takes a millisecond."""
MEMORY_BYTES = 1 << 30
"""Maximum memory, in bytes, that the rendering process may allocate after its start."""
IDLE_SECONDS = 30
"""Seconds without a conversation after which the rendering process ends."""

_RULES = 2
"""Version of the rules that convert conversations to tokens; part of a template's fingerprint."""


class Rendered(NamedTuple):
    """Rendered text of a conversation, and the characters in its loss mask."""

    text: str
    """Text of the whole conversation."""
    learnt: list[tuple[int, int]]
    """Ranges [start, stop) of characters in the loss mask, ascending; empty if not requested."""


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template and special tokens of a tokenizer, as plain values that can be pickled."""

    template: str
    """Jinja source of the template."""
    with_tools: str
    """Jinja source of the template for records with tools; usually equal to `template`."""
    special_tokens: tuple[tuple[str, Any], ...]
    """Names and values of the special tokens, such as `eos_token`, which are template variables."""
    closing: tuple[str, ...] = ()
    """Texts of the tokenizer's added tokens, each of which may end a turn."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """Return the chat template of a transformers tokenizer; None if the tokenizer has none.

        Raises:
            CorpusError: the tokenizer has several templates, and none of them is the default.
        """
        if not getattr(tokenizer, "chat_template", None):
            return None
        try:
            template: str = tokenizer.get_chat_template()
            with_tools: str = tokenizer.get_chat_template(tools=[])
        except ValueError as error:
            raise CorpusError(
                f"the tokenizer has several chat templates and no default: {error}. Set its "
                "`chat_template` to one of them"
            ) from error
        special = tuple(sorted(tokenizer.special_tokens_map.items()))
        closing = sorted(map(str, getattr(tokenizer, "added_tokens_decoder", {}).values()))
        return cls(template, with_tools, special, tuple(closing))

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of all fields and of the version of the conversion rules."""
        described = [_RULES, self.template, self.with_tools, dict(self.special_tokens)]
        return hashlib.sha256(canonical_json([*described, list(self.closing)])).hexdigest()

    def unread(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are optional inputs and that this template does not contain.

        The optional inputs are `tools` and `documents`; a field of a record with a returned name is
        not meant for the template.
        """
        inputs = {"tools", "documents"} & set(names)
        return [name for name in inputs if name not in self.template + self.with_tools]

    def rendered(self, conversation: Conversation, *, masked: bool) -> Rendered:
        """Render a conversation to text; `masked` requests the loss mask.

        Raises:
            CorpusError: the template raises an error or exceeds its limits, a value cannot be
                written as JSON, or the text with targets cannot be located in the output.
        """
        answer = _ask(asdict(self), {**asdict(conversation), "masked": masked})
        if "error" in answer:
            raise CorpusError(str(answer["error"]))
        return Rendered(answer["text"], [(start, stop) for start, stop in answer["learnt"]])


# --- the rendering process ---

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from sparselogits.corpus.rendering import serve; serve(*map(int, sys.argv[2:]))"
)
_lock = threading.Lock()
_running: _Running | None = None


class _Running:
    """Running rendering process, and the template last sent to it."""

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
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout

    def send(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer; {} if the process has ended."""
        with suppress(BrokenPipeError):
            self._requests.write(json.dumps(value).encode() + b"\n")
            self._requests.flush()
            line = self._answers.readline()
            if line.endswith(b"\n"):  # otherwise the process ended, perhaps within an answer
                answer: dict[str, Any] = json.loads(line)
                return answer
        return {}

    def end(self) -> int:
        """Shut down the process and return its exit status."""
        with suppress(OSError):
            self._requests.close()
        try:
            status = self.process.wait(timeout=CPU_SECONDS + 5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._answers.close()
        return status


def _ask(template: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer of the rendering process to a request for `Renderer.rendered`."""
    global _running
    with _lock:
        if _running is not None and _running.owner != os.getpid():
            _running = None  # belongs to the process that this one was forked from
        try:
            for _ in range(2):
                if _running is None or _running.process.poll() is not None:
                    shut_down()
                    _running = _Running()
                if _running.template != template:
                    _running.template = template
                    _running.send({"template": template})
                if answer := _running.send(request):
                    return answer
                status, _running = _running.end(), None
                if status:
                    break  # otherwise the idle process ended at the time of the request
        except (TypeError, ValueError, RecursionError) as error:
            raise CorpusError(
                f"the record contains a value that cannot be written as JSON ({error}); remove the "
                "value"
            ) from error
        except BaseException:
            # after an interruption, the next request would receive the answer to this one
            if _running is not None:
                _running.process.kill()
                _running.end()
                _running = None
            raise
    raise CorpusError(
        f"the chat template was stopped (exit status {status}): one rendering may take "
        f"{CPU_SECONDS} s of processor time and {MEMORY_BYTES >> 20} MiB of memory. Check the "
        "template's loops, or use a tokenizer with another template"
    )


@atexit.register
def shut_down() -> None:
    """Shut down the rendering process, if there is one; the next request starts another one."""
    global _running
    if _running is not None and _running.owner == os.getpid():
        _running.end()
    _running = None
