"""Map a window's targets from the teacher's tokens to those of a student with another tokenizer.

Both tokenisations cut the same bytes. Where both have a boundary, the text tokens that the teacher
drew are byte strings that begin there, and the student's target is the distribution of the first
student token of these byte strings. What follows a drawn token is known only if that token is the
next token of the text: its rounds are then continued by the rounds cached at the next position,
until the student's first token can no longer change, through at most `followed` tokens of the text.
docs/theory.md, section 10, states what is estimated, and the bias that remains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sparselogits.corpus.token_bytes import TokenBytes
from sparselogits.errors import InvalidArgumentError
from sparselogits.objectives import CAUSAL
from sparselogits.samplers.uniforms import retokenizing_uniforms
from sparselogits.targets import SparseTargets, offsets_from_lengths

FOLLOWED = 4
"""Default for the largest number of tokens of the text through which a round is continued."""

_UNKNOWN = -2  # image of a token that has not been mapped yet
_RAGGED = 64  # largest number of bytes of a word that is left out at the end of a window

_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Aligned:
    """Window of a teacher in the tokens of a student.

    Bytes are counted from the beginning of the window; a special token with an id in the student's
    tokenizer counts as one byte.

    Args:
        tokens: int64 [n], tokens of the student.
        starts: int32 [S], positions of the tokens that begin a document.
        learnt: bool [n], whether each position predicts a token of the window that the loss mask of
            the teacher's cache includes.
        source: int64 [n], position of the teacher's target from which each position's target is
            computed; -1 for the last position, and where the tokenisations share no boundary or the
            teacher has no target.
        begins: bool [n], whether the predicted token begins a text that was tokenised as the
            beginning of a document.
        closed: int64 [n], index of the first byte of the next word, after which text cannot change
            the predicted token; 2**60 if the window has no next word.
        ends: int64 [L], index of the byte after each teacher token.
        text_bytes: number of bytes of text in the window, without special tokens.
        left_out: number of bytes at the edges of the window that no token of the student covers.
    """

    tokens: _Ints
    starts: NDArray[np.int32]
    learnt: _Bools
    source: _Ints
    begins: _Bools
    closed: _Ints
    ends: _Ints
    text_bytes: int
    left_out: int


class _Part(NamedTuple):
    """Consecutive tokens of a student, with positions in the bytes of a window."""

    ids: _Ints
    starts: _Ints  # -1 for tokens without a position in the text
    ends: _Ints
    words: _Ints
    opens: bool  # whether the first token begins a document
    begins: bool  # whether the text was tokenised as the beginning of a document
    inserted: bool = False  # whether the teacher's tokens lack this token


class _Stretch(NamedTuple):
    """Text of a document without special tokens, or one special token."""

    data: bytes  # empty for a special token
    at: int  # index of the first byte in the window
    opens: bool  # see `_Part`
    begins: bool  # see `_Part`
    special: int = -1  # the student's id of the special token; -1 for text
    inserted: bool = False  # see `_Part`


@dataclass(frozen=True, eq=False)
class Retokenizer:
    """Conversion of windows from a teacher's tokenizer to a student's.

    Args:
        teacher: tokenizer of the cache.
        student: tokenizer of the student.
        special: images of special tokens of the teacher, by id: an id of the student, or the bytes
            with which the token is spelled (b"" for a token that is left out).
        bos_id: id of the beginning-of-text token that is inserted before each document; None if
            documents begin with one already, or the student has none.
        followed: largest number of tokens of the text through which a round is continued; 0 maps
            every drawn token without what follows it.
        elsewhere: target of positions without a shared boundary or a target of the teacher: "text"
            for the token of the text with probability 1, which is cross-entropy; "none" for no
            target and no loss.
        width: number of columns in the teacher's head; used if larger than the number of ids in the
            teacher's tokenizer.
    """

    teacher: TokenBytes
    student: TokenBytes
    special: Mapping[int, int | bytes]
    bos_id: int | None = None
    followed: int = FOLLOWED
    elsewhere: Literal["text", "none"] = "text"
    width: int = 0

    # -- alignment ---------------------------------------------------------------------------------

    def align(
        self, tokens: Sequence[int], document_starts: Iterable[int], present: _Bools | None = None
    ) -> Aligned:
        """Tokenise the text of a window for the student, and find the shared boundaries.

        Args:
            tokens: L tokens of the teacher, at least one.
            document_starts: positions at which a document starts.
            present: bool [L], whether each position has a target; None if all have one.

        Raises:
            InvalidArgumentError: the window contains a special token without an image.
        """
        stretches, ends = self._stretches(tokens, set(document_starts))
        parts = list(self._parts(stretches, last=int(ends[-1])))
        ids, starts, stops = (
            np.concatenate([getattr(p, name) for p in parts] or [np.empty(0, np.int64)])
            for name in ("ids", "starts", "ends")
        )
        opens, begins, usable, breaks = (np.zeros(len(ids), np.bool_) for _ in range(4))
        at = 0
        for part in parts:
            stop = at + len(part.ids)
            opens[at], begins[at], breaks[at] = part.opens, part.begins, True
            breaks[at + 1 : stop] = part.words[1:] != part.words[:-1]
            # at the beginning of a document only the first token continues the boundary
            usable[at:stop] = (part.starts > part.starts[0]) if part.begins else part.starts >= 0
            usable[at] = not part.inserted and part.starts[0] >= 0
            at = stop
        if not self.student.crosses_spaces:
            spaced = [self.student.bytes_of[i][:1].isspace() for i in ids.tolist()]
            breaks |= np.array(spaced, np.bool_)
        kept = self._complete(stops, breaks, bool(stretches) and stretches[-1].special < 0)
        ids, starts, stops = ids[:kept], starts[:kept], stops[:kept]
        opens, begins, usable, breaks = (own[:kept] for own in (opens, begins, usable, breaks))
        count, size = len(ids), len(tokens)
        before = np.concatenate([[0], stops[:-1]]) if count else stops
        position = np.searchsorted(ends, before, side="right") - 1
        shared = usable & (starts == before) & (position >= 0)
        shared &= ends[np.maximum(position, 0)] == before
        shared &= position + 1 < size
        learnt = np.ones(count, np.bool_)
        if present is not None:
            shared &= present[np.maximum(position, 0)]
            learnt = _learnt(ends, before, stops, CAUSAL.at_tokens(present, True))
        following = np.append(np.flatnonzero(breaks), count)
        after = following[np.searchsorted(following, np.arange(count), side="right")]
        closed = np.append(before, 1 << 60)[np.minimum(after, count)]
        covered = int(stops[-1]) - max(int(starts[0]), 0) if count else 0
        return Aligned(
            tokens=ids,
            starts=np.flatnonzero(opens).astype(np.int32),
            learnt=CAUSAL.at_positions(learnt, False) if count else learnt,
            source=CAUSAL.at_positions(np.where(shared, position, -1), -1) if count else ids,
            begins=CAUSAL.at_positions(begins, False) if count else begins,
            closed=CAUSAL.at_positions(closed, 1 << 60) if count else closed,
            ends=ends,
            text_bytes=sum(len(own.data) for own in stretches),
            left_out=int(ends[-1]) - covered,
        )

    def _stretches(self, tokens: Sequence[int], opening: set[int]) -> tuple[list[_Stretch], _Ints]:
        """Return stretches of text and special tokens, and the end of each teacher token."""
        found: list[_Stretch] = []
        ends, at, pending, begun = [], 0, bytearray(), 0
        opens = begins = spaced = False

        def flush() -> None:
            nonlocal opens, begins
            if pending:
                found.append(_Stretch(bytes(pending), begun, opens, begins))
                pending.clear()
                opens = begins = False

        for place, token in enumerate(tokens):
            if place in opening:
                flush()
                opens = begins = True
                spaced = self.teacher.adds_space
                if self.bos_id is not None:
                    found.append(_Stretch(b"", at, True, False, self.bos_id, inserted=True))
                    opens = False
            image = self.special.get(token)
            if token in self.teacher.special and image is None:
                name = self.teacher.special[token]
                raise InvalidArgumentError(
                    f"the text contains the special token {name!r}, which has no counterpart in "
                    f'the student\'s tokenizer. Give one: --special "{name}=TOKEN", or '
                    f'--special "{name}=" to spell it as text'
                )
            if isinstance(image, int):
                flush()
                found.append(_Stretch(b"", at, opens, False, image))
                at, opens = at + 1, False
                begins = self.student.adds_space_everywhere or (
                    begins and token == self.teacher.bos_id
                )
            else:
                own = self.teacher.bytes_of[token] if image is None else image
                own = own.removeprefix(b" ") if spaced and image is None else own
                begun = at if not pending else begun
                pending += own
                at += len(own)
            spaced = token in self.teacher.added and (
                self.teacher.adds_space_everywhere or (spaced and token == self.teacher.bos_id)
            )
            ends.append(at)
        flush()
        return found, np.array(ends, np.int64)

    def _parts(self, stretches: Sequence[_Stretch], last: int) -> Iterable[_Part]:
        """Yield the student's tokens of each stretch.

        Invalid UTF-8 becomes byte tokens if the student has them; it is omitted otherwise, and at
        the edges of the window.
        """
        pieces = [_texts(own.data) for own in stretches]
        texts = [
            (text, own.begins and at == 0)
            for own, split in zip(stretches, pieces, strict=True)
            for at, text, _ in split
            if text
        ]
        encoded = iter(self.student.encode([t for t, _ in texts], [b for _, b in texts]))
        for own, split in zip(stretches, pieces, strict=True):
            if own.special >= 0:
                start = np.array([own.at])
                stop = start + (not own.inserted)
                word = np.zeros(1, np.int64)
                ids = np.array([own.special])
                yield _Part(ids, start, stop, word, own.opens, False, own.inserted)
            opens = own.opens
            for at, text, invalid in split:
                begin = own.at + at
                if text:
                    made = next(encoded)
                    starts = np.where(made.starts < 0, -1, made.starts + begin)
                    if len(made.ids):
                        begins = own.begins and at == 0
                        yield _Part(made.ids, starts, made.ends + begin, made.words, opens, begins)
                        opens = False
                    begin += len(text.encode())
                at_edge = begin == 0 or begin + len(invalid) == last
                if invalid and not at_edge and (ids_ := self.student.byte_tokens(invalid)):
                    ends = begin + 1 + np.arange(len(ids_))
                    none = np.full(len(ids_), -1)
                    yield _Part(np.array(ids_), none, ends, none, opens, False)
                    opens = False

    def _complete(self, stops: _Ints, breaks: _Bools, ragged: bool) -> int:
        """Return the number of tokens to keep at the beginning of the window.

        If `ragged`, the window may cut its last word. The word is then omitted, unless it is the
        only one or has more than `_RAGGED` bytes.
        """
        found = np.flatnonzero(breaks)
        if not ragged or not len(found) or found[-1] == 0:
            return len(stops)
        cut = int(found[-1])
        return cut if stops[-1] - stops[cut - 1] <= _RAGGED else len(stops)

    # -- targets -----------------------------------------------------------------------------------

    def carries(self, aligned: Aligned) -> _Bools:
        """Return whether each position has a target, bool [n]."""
        return (
            aligned.learnt if self.elsewhere == "text" else aligned.learnt & (aligned.source >= 0)
        )

    def uniforms(self, aligned: Aligned, seed: int, window_index: int) -> _Floats:
        """Return the uniforms for `targets`, float64 [n, max(1, followed)] in [0, 1)."""
        shape = len(aligned.tokens), max(1, self.followed)
        return retokenizing_uniforms(seed, window_index, shape[0] * shape[1]).reshape(shape)

    def targets(
        self, aligned: Aligned, tokens: Sequence[int], given: SparseTargets, uniforms: _Floats
    ) -> SparseTargets:
        """Return the targets of the student's positions.

        If the teacher's targets have counts, the result has them too, and the counts of each
        position with a target sum to the teacher's number of rounds.

        Args:
            aligned: the window's alignment.
            tokens: L tokens of the teacher.
            given: the teacher's targets, of L positions.
            uniforms: uniforms from the method `uniforms`, which choose the rounds that continue
                others.
        """
        draws, images = _Draws.of(given), self.images_of(given.ids.numpy()).tolist()
        sums: list[_Sum] = []
        for place, carried in enumerate(self.carries(aligned).tolist()):
            own = _Sum(int(aligned.tokens[place + 1]) if carried else -1)
            if carried and aligned.source[place] < 0:
                own.add(own.label, draws.rounds, 1.0)
            elif carried:
                self._push(own, aligned, place, draws, images, tokens, uniforms[place])
            sums.append(own)
        entries = [(i, own.counts[i], own.weights[i]) for own in sums for i in sorted(own.counts)]
        counts = torch.tensor([entry[1] for entry in entries], dtype=torch.int32)
        weights = torch.tensor([entry[2] for entry in entries], dtype=torch.float64)
        if draws.equal:
            weights = counts.to(torch.float32) / draws.rounds
        return SparseTargets(
            torch.tensor([entry[0] for entry in entries], dtype=torch.int64),
            weights.to(torch.float32),
            offsets_from_lengths(torch.tensor([len(own.counts) for own in sums])),
            self.student.size,
            counts=counts if given.rounds else None,
            rounds=given.rounds,
        )

    def _push(
        self,
        result: _Sum,
        aligned: Aligned,
        place: int,
        draws: _Draws,
        images: Sequence[int],
        text: Sequence[int],
        uniforms: _Floats,
    ) -> None:
        """Add the images of one position's draws to `result`.

        Args:
            result: sums over the student's tokens.
            aligned: the window's alignment.
            place: position of the student.
            draws: the teacher's draws in the window.
            images: first student token of each entry's byte string, without what follows it.
            text: tokens of the teacher.
            uniforms: one uniform per token of the text through which rounds are continued.
        """
        at, begins, prefix = int(aligned.source[place]), bool(aligned.begins[place]), b""
        entries = draws.at(at)
        # the space that the teacher's tokenizer adds before a text is no byte of the text
        spaced = text[at + 1] not in self.teacher.special and int(
            aligned.ends[at + 1] - aligned.ends[at]
        ) < len(self.teacher.bytes_of[text[at + 1]])
        for level in range(self.followed + 1):
            true, count, weight = text[at + 1], 0, 0.0
            for entry, token, own_count, own_weight in entries:
                if token == true:
                    count, weight = own_count, own_weight
                elif level == 0 and not begins and not spaced:
                    result.add(images[entry], own_count, own_weight)
                else:
                    image = self._continued(prefix, token, begins, spaced=spaced)
                    result.add(image, own_count, own_weight)
            at += 1
            if weight <= 0:
                return
            if (
                level == self.followed
                or true in self.special
                or aligned.ends[at] > aligned.closed[place]
                or at + 1 >= len(text)
                or not draws.has(at)
            ):
                # without following, the text after the drawn token is not used at all
                alone = self.followed == 0 and true not in self.special
                image = result.label
                if alone:
                    image = self._continued(b"", true, begins, spaced=spaced)
                result.add(image, count, weight)
                return
            own = self.teacher.bytes_of[true]
            prefix += own.removeprefix(b" ") if spaced else own
            spaced = False
            entries = draws.continued(at, count, weight, float(uniforms[level]))

    def _continued(self, prefix: bytes, token: int, begins: bool, *, spaced: bool = False) -> int:
        """Return the student's first token of the bytes `prefix` followed by a drawn token.

        The result is negative if there is none. `begins` states whether the bytes are tokenised as
        the beginning of a document, and `spaced` whether the text lacks the space at the beginning
        of the drawn token.
        """
        image = self.special.get(token)
        if token in self.teacher.special and not isinstance(image, bytes):
            if prefix:  # the text ends before the special token
                return self.student.first_of(prefix, begins)
            return -1 if image is None else image
        unused = token >= self.teacher.size  # a row of the head that pads the vocabulary
        own = image if isinstance(image, bytes) else b"" if unused else self.teacher.bytes_of[token]
        own = own.removeprefix(b" ") if spaced and image is None else own
        apart = own[:1].isspace() and not prefix[-1:].isspace() and bool(prefix)
        if apart and not self.student.crosses_spaces:
            return self.student.first_of(prefix, begins)
        return self.student.first_of(prefix + own, begins) if prefix + own else -1

    def images_of(self, tokens: _Ints) -> _Ints:
        """Return the student's first token of each teacher token's bytes; negative for none."""
        known = self._images
        for token in np.unique(tokens[known[tokens] == _UNKNOWN]).tolist():
            known[token] = self._continued(b"", token, False)
        return known[tokens]

    @cached_property
    def _images(self) -> _Ints:
        """Results of `images_of` so far, int64 [V]; `_UNKNOWN` for tokens not mapped yet."""
        return np.full(max(self.teacher.size, self.width), _UNKNOWN)


_Entry = tuple[int, int, int, float]  # index, token, count, weight


class _Sum:
    """Counts and weights of the student's tokens at one position.

    Args:
        label: student token of the text, to which entries without an image are added.
    """

    def __init__(self, label: int) -> None:
        self.label = label
        self.counts: dict[int, int] = {}
        self.weights: dict[int, float] = {}

    def add(self, image: int, count: int, weight: float) -> None:
        """Add an entry to the student token `image`, or to the label if `image` is negative."""
        image = self.label if image < 0 else image
        self.counts[image] = self.counts.get(image, 0) + count
        self.weights[image] = self.weights.get(image, 0.0) + weight


@dataclass(frozen=True)
class _Draws:
    """Entries of a teacher's window as Python numbers.

    Args:
        ids: ids of all entries.
        counts: counts of all entries; 0 if the sampler does not draw in rounds.
        weights: weights of all entries.
        offsets: index of each position's first entry, followed by the number of entries.
        rounds: number of rounds per position, or 0.
        equal: whether all rounds have the same weight; False without rounds.
    """

    ids: list[int]
    counts: list[int]
    weights: list[float]
    offsets: list[int]
    rounds: int
    equal: bool

    @classmethod
    def of(cls, targets: SparseTargets) -> _Draws:
        """Return the entries of targets."""
        drawn, rounds = targets.counts, targets.rounds or 0
        equal = drawn is not None and bool(
            torch.equal(targets.weights, drawn.to(torch.float32) / rounds)
        )
        return cls(
            targets.ids.tolist(),
            [0] * targets.entries if drawn is None else drawn.tolist(),
            targets.weights.double().tolist(),
            targets.offsets.tolist(),
            rounds,
            equal,
        )

    def has(self, position: int) -> bool:
        """Return whether a position has entries."""
        return self.offsets[position + 1] > self.offsets[position]

    def at(self, position: int) -> list[_Entry]:
        """Return the entries of a position."""
        own = range(self.offsets[position], self.offsets[position + 1])
        return [(e, self.ids[e], self.counts[e], self.weights[e]) for e in own]

    def continued(self, position: int, count: int, weight: float, uniform: float) -> list[_Entry]:
        """Return the entries of a position that continue the rounds of an earlier token.

        Of all rounds, `count` are used, evenly spaced from a random start. Each round is used with
        the same probability, so the expectation of the entries is the product of the expectations.
        If the sampler draws no rounds, weights are multiplied.

        Args:
            position: position whose entries continue the token.
            count: number of rounds that drew the token; 0 if the sampler draws no rounds.
            weight: weight of the token.
            uniform: number in [0, 1) that chooses the start.
        """
        if not self.rounds:
            return [(e, token, 0, weight * own) for e, token, _, own in self.at(position)]
        total, shift, before, kept = self.rounds, int(uniform * self.rounds), 0, []
        for entry, token, drawn, own in self.at(position):
            after = before + drawn
            chosen = ((after - 1) * count - shift) // total - (
                (before - 1) * count - shift
            ) // total
            before = after
            if chosen:
                per_round = own * total / drawn
                kept.append((entry, token, chosen, weight * chosen / count * per_round))
        return kept


def _texts(data: bytes) -> list[tuple[int, str, bytes]]:
    """Split bytes into text in UTF-8 and invalid bytes.

    Returns:
        (offset of the text, text, invalid bytes that follow it) per piece; the text may be empty.
    """
    found: list[tuple[int, str, bytes]] = []
    at = 0
    while at < len(data):
        start = stop = len(data)
        try:
            text = data[at:].decode()
        except UnicodeDecodeError as error:
            start, stop = at + error.start, at + error.end
            text = data[at:start].decode()
        if text or not found:
            found.append((at, text, data[start:stop]))
        else:
            found[-1] = (*found[-1][:2], found[-1][2] + data[start:stop])
        at = stop
    return found


def _learnt(ends: _Ints, starts: _Ints, stops: _Ints, learnt: _Bools) -> _Bools:
    """Return per student token whether all overlapping teacher tokens are in the loss mask.

    Args:
        ends: int64 [L], index of the byte after each teacher token.
        starts: int64 [n], index of the first byte of each student token.
        stops: int64 [n], index of the byte after each student token.
        learnt: bool [L], whether each teacher token is in the loss mask of the teacher's cache.
    """
    unlearnt = np.concatenate([[0], np.cumsum(~learnt)])
    first = np.minimum(np.searchsorted(ends, starts, side="right"), len(ends) - 1)
    last = np.searchsorted(ends, np.maximum(stops, starts + 1) - 1, side="right")
    last = np.maximum(np.minimum(last, len(ends) - 1), first)
    result: _Bools = unlearnt[last + 1] == unlearnt[first]
    return result
