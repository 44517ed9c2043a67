"""Render a conversation with a chat template, and locate the assistant's turns in the text.

The text is the template's rendering of the whole conversation. The loss mask, as ranges of
characters, is determined by the first of these methods that applies:

- **Generation blocks.** A template with `{% generation %}` blocks marks the generated text. This
  method does not apply to records of `prompt` and `completion`.
- **Prefixes.** Most templates append turns, so the rendering of the first messages is a prefix of
  the whole text. An assistant's turn is the text after the rendering of the previous messages with
  `add_generation_prompt`, including the end of the turn.
- **Markers.** Templates of reasoning models rewrite earlier turns (they remove earlier thoughts),
  so the rendering of the first messages is not a prefix of the whole text. Then a marker of digits
  is inserted into a message; the marker's position in the rendering is that of the message. The
  text from there to the end of the turn, and the text before the answer, are taken from renderings
  of the first messages. If the template cannot render the first messages alone (an assistant's
  greeting before the first question), both texts are taken from a conversation of one question and
  one answer.

`chat` runs this module in a separate process.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Message = dict[str, Any]
"""Message of a conversation, with `role`, usually `content`, and further fields."""

CharacterRange = tuple[int, int]
"""Range [start, stop) of characters."""

OUTPUT_CHARACTERS = 4 << 20
"""Maximum length of a rendering, in characters, beyond `OUTPUT_FACTOR` times the input's length."""

OUTPUT_FACTOR = 16
"""Number of characters that a rendering may have per input character; see `OUTPUT_CHARACTERS`."""

_MESSAGE_CHARACTERS = 600
_OPTIONS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversations",
    "return_assistant_tokens_mask",
)

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SAME_DAY = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') "
    "| replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') "
    "| replace('%y', '24') | replace('%j', '208') | replace('%A', 'Friday') "
    "| replace('%a', 'Fri') | replace('%H', '12') | replace('%I', '12') | replace('%p', 'PM') "
    "| replace('%M', '00') | replace('%S', '00') }}{% endmacro +%}"
)
"""Macro with a fixed date for templates that write today's date, so that packing gives the same
tokens every day; the date is the default of Llama 3's templates."""

_FIRST_MARKER = 7391826450918273645
_QUESTION = {"role": "user", "content": "Q"}
_ADVICE = (
    "Mark the generated text with {% generation %} in the template, give records of `prompt` and "
    "`completion`, or train on all tokens (without completion-only)"
)


class RenderError(Exception):
    """Raised if a record's text or loss mask cannot be determined; the user sees the message."""


class Renderer:
    """Renderer of conversations with a chat template, given by the fields of a `ChatTemplate`."""

    def __init__(self, template: Mapping[str, Any]) -> None:
        texts = (template["template"], template["with_tools"])
        self.texts = [_SAME_DAY + t if "strftime_now" in t else t for t in texts]
        self.special = dict(template["special_tokens"])
        closing = {str(token) for token in template["closing"] if token}
        self.closing = sorted(closing, key=len, reverse=True)
        self.eos = str(self.special.get("eos_token") or "")
        self._wraps_strings: bool | None = None

    def rendered(self, request: Mapping[str, Any]) -> tuple[str, list[CharacterRange]]:
        """Return a conversation's text and the character ranges of the loss mask.

        The request contains the fields of a `Conversation`, and `masked`, which states whether to
        determine the loss mask; otherwise there are no ranges.

        Raises:
            RenderError: the template raises an error or writes too much text, or the loss mask
                cannot be determined.
        """
        render = _BoundTemplate(self, request)
        messages = self._readable(render, request["messages"])
        if not request["masked"]:
            return render.text(messages), []
        if request["prompt"] is not None:
            text = render.text(messages)
            return text, _Turns(render, messages, text).completion(request["prompt"])
        if _GENERATION.search(render.template):
            text, blocks = render.text_with_blocks(messages)
            if not any(map(_is_excluded, messages)):
                return text, blocks
            return text, _intersections(blocks, _Turns(render, messages, text).ranges())
        text = render.text(messages)
        return text, _union(_Turns(render, messages, text).ranges())

    def _readable(self, render: _BoundTemplate, messages: Sequence[Message]) -> list[Message]:
        """Convert the content and tool calls of messages to a form that the template supports.

        Content may be text or a list of parts. A template that supports only one form writes the
        other in Python's notation or omits it.
        """
        given = list(messages)
        if any(not isinstance(m.get("content", ""), str) or m.get("tool_calls") for m in given):
            given = _without_python(render, given)
        if self._wraps_strings is None:
            self._wraps_strings = _wants_parts(render)
        return [_in_parts(m) for m in given] if self._wraps_strings else given


