"""Define packing and windows: fixed numbers of consecutive tokens of the packed corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import InvalidArgumentError


@dataclass(frozen=True)
class Packing:
    """How documents become windows; part of the identity of everything made from them.

    Each document becomes [bos?] tokens separator. The documents stand one after another, in the
    order of the source, and the windows are cut from that stream without gaps: a document may
    begin in one window and end in another. The last partial window is dropped, and counted.

    Raises:
        InvalidArgumentError: the window has fewer than two tokens, an id is negative, or the
            hold-out share lies outside [0, 1).
    """

    window_length: int
    """Number L of tokens per window."""
    separator_id: int
    """Token after every document."""
    bos_id: int | None
    """Token before every document; None where the tokenizer adds none by itself."""
    reset_attention: bool = False
    """Whether attention restarts at document starts; the packed tokens do not depend on it."""
    holdout: float = 0.0
    """Share of the tokens that is held out for evaluation, see `holdout`."""

    def __post_init__(self) -> None:
        if self.window_length < 2:
            raise InvalidArgumentError(
                f"found window_length={self.window_length}; a window needs at least 2 tokens, one "
                "to read and one to predict"
            )
        if not 0 <= self.holdout < 1:
            raise InvalidArgumentError(
                f"found holdout={self.holdout}; give the share of the text to hold out, in [0, 1)"
            )
        if self.separator_id < 0 or (self.bos_id is not None and self.bos_id < 0):
            raise InvalidArgumentError(
                f"found separator_id={self.separator_id} and bos_id={self.bos_id}; token ids are "
                "not negative"
            )

    @property
    def first_id(self) -> int:
        """Token that predicts a document's first token: bos, or the separator before it."""
        return self.separator_id if self.bos_id is None else self.bos_id

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, for an identity."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Window:
    """L consecutive tokens of a text."""

    index: int
    """Number of the window within its corpus (hold-out windows are numbered separately)."""
    tokens: NDArray[np.int32]
    """int32 [L]"""
    document_starts: NDArray[np.int32]
    """int32, ascending: positions of the first tokens of documents. They do not include 0 if the
    window begins in the middle of a document."""
    mask: NDArray[np.bool_] | None
    """bool [L], true where the position carries a target: the next token is in the window and is
    learnt. None if all tokens are learnt."""


def fingerprint(windows: Sequence[Window]) -> str:
    """Return the sha256, in hex, of tokens, document starts and masks of a run of windows.

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
