"""Read the messages of a conversation, and the other inputs of a chat template, from a record.

Conversations are stored in several forms: objects with `role` and `content` (OpenAI, TRL), objects
with `from` and `value` (ShareGPT), one object of lists (to which older versions of `datasets`
convert a list of objects), and each of these as JSON text. All of them are converted to messages as
chat templates expect them. Tool calls and tools retain the order of their keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparselogits.errors import CorpusError

MESSAGES = ("messages", "conversations", "conversation")
"""Names of fields that contain a conversation, in order of preference."""

EXTRAS = ("tools", "documents", "chat_template_kwargs", "system")
"""Names of further fields that a template uses; `system` only with the field `conversations`."""

_OPENAI = ("messages", "prompt", "completion")
"""Names of fields in OpenAI's and TRL's form, in which `from` and `value` are not read."""
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Names of fields that a message may have instead of `content`."""


@dataclass(frozen=True)
class Conversation:
    """Validated messages in the form that chat templates expect, with the other template inputs."""

    messages: list[dict[str, Any]]
    """Messages in order, each with `role`, and with `content` or a field such as `tool_calls`."""
    prompt: int | None = None
    """Number of leading messages that form the prompt; None if the record has no prompt."""
    tools: list[Any] | None = None
    """Tools for the template; None if the record has none."""
    documents: list[Any] | None = None
    """Documents for the template; None if the record has none."""
    variables: dict[str, Any] = field(default_factory=dict)
    """Further variables for the template, from `chat_template_kwargs`."""


def conversation_of(record: Mapping[str, Any], names: Sequence[str]) -> Conversation:
    """Return the conversation in the fields `names` of a record.

    `names` contains one field, or `prompt` and `completion`.

    Raises:
        CorpusError: a message is invalid, or a field has the wrong type or is not valid JSON; the
            error names the field.
    """
    parts = [_messages(record[name], name) for name in names]
    messages = [message for part in parts for message in part]
    system = record.get("system")
    separate = names[0] == "conversations" and isinstance(system, str) and system
    if separate and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    variables = _decoded(record.get("chat_template_kwargs"), "chat_template_kwargs")
    if not isinstance(variables, dict | None):
        raise CorpusError(
            f"`chat_template_kwargs` contains {_kind(variables)}; give an object with the "
            "template's variables"
        )
    return Conversation(
        messages,
        len(parts[0]) if len(parts) > 1 else None,
        _objects(record.get("tools"), "tools"),
        _objects(record.get("documents"), "documents"),
        variables or {},
    )


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    wrong = CorpusError(
        f"the field `{name}` contains {_kind(value)} instead of messages; give a list of "
        "objects with `role` and `content`"
    )
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, Mapping):
            value = _transposed(value)
        if not isinstance(value, list | tuple):
            raise wrong
        found = [json.loads(item) if isinstance(item, str) else item for item in value]
    except ValueError:
        raise wrong from None
    if not all(isinstance(message, Mapping) for message in found):
        raise wrong
    return [
        _message(message, f"message {number} of `{name}`", sharegpt=name not in _OPENAI)
        for number, message in enumerate(found, start=1)
    ]


def _transposed(columns: Mapping[str, Any]) -> Any:
    """Convert an object of equally long lists to a list of objects; return None otherwise."""
    lists = list(columns.values())
    if not lists or not all(isinstance(column, list | tuple) for column in lists):
        return None
    if len({len(column) for column in lists}) != 1:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _message(given: Mapping[str, Any], place: str, *, sharegpt: bool) -> dict[str, Any]:
    # null fields are removed, as in transformers, since templates would write "None"
    message = {str(name): value for name, value in given.items() if value is not None}
    role, content = message.pop("role", None), message.pop("content", None)
    if sharegpt and role is None and "from" in message:
        role = message.pop("from")
        if role not in (*_ROLES, *_SHAREGPT_ROLES, "function_call"):
            raise CorpusError(
                f"{place} is from {str(role)[:40]!r}; give one of "
                f"{', '.join((*_SHAREGPT_ROLES, 'function_call', *_ROLES))}"
            )
        role = _SHAREGPT_ROLES.get(role, role)
    if sharegpt and content is None and "value" in message:
        content = message.pop("value")
    if not isinstance(role, str) or not role.strip():
        found = "no `role`" if role is None else f"the role {str(role)[:40]!r}"
        advice = ""
        if "from" in given and not sharegpt:
            advice = ". For ShareGPT's form (`from`, `value`), rename the field to `conversations`"
        raise CorpusError(
            f"{place} has {found} (its fields: {_names(given)}); give a role such as 'user' or "
            f"'assistant'{advice}"
        )
    if role not in _ROLES and role.strip().lower() in _ROLES:
        raise CorpusError(
            f"{place} has the role {role[:40]!r}, but chat templates expect "
            f"{role.strip().lower()!r}. Rename the role"
        )
    if sharegpt and role == "function_call" and isinstance(content, str):
        return _sharegpt_call(content)
    if content is None and not any(name in message for name in _INSTEAD_OF_CONTENT):
        raise CorpusError(
            f"{place} has no `content` (its fields: {_names(given)}); give text, a list of parts, "
            "or tool calls"
        )
    if content is None:
        return {"role": role, **message}
    return {"role": role, "content": _content(content, role, place), **message}


def _content(content: Any, role: str, place: str) -> Any:
    if isinstance(content, str):
        return content
    if role == "tool" and isinstance(content, Mapping | list | tuple | int | float):
        return content  # the result of a tool
    if not isinstance(content, list | tuple):
        raise CorpusError(
            f"{place} has content of type {_kind(content)}; give text or a list of parts"
        )
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise CorpusError(
                f"{place} has a content part of type {str(kind)[:40]!r}, but only text can be "
                "packed; remove the part or the record"
            )
        parts.append({name: value for name, value in part.items() if value is not None})
    return parts


def _sharegpt_call(content: str) -> dict[str, Any]:
    """Return the assistant's message for a ShareGPT `function_call`.

    The message has `tool_calls` if the content is a call or a list of calls as JSON, where a call
    is an object with a `name`. Otherwise the message has the content unchanged.
    """
    try:
        calls = json.loads(content)
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    named = [isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls]
    if named and all(named):
        functions = [{"type": "function", "function": call} for call in calls]
        return {"role": "assistant", "content": "", "tool_calls": functions}
    return {"role": "assistant", "content": content}


def _objects(value: Any, name: str) -> list[Any] | None:
    value = _decoded(value, name)
    if value is None:
        return None
    items = [_decoded(item, name) for item in value] if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, Mapping) for item in items):
        raise CorpusError(
            f"`{name}`, an input of the chat template, contains {_kind(value)}; give a list of "
            "objects, or rename the field if it has another meaning"
        )
    return items


def _decoded(value: Any, name: str) -> Any:
    """Return a value, decoded if it is stored as JSON text; None for blank text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise CorpusError(
            f"`{name}` contains text that is not JSON ({error}); give JSON, or rename the field"
        ) from None


def _kind(value: object) -> str:
    return type(value).__name__


def _names(message: Mapping[str, Any]) -> str:
    return ", ".join(f"`{str(name)[:40]}`" for name in list(message)[:12]) or "none"
