"""A window: a fixed number of consecutive tokens of the packed corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import InvalidArgumentError


@dataclass(frozen=True)
class Packing:
    """How documents become windows; part of the identity of whatever is made from them.

    Each document becomes [bos?] tokens separator. The documents stand one after another, in the
    order of the source, and the windows are cut from that stream without gaps: a document may
    begin in one window and end in another. The last partial window is dropped, and counted.

    Raises:
        InvalidArgumentError: a window of fewer than two tokens, a negative id, or a hold-out share
            outside [0, 1).
    """

    window_length: int
    """Tokens a window, L."""
    separator_id: int
    """Put after every document."""
    bos_id: int | None
    """Put before every document; None where the tokenizer adds none by itself."""
    reset_attention: bool = False
    """Whether attention is to start anew at document starts; recorded, packs the same tokens."""
    holdout: float = 0.0
    """Share of the tokens held out for evaluation, see `holdout`."""

    def __post_init__(self) -> None:
        if self.window_length < 2:
            raise InvalidArgumentError(
                f"a window needs at least 2 tokens, one to read and one to predict; found "
                f"window_length={self.window_length}"
            )
        if not 0 <= self.holdout < 1:
            raise InvalidArgumentError(
                f"holdout is the share of the text to hold out, in [0, 1); found {self.holdout}"
            )
        if self.separator_id < 0 or (self.bos_id is not None and self.bos_id < 0):
            raise InvalidArgumentError(
                f"token ids are not negative: separator_id={self.separator_id}, "
                f"bos_id={self.bos_id}"
            )

    @property
    def first_id(self) -> int:
        """What a document's first token is predicted from: bos, or the separator before it."""
        return self.separator_id if self.bos_id is None else self.bos_id

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for an identity."""
        return {
            "window_length": self.window_length,
            "separator_id": self.separator_id,
            "bos_id": self.bos_id,
            "reset_attention": self.reset_attention,
            "holdout": self.holdout,
        }


@dataclass(frozen=True, eq=False)
class Window:
    """L consecutive tokens.

    The target at position j predicts token j + 1.
    """

    index: int
    """Number of the window within its corpus (hold-out windows are numbered apart)."""
    tokens: NDArray[np.int32]
    """int32 [L]"""
    document_starts: NDArray[np.int32]
    """int32, ascending: positions of the first token of a document. A window that begins in the
    middle of a document has no 0 in it."""
    mask: NDArray[np.bool_] | None
    """bool [L], true where the position carries a target: where the next token is in the window
    and is to be learnt. None when all tokens are."""


def fingerprint(windows: Sequence[Window]) -> str:
    """sha256, in hex, over tokens, document starts and masks of a run of windows.

    Numbers are hashed as little-endian int32, each array after its length, so two runs of windows
    hash alike exactly when they are equal. Window indices do not enter.
    """
    digest = hashlib.sha256()
    for window in windows:
        for array in (window.tokens, window.document_starts):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
        digest.update(b"\0" if window.mask is None else b"\1" + np.packbits(window.mask).tobytes())
    return digest.hexdigest()
