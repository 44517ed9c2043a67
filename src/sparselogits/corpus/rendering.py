"""Render a conversation with its chat template, and find in the text what the assistant says.

The text is the template's rendering of the whole conversation. The ranges of characters that are
learnt are found by the first of these that applies:

- **Marks.** A template with `{% generation %}` blocks marks what the assistant generates.
- **Growth.** Most templates write turns one after another: the text of the first messages begins
  the text of all. What an assistant's turn adds to the conversation before it, rendered with
  `add_generation_prompt`, is learnt, the end of the turn included.
- **Position.** Templates of reasoning models rewrite earlier turns (they leave out earlier
  thoughts), so that the text of the first messages does not begin the whole text. There a message
  is found in the whole text by a mark: digits inserted into the message, which appear where the
  template writes the message. What follows the message up to the end of its turn, and what precedes
  its answer, are taken from the renderings of the first messages, or, where the template cannot
  render those (a greeting before the first question), from a conversation of one question and one
  answer.

`chat` runs this module in a process of its own.
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
CharacterRange = tuple[int, int]
"""First character and one past the last."""

OUTPUT_CHARACTERS = 4 << 20
OUTPUT_FACTOR = 16
"""A rendering may have `OUTPUT_CHARACTERS` plus `OUTPUT_FACTOR` times its input's characters."""

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
"""A fixed date for templates that write today's date, so that packing gives the same tokens every
day: the date that Llama 3's templates fall back to."""

_MARK = 7391826450918273645
_QUESTION = {"role": "user", "content": "Q"}
_ADVICE = (
    "Mark what is generated with {% generation %} in the template, give records of `prompt` and "
    "`completion`, or learn all tokens (without completion-only)"
)


class RenderError(Exception):
    """A chat template cannot render a record; the message is for the user."""


