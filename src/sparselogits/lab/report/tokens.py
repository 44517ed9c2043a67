"""Texts of tokens: consecutive tokens, which may share a character, and single ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"
_LONGEST_CHARACTER = 8
"""Largest number of tokens that may share a character."""


class TokenTexts:
    """Texts of the tokens of a window.

    Args:
        tokenizer: a transformers tokenizer; None to show tokens by number.
        tokens: ids of a window.
    """

    def __init__(self, tokenizer: Any | None, tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(tokens)
        self._alone: dict[int, str] = {}
        self._anchor: tuple[int, str] | None = None

    def running(self) -> list[str]:
        """Return one text per token; joined they are the text of the window.

        If several tokens share a character, the last of them has it and the others are empty.
        """
        if self._tokenizer is None:
            return [f"#{token} " for token in self._tokens]
        texts, before, start = [""] * len(self._tokens), 0, 0
        for end in range(1, len(self._tokens) + 1):
            # decoded with the tokens before, since some decoders drop the space of a first token
            known = self._decode(self._tokens[before:start])
            whole = self._decode(self._tokens[before:end])
            if whole.endswith(_BROKEN) and end - start < _LONGEST_CHARACTER:
                continue
            texts[end - 1] = whole[len(known) :]
            before, start = start, end
        if start < len(self._tokens):  # a character that the window's end cuts off
            texts[-1] = self._decode(self._tokens[start:])
        return texts

    def alone(self, token: int) -> str:
        """Return the text of a single token with its leading space; its number if it has none."""
        if self._tokenizer is None:
            return f"#{token}"
        if token not in self._alone:
            self._alone[token] = self._single(token)
        return self._alone[token]

    def _single(self, token: int) -> str:
        if self._anchor is None:
            first = next((t for t in self._tokens if self._decode([t]).strip(f"{_BROKEN} ")), 0)
            self._anchor = (first, self._decode([first]))
        first, text = self._anchor
        pair = self._decode([first, token])
        own = pair[len(text) :] if pair.startswith(text) else self._decode([token])
        if own and _BROKEN not in own:
            return own
        assert self._tokenizer is not None
        name = self._tokenizer.convert_ids_to_tokens(token)
        return f"#{token}" if name is None else f"{name} (#{token})"

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
