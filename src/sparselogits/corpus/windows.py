"""Define `Packing`, the rules that form windows from documents, and `Window`."""

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
    """Rules by which windows are formed from documents; part of a cache's identity.

    Each document is tokenised, preceded by a beginning-of-text token if `bos_id` is given, and
    followed by the separator. The documents are concatenated in the order of the source, and the
    stream is cut into windows without gaps, so a document may begin in one window and end in
    another. The last partial window is dropped, and counted.

    Raises:
        InvalidArgumentError: the window has fewer than two tokens, an id is negative, or the
            hold-out share lies outside [0, 1).

    Example:
        >>> Packing(window_length=512, separator_id=2, bos_id=None).first_id
        2
    """

    window_length: int
    """Number L of tokens per window."""
    separator_id: int
    """Id of the token after every document."""
    bos_id: int | None
    """Id of the token before every document; None for no token."""
    reset_attention: bool = False
    """Whether attention restarts at document starts; does not change the packed tokens."""
    holdout: float = 0.0
    """Share of the tokens that is held out for evaluation, in [0, 1); see `corpus.holdout`."""

    def __post_init__(self) -> None:
        if self.window_length < 2:
            raise InvalidArgumentError(
                f"found window_length={self.window_length}; give at least 2 tokens, an input and a "
                "token to predict"
            )
        if not 0 <= self.holdout < 1:
            raise InvalidArgumentError(
                f"found holdout={self.holdout}; give the share of the text to hold out, in [0, 1)"
            )
        if self.separator_id < 0 or (self.bos_id is not None and self.bos_id < 0):
            raise InvalidArgumentError(
                f"found separator_id={self.separator_id} and bos_id={self.bos_id}; give ids from 0"
            )

    @property
    def first_id(self) -> int:
        """Id of the token before a document's text: `bos_id`, or the separator if that is None."""
        return self.separator_id if self.bos_id is None else self.bos_id

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, for an identity."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Window:
    """Window of L consecutive tokens of a text."""

    index: int
    """Index among the corpus's training windows, or, for a held-out window, among these."""
    tokens: NDArray[np.int32]
    """Token ids, int32 [L]."""
    document_starts: NDArray[np.int32]
    """Positions of the first tokens of documents, int32 [S], ascending; without 0 if the window
    begins in the middle of a document."""
    mask: NDArray[np.bool_] | None
    """Whether each position carries a target, bool [L], because the next token is in the window and
    is trained on. None if all tokens of the corpus are trained on."""


def fingerprint(windows: Sequence[Window]) -> str:
    """Return the hexadecimal sha256 of tokens, document starts and masks of several windows.

    Numbers are hashed as little-endian int32, each array after its length, so only equal sequences
    of windows have equal fingerprints. The indices of the windows are not hashed.

    Args:
        windows: windows in order.
    """
    digest = hashlib.sha256()
    for window in windows:
        for array in (window.tokens, window.document_starts):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
        digest.update(b"\0" if window.mask is None else b"\1" + np.packbits(window.mask).tobytes())
    return digest.hexdigest()