class Renderer:
    """Renders conversations with one chat template.

    Args:
        template: fields of a `chat.ChatTemplate`.
    """

    def __init__(self, template: Mapping[str, Any]) -> None:
        texts = (template["template"], template["with_tools"])
        self._texts = [_SAME_DAY + t if "strftime_now" in t else t for t in texts]
        self._special = dict(template["special_tokens"])
        closing = {str(token) for token in template["closing"] if token}
        self._closing = sorted(closing, key=len, reverse=True)
        self._eos = str(self._special.get("eos_token") or "")
        self._wraps_strings: bool | None = None

    def rendered(self, request: Mapping[str, Any]) -> tuple[str, list[CharacterRange]]:
        """Return a conversation's text and the ranges of its characters that are learnt.

        Args:
            request: fields of a `conversation.Conversation`, and `masked`: whether to find the
                ranges.

        Raises:
            RenderError: the template refuses the messages, or does not show what is learnt.
        """
        render = _Bound(self, request)
        messages = self._readable(render, request["messages"])
        if not request["masked"]:
            return render.text(messages), []
        prompt = request["prompt"]
        if prompt is not None:
            text = render.text(messages)
            return text, self._completion(render, messages, prompt, text)
        if _GENERATION.search(render.template):
            text, marks = render.marked(messages)
            if not any(map(_left_out, messages)):
                return text, marks
            return text, _both(marks, self._turns(render, messages, text))
        text = render.text(messages)
        return text, _joined(self._turns(render, messages, text))

    def _turns(
        self, render: _Bound, messages: Sequence[Message], text: str
    ) -> list[CharacterRange]:
        """Return the ranges of the text that the learnt turns take."""
        turns = [
            number
            for number, message in enumerate(messages)
            if message["role"] == "assistant" and not _left_out(message)
        ]
        spans = (self._turn(render, messages, number, text) for number in turns)
        return [span for span in spans if span is not None]

    def _turn(
        self, render: _Bound, messages: Sequence[Message], number: int, text: str
    ) -> CharacterRange | None:
        """Return the range of an assistant's turn in the text; None if the text leaves it out."""
        told = text if number + 1 == len(messages) else render.attempt(messages[: number + 1])
        end: int | None = None
        if told is None:
            end = self._end_as_usual(render, messages, number, text)
        elif text.startswith(told):
            end = len(told)
        elif self._eos and text.startswith(told.removesuffix(self._eos)):
            end = len(told.removesuffix(self._eos))
        else:
            end = self._end(render, messages, number, text, told)
        if end is None:
            return None
        start = self._start(render, messages, number, text, end)
        if number + 1 < len(messages) and messages[number + 1]["role"] != "assistant":
            end = self._with_stop(text, start, end)
        return start, end

    def _with_stop(self, text: str, start: int, end: int) -> int:
        """Return where a turn ends, with the token that stops it.

        Some templates (GLM's) write no end of a turn: the model stops by writing the next message's
        role.
        """
        said = text[start:end].rstrip()
        if any(said.endswith(token) for token in self._closing):
            return end
        following = (token for token in self._closing if text.startswith(token, end))
        return end + len(next(following, ""))

    def _completion(
        self, render: _Bound, messages: Sequence[Message], prompt: int, text: str
    ) -> list[CharacterRange]:
        """Return the range of a completion: everything after the prompt."""
        if prompt == len(messages):
            return []
        opened = messages[prompt]["role"] == "assistant"
        start = self._start(render, messages, prompt, text, len(text), opened=opened)
        return [(start, len(text))]

    def _end(
        self, render: _Bound, messages: Sequence[Message], number: int, text: str, told: str
    ) -> int | None:
        """Return where a message's turn ends in the text; None if the text leaves the turn out."""
        until = messages[: number + 1]
        known = shown = False
        for marked in render.markings(messages[number]):
            inside = render.place([*until[:-1], marked], told)
            at = render.place([*messages[:number], marked, *messages[number + 1 :]], text)
            known, shown = known or inside is not None, shown or at is not None
            if inside is None or at is None:
                continue
            rest, closing = text[at:], told[inside:]
            for ending in dict.fromkeys((closing, closing.removesuffix(self._eos or " "))):
                if rest.startswith(ending):
                    return at + len(ending)
            # the last turn may end with another token than earlier ones (<|return|> and <|end|>)
            last = next((token for token in self._closing if closing.endswith(token)), None)
            if last is not None and rest.startswith(closing.removesuffix(last)):
                end = at + len(closing) - len(last)
                for token in self._closing:
                    if text.startswith(token, end):
                        return end + len(token)
        if known and not shown:
            return None
        raise RenderError(
            f"the chat template rewrites earlier turns, and the end of the turn of message "
            f"{number + 1} cannot be found in the whole text. {_ADVICE}"
        )

    def _start(
        self,
        render: _Bound,
        messages: Sequence[Message],
        number: int,
        text: str,
        end: int,
        *,
        opened: bool = True,
    ) -> int:
        """Return where an answer starts in the text: after the generation prompt."""
        history = messages[:number]
        asked = render.attempt(history, opened=opened)
        if asked is not None and text.startswith(asked):
            return len(asked)
        before = render.attempt(history)
        if asked is not None and before is not None and text.startswith(before):
            return min(end, max(len(before), self._common(asked, text)))
        if asked is not None and history:
            for marked in render.markings(history[-1]):
                at = render.place([*history[:-1], marked, *messages[number:]], text)
                inside = render.place([*history[:-1], marked], asked, opened=opened)
                if at is not None and inside is not None:
                    return min(end, at + self._common(asked[inside:], text[at:]))
        start = self._start_as_usual(render, messages, number, text)
        if start is not None and start <= end:
            return start
        raise RenderError(
            f"the chat template rewrites earlier turns, and the start of the answer of message "
            f"{number + 1} cannot be found in the whole text. {_ADVICE}"
        )

    def _start_as_usual(
        self, render: _Bound, messages: Sequence[Message], number: int, text: str
    ) -> int | None:
        """Return where an answer starts, by the generation prompt of another conversation.

        This serves first messages of the assistant: templates cannot render what precedes them.
        """
        before, after = messages[:number], messages[number + 1 :]
        marked = render.markings(messages[number])
        places = (render.place([*before, copy, *after], text) for copy in marked)
        at = min((place for place in places if place is not None), default=None)
        asked = render.attempt([_QUESTION], opened=True)
        plain = render.attempt([_QUESTION])
        if at is None or asked is None or plain is None:
            return None
        plain = plain if asked.startswith(plain) else plain.removesuffix(self._eos)
        header = asked.removeprefix(plain)
        if header == asked:
            return None
        while header.strip():
            if (found := text.rfind(header, 0, at)) >= 0:
                return found + len(header)
            header = header.rstrip()  # without the last word, perhaps the beginning of a thought
            header = header[: max(header.rfind(" "), header.rfind("\n")) + 1]
        return None

    def _end_as_usual(
        self, render: _Bound, messages: Sequence[Message], number: int, text: str
    ) -> int:
        """Return where a turn ends, by the end of an answer in another conversation."""
        message = messages[number]
        answer = [_QUESTION, {"role": message["role"], "content": "A"}]
        told = render.attempt(answer)
        for marked in render.markings(message) if not message.get("tool_calls") else ():
            content = marked.get("content")
            if (
                told is None
                or not isinstance(content, str)
                or not content.rstrip().endswith(render.mark)
            ):
                continue
            inside = render.place([_QUESTION, {**answer[1], "content": "A" + render.mark}], told)
            at = render.place([*messages[:number], marked, *messages[number + 1 :]], text)
            if inside is not None and at is not None and text.startswith(told[inside:], at):
                return at + len(told) - inside
        raise RenderError(
            f"the chat template cannot render the first {number + 1} messages alone, so what "
            f"message {number + 1} adds is unknown. {_ADVICE}"
        )

    def _common(self, asked: str, text: str) -> int:
        """Return how many characters at its start a text shares with a generation prompt.

        The prompt may continue where the text does not (`<think>` of a thought that is left out);
        an answer that happens to begin with the same letters does not count.
        """
        if text.startswith(asked):
            return len(asked)
        length = next(i for i in range(len(asked)) if asked[i] != text[i : i + 1])
        while length and not asked[length - 1].isspace():
            if any(asked.endswith(token, 0, length) for token in self._closing):
                break
            length -= 1
        return length

    def _readable(self, render: _Bound, messages: Sequence[Message]) -> list[Message]:
        """Return messages whose content the template writes as text.

        Content may be text or a list of parts, and some templates know one form only: they print
        the other as Python would, or not at all. Such a message is converted to the known form.
        """
        given = list(messages)
        if any(not isinstance(m.get("content", ""), str) or m.get("tool_calls") for m in given):
            given = _without_python(render, given)
        if self._wraps_strings is None:
            self._wraps_strings = _wants_parts(render)
        return [_in_parts(m) for m in given] if self._wraps_strings else given


