"""Form windows of one document each, padded at the end, for the packing kind "documents"."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.streams import PartWriter
from sparselogits.corpus.tokenizing import Encoded
from sparselogits.corpus.windows import Packing


class DocumentWindows:
    """Writer of a part in which each window has one document, or one row of ids; see `Packing`.

    A document that spans two parts is cut there, so that each part has whole windows.
    """

    def __init__(self, writer: PartWriter, packing: Packing) -> None:
        assert packing.padding_id is not None  # validated by `Packing`
        self._writer, self._packing, self._padding = writer, packing, packing.padding_id
        self._ids = np.empty(packing.window_length, np.int64)
        self._learnt = np.empty(packing.window_length, np.bool_)
        self._length = 0

    def append(self, piece: Piece, encoded: Encoded) -> int:
        """Append a piece; return the number of tokens in the windows that became complete."""
        self._writer.counts.characters += piece.stop - piece.start
        ids, learnt = encoded
        if piece.opens:
            self._writer.begin_document()
        if piece.tokens is not None:  # a row of ids, which `token_piece` has padded
            self._writer.append(ids, learnt=learnt, starts=piece.tokens.starts)
            return len(ids)
        flags = np.full(len(ids), learnt) if isinstance(learnt, bool) else learnt
        # chat templates write the beginning-of-text token themselves, if their text has one
        has_bos = piece.rendered or (len(ids) > 0 and ids[0] == self._packing.bos_id)
        if self._length == 0 and not (piece.opens and has_bos):
            self._begin()
        last = bool(len(flags) and flags[-1])
        if piece.closes and len(ids) and ids[-1] == self._packing.separator_id:
            ids, flags = ids[:-1], flags[:-1]
        written = 0
        while True:
            room = self._packing.window_length - 1 - self._length
            self._add(ids[:room], flags[:room])
            ids, flags = ids[room:], flags[room:]
            if not len(ids):
                break
            written += self._end(learnt=False)
            self._begin()
        return written + self._end(learnt=last) if piece.closes else written

    def finish(self) -> int:
        """Complete the window of a document that continues in the next part, if there is one.

        Return the number of tokens in the window, or 0.
        """
        return self._end(learnt=False) if self._length else 0

    def _begin(self) -> None:
        """Begin a window with the beginning-of-text token, if there is one."""
        if self._packing.bos_id is not None:
            self._add(np.array([self._packing.bos_id]), np.array([False]))

    def _add(self, ids: NDArray[np.int64], learnt: NDArray[np.bool_]) -> None:
        own = slice(self._length, self._length + len(ids))
        self._ids[own], self._learnt[own] = ids, learnt
        self._length += len(ids)

    def _end(self, *, learnt: bool) -> int:
        """End the window with the separator, pad it and write it; return its number of tokens."""
        self._add(np.array([self._packing.separator_id]), np.array([learnt]))
        starts = np.zeros(self._packing.window_length, np.bool_)
        starts[self._length : self._length + 1] = True
        self._ids[self._length :] = self._padding
        self._learnt[self._length :] = False
        self._writer.append(self._ids, learnt=self._learnt.copy(), starts=starts)
        self._length = 0
        return self._packing.window_length
