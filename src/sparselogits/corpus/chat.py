"""A tokenizer's chat template, and the text that it makes of conversations.

A conversation is rendered whole, by transformers' own renderer, so that its text is what
`apply_chat_template` gives; `rendering` says which characters of it are learnt. The template comes
from a tokenizer's folder, possibly a stranger's: it runs in a process of its own with limits of
time and memory (`render_process`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sparselogits.corpus.conversation import Conversation
from sparselogits.errors import CorpusError
from sparselogits.identity import canonical_json

_RULES = 2
"""Number of the rules by which conversations become tokens; enters the fingerprint."""


class Rendered(NamedTuple):
    """Text of a conversation."""

    text: str
    learnt: list[tuple[int, int]]
    """Characters [start, stop) that are learnt, ascending; empty where they were not asked for."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the tokens that it refers to; plain values, cheap to pickle."""

    template: str
    with_tools: str
    """The template of records that have tools; the same one unless the tokenizer has a second."""
    special_tokens: tuple[tuple[str, Any], ...]
    """Names and texts that templates refer to, `eos_token` for one."""
    closing: tuple[str, ...] = ()
    """Texts of the tokenizer's added tokens: what may end a turn."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """Return the template of a tokenizer; None if the tokenizer has no template.

        Raises:
            CorpusError: the tokenizer has several templates, and none of them is the default.
        """
        if not getattr(tokenizer, "chat_template", None):
            return None
        try:
            template: str = tokenizer.get_chat_template()
            with_tools: str = tokenizer.get_chat_template(tools=[])
        except ValueError as error:
            raise CorpusError(f"the tokenizer's chat template cannot be chosen: {error}") from error
        special = tuple(sorted(tokenizer.special_tokens_map.items()))
        closing = sorted(map(str, getattr(tokenizer, "added_tokens_decoder", {}).values()))
        return cls(template, with_tools, special, tuple(closing))

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides what messages become."""
        described = [_RULES, self.template, self.with_tools, dict(self.special_tokens)]
        return hashlib.sha256(canonical_json([*described, list(self.closing)])).hexdigest()

    def unread(self, names: Iterable[str]) -> list[str]:
        """Return the inputs that no template refers to; columns of that name are another thing."""
        inputs = {"tools", "documents"} & set(names)
        return [name for name in inputs if name not in self.template + self.with_tools]

    def rendered(self, conversation: Conversation, *, masked: bool) -> Rendered:
        """Render a conversation.

        Args:
            conversation: with at least one message.
            masked: find what the assistant says, which alone is learnt.

        Raises:
            CorpusError: the template refuses the messages or exceeds its limits, or it does not
                show what the assistant says.
        """
        from sparselogits.corpus.render_process import ask

        answer = ask(asdict(self), {**asdict(conversation), "masked": masked})
        if "error" in answer:
            raise CorpusError(str(answer["error"]))
        return Rendered(answer["text"], [(start, stop) for start, stop in answer["learnt"]])