class _Bound:
    """A template bound to the tools and variables of one conversation."""

    def __init__(self, renderer: Renderer, request: Mapping[str, Any]) -> None:
        self.template = renderer._texts[request["tools"] is not None]
        self._given = {"tools": request["tools"], "documents": request["documents"]}
        self._variables = {**renderer._special, **request["variables"]}
        for name in ("messages", "tools", "documents", *_OPTIONS):
            self._variables.pop(name, None)
        given = json.dumps([request["messages"], self._given, self._variables])
        self._limit = OUTPUT_CHARACTERS + OUTPUT_FACTOR * len(given)
        self.mark = next(mark for mark in map(str, itertools.count(_MARK)) if mark not in given)

    def text(self, messages: Sequence[Message], *, opened: bool = False) -> str:
        """Return the rendering of messages; `opened` adds the generation prompt."""
        return self._render(messages, add_generation_prompt=opened)[0]

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[CharacterRange]]:
        """Return the rendering of messages and the ranges of its `{% generation %}` blocks."""
        text, marks = self._render(messages, return_assistant_tokens_mask=True)
        return text, [(start, stop) for start, stop in marks[0] if start < stop <= len(text)]

    def attempt(self, messages: Sequence[Message], *, opened: bool = False) -> str | None:
        """Return the rendering of messages; None where the template cannot render them."""
        if not messages and not opened:
            return ""
        with suppress(RenderError):
            return self.text(messages, opened=opened)
        return None

    def place(self, messages: Sequence[Message], plain: str, *, opened: bool = False) -> int | None:
        """Return the mark's position in a rendering that equals `plain` without it; else None."""
        text = self.attempt(messages, opened=opened)
        if text is None or text.count(self.mark) != 1:
            return None
        at = text.index(self.mark)
        return at if text[:at] + text[at + len(self.mark) :] == plain else None

    def markings(self, message: Message) -> Iterator[Message]:
        """Yield copies of a message, each with the mark inserted at one position of one text."""
        for path, text in _texts(message):
            start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
            for at in dict.fromkeys((stop, (start + stop) // 2, min(start, stop))):
                marked = copy.deepcopy(message)
                holder: Any = marked
                for key in path[:-1]:
                    holder = holder[key]
                holder[path[-1]] = text[:at] + self.mark + text[at:]
                yield marked

    def _render(self, messages: Sequence[Message], **options: bool) -> tuple[str, Any]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        _start_clock()
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
        except (TemplateError, ArithmeticError, LookupError, AttributeError) as error:
            raise RenderError(f"the chat template refuses it: {error}") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"the chat template refuses it: {error}") from error
        text = str(rendered[0])
        if len(text) > self._limit:
            raise RenderError(
                f"the chat template writes {len(text)} characters; at most {self._limit} are "
                "allowed. Check the template's loops"
            )
        return text, marks


def _without_python(render: _Bound, messages: Sequence[Message]) -> list[Message]:
    """Return messages that the template writes without Python's notation.

    Raises:
        RenderError: the template refuses the messages in every form.
    """
    given = list(messages)
    flat = [_in_text(message) for message in given]
    called = [_calls_in_text(message) for message in flat]
    text = render.attempt(given)
    if text is None:
        return next((m for m in (flat, called) if render.attempt(m) is not None), given)
    for number, others in [(n, o) for o in (flat, called) for n in range(len(given))]:
        changed = others[number]
        if changed == given[number] or not _misprinted(given[number], changed, text):
            continue
        attempt = [*given[:number], changed, *given[number + 1 :]]
        told = render.attempt(attempt)
        if told is not None and _clearer(given[number], text, told):
            given, text = attempt, told
    return given


def _misprinted(message: Message, changed: Message, text: str) -> bool:
    """Return whether a text may show a message in Python's notation, or lack its words."""
    words = [
        part for _, part in _texts(changed) if changed.get("content") != message.get("content")
    ]
    return any(word.strip() not in text for word in words) or _python(message, text) > 0


def _clearer(message: Message, text: str, told: str) -> bool:
    """Return whether a second rendering lacks fewer words, or has less of Python's notation."""
    parts = message.get("content")
    words = [p["text"].strip() for p in parts if "text" in p] if isinstance(parts, list) else []
    lost = [sum(word not in rendering for word in words) for rendering in (text, told)]
    return lost[1] < lost[0] or _python(message, told) < _python(message, text)


def _python(message: Message, text: str) -> int:
    """Count the values of a message that a text shows in Python's notation."""
    values = [message.get("content"), *(inner.get("arguments") for inner in _functions(message))]
    count = 0
    for value in values:
        if isinstance(value, dict | list) and str(value) != _json(value):
            count += text.lower().count(str(value).lower())
    return count


def _in_text(message: Message) -> Message:
    """Return a message with content as text: parts on separate lines, anything else as JSON."""
    content = message.get("content", "")
    if isinstance(content, str):
        return message
    if isinstance(content, list) and all(isinstance(p, dict) and "text" in p for p in content):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return {**message, "content": _json(content)}


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _calls_in_text(message: Message) -> Message:
    """Return a message whose tool calls have arguments as JSON text."""
    changed = copy.deepcopy(message)
    for function in _functions(changed):
        if isinstance(function.get("arguments"), dict | list):
            function["arguments"] = _json(function["arguments"])
    return changed


def _functions(message: Message) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    found = [c.get("function", c) for c in calls if isinstance(c, dict)] if calls else []
    return [function for function in found if isinstance(function, dict)]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _wants_parts(render: _Bound) -> bool:
    """Return whether a template omits content that is text, and writes content that is parts."""
    mark = render.mark
    probe = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    plain = render.attempt(probe)
    if plain is not None and plain.count(mark) >= len(probe):
        return False
    parts = render.attempt([_in_parts(message) for message in probe])
    if parts is None or "'text'" in parts:
        return False
    return parts.count(mark) > (plain.count(mark) if plain is not None else 0)


def _texts(message: Message) -> Iterator[tuple[list[Any], str]]:
    """Yield the texts of a message that templates write, with the path of keys to each."""
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
        way = ["tool_calls", number, *(["function"] if isinstance(function, dict) else [])]
        if isinstance(inner, dict):
            arguments = inner.get("arguments")
            if isinstance(arguments, dict):
                for name, value in arguments.items():
                    if isinstance(value, str) and value.strip():
                        yield [*way, "arguments", name], value
            if isinstance(inner.get("name"), str):
                yield [*way, "name"], inner["name"]
    for name in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(name), str) and message[name].strip():
            yield [name], message[name]
    if content is None or (isinstance(content, str) and not content.strip()):
        yield ["content"], content or ""