class _Turns:
    """Locator of turns in a conversation's text; methods take the index `number` of a message."""

    def __init__(self, render: _BoundTemplate, messages: Sequence[Message], text: str) -> None:
        self._render, self._messages, self._text = render, messages, text
        self._closing, self._eos = render.closing, render.eos

    def ranges(self) -> list[CharacterRange]:
        """Return the ranges of the assistant's turns in the text, without excluded ones."""
        turns = [
            self._range(number)
            for number, message in enumerate(self._messages)
            if message["role"] == "assistant" and not _is_excluded(message)
        ]
        return [turn for turn in turns if turn is not None]

    def completion(self, prompt: int) -> list[CharacterRange]:
        """Return a list with the range of all text after the first `prompt` messages, if any."""
        if prompt == len(self._messages):
            return []
        opened = self._messages[prompt]["role"] == "assistant"
        return [(self._start(prompt, len(self._text), opened=opened), len(self._text))]

    def _range(self, number: int) -> CharacterRange | None:
        """Return the range of an assistant's turn; None if the text lacks the turn."""
        messages, text, eos = self._messages, self._text, self._eos
        last = number + 1 == len(messages)
        until = text if last else self._render.attempt(messages[: number + 1])
        end: int | None = None
        if until is None:
            end = self._end_from_example(number)
        elif text.startswith(until):
            end = len(until)
        elif eos and text.startswith(until.removesuffix(eos)):
            end = len(until.removesuffix(eos))
        else:
            end = self._end_by_marker(number, until)
        if end is None:
            return None
        start = self._start(number, end)
        if not last and messages[number + 1]["role"] != "assistant":
            end = self._end_with_stop_token(start, end)
        return start, end

    def _end_with_stop_token(self, start: int, end: int) -> int:
        """Return the end of a turn including its stop token, if there is one.

        Some templates (GLM's) write no end-of-turn token, because the model stops by generating the
        next message's role token.
        """
        turn = self._text[start:end].rstrip()
        if any(turn.endswith(token) for token in self._closing):
            return end
        return end + len(self._closing_token(end))

    def _closing_token(self, at: int) -> str:
        """Return the added token at a position of the text; "" if there is none."""
        return next((token for token in self._closing if self._text.startswith(token, at)), "")

    def _position_of(self, number: int, marked: Message) -> int | None:
        """Return the marker's position in the text, given a marked copy of message `number`.

        The result is None if the template fails, does not write the marker exactly once, or changes
        the text with it.
        """
        before, after = self._messages[:number], self._messages[number + 1 :]
        return self._render.marker_position([*before, marked, *after], self._text)

    def _end_by_marker(self, number: int, until: str) -> int | None:
        """Return the end of a turn; None if the text lacks the turn.

        `until` is the rendering of the messages up to this one.
        """
        in_until = in_text = False
        for marked in self._render.with_marker(self._messages[number]):
            inside = self._render.marker_position([*self._messages[:number], marked], until)
            at = self._position_of(number, marked)
            in_until, in_text = in_until or inside is not None, in_text or at is not None
            if inside is None or at is None:
                continue
            closing = until[inside:]
            for ending in dict.fromkeys((closing, closing.removesuffix(self._eos or " "))):
                if self._text.startswith(ending, at):
                    return at + len(ending)
            # the last turn may end with another token than earlier ones (<|return|> and <|end|>)
            last = next((token for token in self._closing if closing.endswith(token)), None)
            if last is not None and self._text.startswith(closing.removesuffix(last), at):
                end = at + len(closing) - len(last)
                if token := self._closing_token(end):
                    return end + len(token)
        if in_until and not in_text:
            return None
        raise RenderError(
            f"the chat template rewrites earlier turns, and the end of the turn of message "
            f"{number + 1} cannot be located in the whole text. {_ADVICE}"
        )

    def _start(self, number: int, end: int, *, opened: bool = True) -> int:
        """Return the start of an answer that ends at `end`.

        If `opened`, the answer follows a generation prompt, which is not part of the answer.
        """
        render, text, history = self._render, self._text, self._messages[:number]
        prompt = render.attempt(history, opened=opened)
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        before = render.attempt(history)
        if prompt is not None and before is not None and text.startswith(before):
            return min(end, max(len(before), self._shared_prefix(prompt, text)))
        if prompt is not None and history:
            for marked in render.with_marker(history[-1]):
                at = self._position_of(number - 1, marked)
                inside = render.marker_position([*history[:-1], marked], prompt, opened=opened)
                if at is not None and inside is not None:
                    return min(end, at + self._shared_prefix(prompt[inside:], text[at:]))
        start = self._start_from_example(number)
        if start is not None and start <= end:
            return start
        raise RenderError(
            f"the chat template rewrites earlier turns, and the start of the answer of message "
            f"{number + 1} cannot be located in the whole text. {_ADVICE}"
        )

    def _start_from_example(self, number: int) -> int | None:
        """Return the start of an answer, located by the generation prompt in an example; or None.

        This is used if the other methods fail, as for an assistant's message that begins a
        conversation, where there are no earlier messages to render with a generation prompt.
        """
        marked = self._render.with_marker(self._messages[number])
        positions = (self._position_of(number, message) for message in marked)
        at = min((position for position in positions if position is not None), default=None)
        prompt = self._render.attempt([_QUESTION], opened=True)
        plain = self._render.attempt([_QUESTION])
        if at is None or prompt is None or plain is None:
            return None
        plain = plain if prompt.startswith(plain) else plain.removesuffix(self._eos)
        header = prompt.removeprefix(plain)
        if header == prompt:
            return None
        while header.strip():
            if (found := self._text.rfind(header, 0, at)) >= 0:
                return found + len(header)
            header = header.rstrip()  # remove the last word, which may begin a thought
            header = header[: max(header.rfind(" "), header.rfind("\n")) + 1]
        return None

    def _end_from_example(self, number: int) -> int:
        """Return the end of a message's turn, as an index of characters in the rendered text.

        The template renders a short example conversation; the text after its answer has to follow
        the content of the message too. Raises RenderError if it does not, or if the message has
        tool calls.
        """
        render, message = self._render, self._messages[number]
        answer = {"role": message["role"], "content": "A"}
        example = render.attempt([_QUESTION, answer])
        for marked in render.with_marker(message) if not message.get("tool_calls") else ():
            content = marked.get("content")
            at_end = isinstance(content, str) and content.rstrip().endswith(render.marker)
            if example is None or not at_end:
                continue
            answer_with_marker = {**answer, "content": "A" + render.marker}
            inside = render.marker_position([_QUESTION, answer_with_marker], example)
            at = self._position_of(number, marked)
            if (
                inside is not None
                and at is not None
                and self._text.startswith(example[inside:], at)
            ):
                return at + len(example) - inside
        raise RenderError(
            f"the chat template cannot render the first {number + 1} messages alone, so the text "
            f"of message {number + 1} is unknown. {_ADVICE}"
        )

    def _shared_prefix(self, prompt: str, text: str) -> int:
        """Return the length of the common prefix of a text and a generation prompt, in characters.

        The prompt may differ after that (by a `<think>` that the text lacks). The prefix then ends
        after white space or an added token, so that the first letters of an answer are not part of
        it.
        """
        if text.startswith(prompt):
            return len(prompt)
        length = next(i for i in range(len(prompt)) if prompt[i] != text[i : i + 1])
        while length and not prompt[length - 1].isspace():
            if any(prompt.endswith(token, 0, length) for token in self._closing):
                break
            length -= 1
        return length


