"""Conversations as text: a tokenizer's chat template, and which of it the assistant said.

A conversation becomes a run of parts that, one after another, are exactly what the template makes
of it whole. What an assistant's turn adds to the prompt that asks for it (the conversation before,
with the template's opening of an assistant turn) is a part to be learnt, the end of the turn
included; all else is not. The template has to be additive for that: what it makes of the first
messages must be the beginning of what it makes of more of them, but for an end-of-sequence token
with which some templates close every conversation. Templates that take back what they wrote
(leaving out the thoughts of earlier turns, say) are refused where they do so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparselogits.corpus.tokenizing import bos_id
from sparselogits.errors import CorpusError
from sparselogits.identity import canonical_json

Message = Mapping[str, Any]
Part = tuple[str, bool]
"""Text, and whether it is to be learnt."""


_SAME_DAY = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07') "
    "| replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') }}{% endmacro +%}"
)
"""For templates that write today's date, so that text is packed to the same tokens every day: the
date that Llama 3's own templates fall back to."""


@dataclass(frozen=True)
class ChatTemplate:
    """What makes text of messages; plain values, so cheap to send to another process."""

    template: str
    special_tokens: tuple[tuple[str, Any], ...]
    """Names and texts that templates refer to, `eos_token` for one."""
    implied: str
    """The beginning-of-text token where packing puts it before documents: if the template writes
    it too, it is left out here; else empty."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """The template of a tokenizer (the one named `default` of several); None without one."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        template: str = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _SAME_DAY + template
        special = tuple(sorted(tokenizer.special_tokens_map.items()))
        implied = tokenizer.bos_token if bos_id(tokenizer) is not None else ""
        return cls(template, special, implied or "")

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides what messages become."""
        described = [self.template, dict(self.special_tokens), self.implied]
        return hashlib.sha256(canonical_json(described)).hexdigest()

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """A conversation in parts; every assistant's turn is to be learnt.

        Raises:
            CorpusError: messages the template has no form for, or a template that is not additive.
        """
        parts: list[Part] = [("", False)]
        for number, message in enumerate(messages):
            if message.get("role") == "assistant":
                asked = self._render(messages[:number], opened=True)
                self._extend(parts, asked, learnt=False)
                self._extend(parts, self._render(messages[: number + 1]), learnt=True)
        self._extend(parts, self._render(messages), learnt=False)
        return self._without_implied([part for part in parts if part[0]])

    def answered(self, prompt: Sequence[Message], completion: Sequence[Message]) -> list[Part]:
        """A prompt and its completion, both messages; the completion is to be learnt, whole.

        Raises:
            CorpusError: as for `parts`.
        """
        opened = completion[0].get("role") == "assistant" if completion else False
        parts: list[Part] = [("", False)]
        self._extend(parts, self._render(prompt, opened=opened), learnt=False)
        self._extend(parts, self._render([*prompt, *completion]), learnt=True)
        return self._without_implied([part for part in parts if part[0]])

    def _extend(self, parts: list[Part], text: str, *, learnt: bool) -> None:
        """Add what a longer rendering adds to the parts so far."""
        done = "".join(part for part, _ in parts)
        closing = str(dict(self.special_tokens).get("eos_token") or "")
        if not text.startswith(done) and closing and done.endswith(closing):
            last, of_assistant = parts[-1]
            parts[-1] = last.removesuffix(closing), of_assistant
            done = done.removesuffix(closing)
        if not text.startswith(done):
            raise CorpusError(
                "the chat template does not keep what it wrote: of the first messages it makes "
                f"text that ends {done[-60:]!r}, of more of them something that does not begin "
                "so. Give a template that writes turns one after another, or records of `prompt` "
                "and `completion` that are text"
            )
        parts.append((text[len(done) :], learnt))

    def _without_implied(self, parts: list[Part]) -> list[Part]:
        if not parts:
            return []
        text, learnt = parts[0]
        return [(text.removeprefix(self.implied), learnt), *parts[1:]]

    def _render(self, messages: Sequence[Message], *, opened: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not messages and not opened:
            return ""
        # fields that are null are left out, as transformers does: templates would write "None"
        given = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            rendered, _ = render_jinja_template(
                conversations=[given],
                chat_template=self.template,
                add_generation_prompt=opened,
                **dict(self.special_tokens),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise CorpusError(f"the chat template refuses it: {error}") from error
        return str(rendered[0])