def _left_out(message: Message) -> bool:
    """Return whether a record marks an answer as not learnt (OpenAI, ms-swift, Axolotl)."""
    return (
        message.get("weight") == 0 or message.get("loss") is False or message.get("train") is False
    )


def _both(marks: Sequence[CharacterRange], turns: Sequence[CharacterRange]) -> list[CharacterRange]:
    """Return the ranges that lie both in a mark and in a turn."""
    cut = [(max(a, start), min(b, stop)) for a, b in marks for start, stop in turns]
    return [(start, stop) for start, stop in cut if start < stop]


def _joined(spans: Sequence[CharacterRange]) -> list[CharacterRange]:
    """Return ranges in order, without empty ones; those that touch or overlap are joined."""
    joined: list[CharacterRange] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


# the process: one request and one answer per line

_cpu_seconds = 0


def _start_clock() -> None:
    """Start the timer of a rendering; when it runs out, the process ends."""
    if _cpu_seconds:
        signal.setitimer(signal.ITIMER_PROF, _cpu_seconds)


def serve(cpu_seconds: int, memory_bytes: int, idle_seconds: int) -> None:
    """Answer requests on standard input until end of file.

    Args:
        cpu_seconds: processor time per rendering.
        memory_bytes: memory beyond what the process takes at its start.
        idle_seconds: time without a request after which the process ends.
    """
    global _cpu_seconds
    import transformers.utils.chat_template_utils  # noqa: F401  (before memory is limited)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if hasattr(signal, "setitimer"):
        _cpu_seconds = cpu_seconds
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, idle_seconds)
    _limit_memory(memory_bytes)
    renderer: Renderer | None = None
    for line in sys.stdin.buffer:
        if _cpu_seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)
        request = json.loads(line)
        if "template" in request:
            renderer, answer = Renderer(request["template"]), {}
        else:
            assert renderer is not None
            answer = _answer(renderer, request)
        if _cpu_seconds:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer or {"ready": True}).encode() + b"\n")
        sys.stdout.buffer.flush()
        if _cpu_seconds:
            signal.setitimer(signal.ITIMER_REAL, idle_seconds)


def _answer(renderer: Renderer, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text, learnt = renderer.rendered(request)
    except RenderError as error:
        return {"error": str(error)[:_MESSAGE_CHARACTERS]}
    except (MemoryError, RecursionError) as error:
        return {"error": f"the chat template fails on it ({type(error).__name__}); simplify it"}
    return {"text": text, "learnt": learnt}


def _limit_memory(memory_bytes: int) -> None:
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
