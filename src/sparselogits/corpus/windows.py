"""Define `Packing`, the rules that form windows from documents, and `Window`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparselogits.errors import InvalidArgumentError, python_number, require_whole

PackingKind = Literal["joined", "documents"]
"""Name of a rule by which documents become windows; see `Packing`."""

PACKING_KINDS: tuple[PackingKind, ...] = ("joined", "documents")
"""Names of all kinds of packing."""


@dataclass(frozen=True)
class Packing:
    """Rules by which windows are formed from documents; part of a cache's identity.

    Each document is tokenised, preceded by a beginning-of-text token if `bos_id` is given, and
    followed by the separator. A special token that the document's tokens already begin or end with
    is not repeated. No beginning-of-text token is added before text from a chat template, and no
    special token to token ids. There are two kinds of packing:

    - *joined*: the documents are concatenated in the order of the source, and the stream is cut
      into windows without gaps, so a document may begin in one window and end in another. The last
      partial window is dropped, and counted.
    - *documents*: each window has one document, padded at the end. A longer document is cut into
      several windows, each of which has the special tokens. Padding, and a separator that does not
      end a document, carry no target.

    Raises:
        InvalidArgumentError: the window is too short, an id is negative, the hold-out share lies
            outside [0, 1), the kind is unknown, or a setting contradicts the kind.

    Example:
        >>> Packing(window_length=512, separator_id=2, bos_id=None).first_id
        2
    """

    window_length: int
    """Number L of tokens per window."""
    separator_id: int
    """Id of the token after a document."""
    bos_id: int | None
    """Id of the token before a document; None for no token."""
    reset_attention: bool = False
    """Whether attention restarts at document starts; does not change the packed tokens."""
    holdout: float = 0.0
    """Share of the tokens that is held out for evaluation, in [0, 1); see `corpus.holdout`."""
    kind: PackingKind = "joined"
    """Kind of packing: "joined" or "documents"."""
    padding_id: int | None = None
    """Id of padding tokens, for the kind "documents"; None for the kind "joined"."""

    def __post_init__(self) -> None:
        # at least an input and a token to predict
        window_length = require_whole("window_length", self.window_length, 2)
        object.__setattr__(self, "window_length", window_length)
        if not 0 <= self.holdout < 1:
            raise InvalidArgumentError(
                f"found holdout={self.holdout}; give the share of the text to hold out, in [0, 1)"
            )
        object.__setattr__(self, "holdout", python_number(self.holdout))
        for name in ("separator_id", "bos_id", "padding_id"):
            value = getattr(self, name)
            if value is not None or name == "separator_id":
                object.__setattr__(self, name, require_whole(name, value, 0))
        if self.kind not in PACKING_KINDS:
            raise InvalidArgumentError(
                f"found the packing kind {self.kind!r}; give one of {', '.join(PACKING_KINDS)}"
            )
        if (self.padding_id is None) == self.of_documents:
            raise InvalidArgumentError(
                f"found padding_id={self.padding_id} for the packing kind {self.kind!r}; give an "
                "id for the kind 'documents', and None for the kind 'joined'"
            )
        if self.of_documents and self.reset_attention:
            raise InvalidArgumentError(
                "found reset_attention with one document per window, where no other document could "
                "be attended to; leave reset_attention out (--reset-attention)"
            )
        if self.of_documents and self.window_length < self._least_length:
            raise InvalidArgumentError(
                f"found window_length={self.window_length}; give at least {self._least_length} "
                "tokens, because each window of a document has its special tokens"
            )

    @property
    def of_documents(self) -> bool:
        """Whether each window has one document, padded at the end."""
        return self.kind == "documents"

    @property
    def _least_length(self) -> int:
        return 2 if self.bos_id is None else 3

    @property
    def first_id(self) -> int:
        """Id of the token before a document's text: `bos_id`, or the separator if that is None."""
        return self.separator_id if self.bos_id is None else self.bos_id

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, for an identity.

        For the kind "joined", `kind` and `padding_id` are omitted, so that the JSON equals that of
        versions without kinds.
        """
        told = asdict(self)
        if not self.of_documents:
            del told["kind"], told["padding_id"]
        return told


def text_length(kind: str | None, document_starts: NDArray[np.int32], length: int) -> int | None:
    """Return the number of tokens before a window's padding; None unless `kind` is "documents".

    The padding counts as a document, and a window of the kind "documents" has one other document,
    so padding begins at the last document start above 0. Identities of the kind "joined" state no
    kind.

    Examples:
        >>> starts = np.array([0, 5], np.int32)
        >>> text_length("documents", starts, 8), text_length("documents", starts[:1], 8)
        (5, 8)
    """
    if kind != "documents":
        return None
    last = int(document_starts[-1]) if len(document_starts) else 0
    return last or length


@dataclass(frozen=True, eq=False)
class Window:
    """Window of L consecutive tokens of a text."""

    index: int
    """Index of the window among the training windows, or among the held-out windows."""
    tokens: NDArray[np.int32]
    """Token ids, int32 [L]."""
    document_starts: NDArray[np.int32]
    """Positions of the first tokens of documents and of padding, int32 [S], ascending; without 0 if
    the window begins in the middle of a document."""
    mask: NDArray[np.bool_] | None
    """Whether each position carries a target, bool [L], because the next token is in the window and
    is trained on. None if all tokens of the corpus are trained on."""
    learnt: NDArray[np.bool_] | None = None
    """Whether each token is trained on, bool [L]; None if all tokens of the corpus are."""
    text_length: int | None = None
    """Number of tokens before the padding; None unless the packing kind is "documents"."""


def fingerprint(windows: Sequence[Window], *, masks: bool = True) -> str:
    """Return the hexadecimal sha256 of tokens, document starts and masks of several windows.

    Tokens and document starts are hashed as little-endian int32, each array after its length. The
    indices of the windows are not hashed.

    Args:
        windows: windows in order.
        masks: whether to hash the masks; False for a masked language model, whose cache stores
            which positions were chosen instead.
    """
    digest = hashlib.sha256()
    for window in windows:
        for array in (window.tokens, window.document_starts):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
        mask = window.mask if masks else None
        digest.update(b"\0" if mask is None else b"\1" + np.packbits(mask).tobytes())
    return digest.hexdigest()