class _BoundTemplate:
    """Template bound to the tools, documents and variables of one conversation."""

    def __init__(self, renderer: Renderer, request: Mapping[str, Any]) -> None:
        self.closing, self.eos = renderer.closing, renderer.eos
        self.template = renderer.texts[request["tools"] is not None]
        self._given = {"tools": request["tools"], "documents": request["documents"]}
        self._variables = {**renderer.special, **request["variables"]}
        for name in ("messages", "tools", "documents", *_OPTIONS):
            self._variables.pop(name, None)
        given = json.dumps([request["messages"], self._given, self._variables])
        self._limit = OUTPUT_CHARACTERS + OUTPUT_FACTOR * len(given)
        candidates = map(str, itertools.count(_FIRST_MARKER))
        self.marker = next(marker for marker in candidates if marker not in given)

    def text(self, messages: Sequence[Message], *, opened: bool = False) -> str:
        """Return the rendering of messages, followed by the generation prompt if `opened`."""
        return self._render(messages, add_generation_prompt=opened)[0]

    def text_with_blocks(self, messages: Sequence[Message]) -> tuple[str, list[CharacterRange]]:
        """Return the rendering of messages and the ranges of nonempty `{% generation %}` blocks."""
        text, blocks = self._render(messages, return_assistant_tokens_mask=True)
        return text, [(start, stop) for start, stop in blocks[0] if start < stop <= len(text)]

    def attempt(self, messages: Sequence[Message], *, opened: bool = False) -> str | None:
        """Return the result of `text`, "" for an empty request; None if the template fails."""
        if not messages and not opened:
            return ""
        with suppress(RenderError):
            return self.text(messages, opened=opened)
        return None

    def marker_position(
        self, messages: Sequence[Message], plain: str, *, opened: bool = False
    ) -> int | None:
        """Return the marker's position in the rendering of messages that contain it.

        The result is None if the template fails or does not write the marker exactly once, or if
        the rendering does not equal `plain` after the marker is removed.
        """
        text = self.attempt(messages, opened=opened)
        if text is None or text.count(self.marker) != 1:
            return None
        at = text.index(self.marker)
        return at if text[:at] + text[at + len(self.marker) :] == plain else None

    def with_marker(self, message: Message) -> Iterator[Message]:
        """Yield copies of a message, each with the marker inserted at one position of one text."""
        for path, text in _texts(message):
            start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
            for at in dict.fromkeys((stop, (start + stop) // 2, min(start, stop))):
                marked = copy.deepcopy(message)
                parent: Any = marked
                for key in path[:-1]:
                    parent = parent[key]
                parent[path[-1]] = text[:at] + self.marker + text[at:]
                yield marked

    def _render(self, messages: Sequence[Message], **options: bool) -> tuple[str, Any]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        _set_timer("ITIMER_PROF", _cpu_seconds)
        try:
            rendered, marks = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.template,
                **self._given,
                **options,
                **self._variables,
            )
        except MemoryError:
            raise RenderError(
                "the chat template takes more memory than is allowed. Check the template's loops"
            ) from None
        except (
            *(TemplateError, ArithmeticError, LookupError, AttributeError),
            *(TypeError, ValueError, RecursionError),
        ) as error:
            raise RenderError(
                f"the chat template rejects the messages: {str(error).rstrip('.')}. Correct the "
                "record, or use another template"
            ) from error
        text = str(rendered[0])
        if len(text) > self._limit:
            raise RenderError(
                f"the chat template writes {len(text)} characters; at most {self._limit} are "
                "allowed. Check the template's loops"
            )
        return text, marks


def _without_python(render: _BoundTemplate, messages: Sequence[Message]) -> list[Message]:
    """Return messages in a form that the template writes without Python's notation, if possible.

    Messages that the template cannot render in any form are returned unchanged.
    """
    given = list(messages)
    flat = [_in_text(message) for message in given]
    called = [_calls_in_text(message) for message in flat]
    text = render.attempt(given)
    if text is None:
        return next((m for m in (flat, called) if render.attempt(m) is not None), given)
    for number, others in [(n, o) for o in (flat, called) for n in range(len(given))]:
        changed = others[number]
        if changed == given[number] or not _may_misprint(given[number], changed, text):
            continue
        attempt = [*given[:number], changed, *given[number + 1 :]]
        rendering = render.attempt(attempt)
        if rendering is not None and _improves(given[number], text, rendering):
            given, text = attempt, rendering
    return given


def _may_misprint(message: Message, changed: Message, text: str) -> bool:
    """Return whether a text may omit parts of a message, or show them in Python's notation."""
    parts = [
        part for _, part in _texts(changed) if changed.get("content") != message.get("content")
    ]
    return any(part.strip() not in text for part in parts) or _python_values(message, text) > 0


def _improves(message: Message, text: str, other: str) -> bool:
    """Return whether the rendering `other` of a message is better than the rendering `text`.

    A rendering is better if it contains more parts of the message, or fewer values as Python
    literals.
    """
    content = message.get("content")
    parts = [p["text"].strip() for p in content if "text" in p] if isinstance(content, list) else []
    lost = [sum(part not in rendering for part in parts) for rendering in (text, other)]
    return lost[1] < lost[0] or _python_values(message, other) < _python_values(message, text)


def _python_values(message: Message, text: str) -> int:
    """Return how often a text shows values of a message in Python's notation."""
    values = [message.get("content"), *(inner.get("arguments") for inner in _functions(message))]
    count = 0
    for value in values:
        if isinstance(value, dict | list) and str(value) != _json(value):
            count += text.lower().count(str(value).lower())
    return count


def _in_text(message: Message) -> Message:
    """Return a message with content as text: parts on separate lines, other values as JSON."""
    content = message.get("content", "")
    if isinstance(content, str):
        return message
    if isinstance(content, list) and all(isinstance(p, dict) and "text" in p for p in content):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return {**message, "content": _json(content)}


def _in_parts(message: Message) -> Message:
    """Return a message with text content as a list of one part; other content is unchanged."""
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _calls_in_text(message: Message) -> Message:
    """Return a message with the arguments of its tool calls as JSON text."""
    changed = copy.deepcopy(message)
    for function in _functions(changed):
        if isinstance(function.get("arguments"), dict | list):
            function["arguments"] = _json(function["arguments"])
    return changed


def _functions(message: Message) -> list[dict[str, Any]]:
    """Return the functions of a message's tool calls."""
    calls = message.get("tool_calls")
    found = [c.get("function", c) for c in calls if isinstance(c, dict)] if calls else []
    return [function for function in found if isinstance(function, dict)]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _wants_parts(render: _BoundTemplate) -> bool:
    """Return whether a template omits content given as text but writes content given as parts."""
    marker = render.marker
    probe = [{"role": "user", "content": marker}, {"role": "assistant", "content": marker}]
    plain = render.attempt(probe)
    if plain is not None and plain.count(marker) >= len(probe):
        return False
    parts = render.attempt([_in_parts(message) for message in probe])
    if parts is None or "'text'" in parts:
        return False
    return parts.count(marker) > (plain.count(marker) if plain is not None else 0)


def _texts(message: Message) -> Iterator[tuple[list[Any], str]]:
    """Yield (path of keys, text) for texts in a message at which to insert a marker."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        yield ["content"], content
    if isinstance(content, list):
        for number in reversed(range(len(content))):
            part = content[number]
            if isinstance(part, dict) and str(part.get("text") or "").strip():
                yield ["content", number, "text"], part["text"]
    for number, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function") if isinstance(call, dict) else None
        inner = function if isinstance(function, dict) else call
        path = ["tool_calls", number, *(["function"] if isinstance(function, dict) else [])]
        if isinstance(inner, dict):
            arguments = inner.get("arguments")
            if isinstance(arguments, dict):
                for name, value in arguments.items():
                    if isinstance(value, str) and value.strip():
                        yield [*path, "arguments", name], value
            if isinstance(inner.get("name"), str):
                yield [*path, "name"], inner["name"]
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(name), str) and message[name].strip():
            yield [name], message[name]
    if content is None or (isinstance(content, str) and not content.strip()):
        yield ["content"], content or ""


def _is_excluded(message: Message) -> bool:
    """Return whether a message is excluded from the loss.

    The fields are those of OpenAI (`weight`), ms-swift (`loss`) and Axolotl (`train`).
    """
    return (
        message.get("weight") == 0 or message.get("loss") is False or message.get("train") is False
    )


def _intersections(
    some: Sequence[CharacterRange], others: Sequence[CharacterRange]
) -> list[CharacterRange]:
    """Return the non-empty intersections of the ranges in `some` with those in `others`."""
    cut = [(max(a, start), min(b, stop)) for a, b in some for start, stop in others]
    return [(start, stop) for start, stop in cut if start < stop]


def _union(spans: Sequence[CharacterRange]) -> list[CharacterRange]:
    """Return the union of ranges as disjoint ranges, ascending."""
    union: list[CharacterRange] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], stop)
        else:
            union.append((start, stop))
    return union


# --- the rendering process: one request and one answer per line ---

_cpu_seconds = 0


def _set_timer(name: str, seconds: int) -> None:
    """Start the timer `name`, which ends this process after `seconds`; 0 stops the timer.

    Do nothing in a process that does not run `serve`, or on a platform without such timers.
    """
    if _cpu_seconds and hasattr(signal, "setitimer"):
        signal.setitimer(getattr(signal, name), seconds)


def serve(cpu_seconds: int, memory_bytes: int, idle_seconds: int) -> None:
    """Render the conversations read from standard input, and write the results to standard output.

    A request and its answer are one line of JSON each. The first request contains a chat template,
    and a later one may contain another. The arguments are the limits that `chat` defines.
    """
    global _cpu_seconds
    import transformers.utils.chat_template_utils  # noqa: F401  (before memory is limited)

    _cpu_seconds = cpu_seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    _set_timer("ITIMER_REAL", idle_seconds)
    _limit_memory(memory_bytes)
    renderer: Renderer | None = None
    for line in sys.stdin.buffer:
        _set_timer("ITIMER_REAL", 0)
        request = json.loads(line)
        if "template" in request:
            renderer, answer = Renderer(request["template"]), {}
        else:
            assert renderer is not None
            answer = _answer(renderer, request)
        _set_timer("ITIMER_PROF", 0)
        sys.stdout.buffer.write(json.dumps(answer or {"ready": True}).encode() + b"\n")
        sys.stdout.buffer.flush()
        _set_timer("ITIMER_REAL", idle_seconds)


def _answer(renderer: Renderer, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text, learnt = renderer.rendered(request)
    except RenderError as error:
        return {"error": str(error)[:_MESSAGE_CHARACTERS]}
    except (MemoryError, RecursionError) as error:
        reason = type(error).__name__
        return {"error": f"the chat template fails on the record ({reason}); simplify the template"}
    return {"text": text, "learnt": learnt}


def _limit_memory(memory_bytes: int) -> None:
    """Limit the memory of this process to `memory_bytes` more than it has now, if possible."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
