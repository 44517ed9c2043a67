"""Decode the tokens of a window one by one, even where several tokens share a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "�"
"""Replacement character, which decoders return for an incomplete character."""
_LONGEST_CHARACTER = 8
"""Largest number of tokens that may share a character."""


class TokenTexts:
    """Texts of the tokens of a window.

    Args:
        tokenizer: transformers tokenizer; None to represent tokens by their ids.
        tokens: ids of the window.
    """

    def __init__(self, tokenizer: Any | None, tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(tokens)
        self._alone: dict[int, str] = {}
        self._anchor: tuple[int, str] | None = None

    def running(self) -> list[str]:
        """Return the text of each token as a part of the window's text; ids without a tokenizer.

        If several tokens share a character, the last one's text contains it; the others are empty.
        """
        if self._tokenizer is None:
            return [f"#{token} " for token in self._tokens]
        texts, before, start = [""] * len(self._tokens), 0, 0
        for end in range(1, len(self._tokens) + 1):
            # decoded after the previous tokens, because some decoders drop a leading space
            previous = self._decode(self._tokens[before:start])
            text = self._decode(self._tokens[before:end])
            if text.endswith(_BROKEN) and end - start < _LONGEST_CHARACTER:
                continue
            texts[end - 1] = text[len(previous) :]
            before, start = start, end
        if start < len(self._tokens):  # the window ends within a character
            texts[-1] = self._decode(self._tokens[start:])
        return texts

    def alone(self, token: int) -> str:
        """Return a token's text with its leading space, or its name and id if it has no text."""
        if self._tokenizer is None:
            return f"#{token}"
        if token not in self._alone:
            self._alone[token] = self._single(token)
        return self._alone[token]

    def _single(self, token: int) -> str:
        if self._anchor is None:  # a token with text, after which leading spaces are decoded
            first = next((t for t in self._tokens if self._decode([t]).strip(f"{_BROKEN} ")), 0)
            self._anchor = (first, self._decode([first]))
        first, anchor_text = self._anchor
        pair = self._decode([first, token])
        follows = pair.startswith(anchor_text)
        text = pair[len(anchor_text) :] if follows else self._decode([token])
        if text and _BROKEN not in text:
            return text
        assert self._tokenizer is not None
        name = self._tokenizer.convert_ids_to_tokens(token)
        return f"#{token}" if name is None else f"{name} (#{token})"

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text
