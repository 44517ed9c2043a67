"""A window of a cache as a person looks at it: at each position what was cached, beside the models.

Everything is gathered into plain values, a position at a time: the true next token, the cached
entries, and, where a model is at hand, its probability of each of these ids and of the ids it finds
likeliest itself. Logits exist one slice of positions at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.corpus import require_tokenizer
from sparselogits.data import CacheDataset
from sparselogits.data.dataset import IGNORE_INDEX
from sparselogits.errors import CacheError
from sparselogits.evaluate.passes import StudentLogits, model_inputs, require_ids, teacher_slices
from sparselogits.lab.report.tokens import TokenTexts
from sparselogits.targets import SparseTargets
from sparselogits.teacher import Engine

LIKELIEST = 10
"""Ids of each model's own choice that are shown beside the cached ones."""

LARGEST = 64
"""Ids shown a position; what is beyond is summed in the row of the rest."""


@dataclass(frozen=True)
class Shown:
    """One id at one position.

    Args:
        id: in the vocabulary.
        weight: the cached entry's; None where the id was not cached.
        count: how many of the position's rounds fell on it; None without rounds.
        teacher: its probability by the teacher; None without one.
        student: likewise.
    """

    id: int
    weight: float | None = None
    count: int | None = None
    teacher: float | None = None
    student: float | None = None


@dataclass(frozen=True)
class Position:
    """What predicts the token after one position.

    Args:
        label: that token's id; None where there is none to learn.
        rows: ids, the likeliest first; the label is among them.
        entries: cached.
        mass: of all cached weights.
        figures: by the names of `MEASURES`; None where a figure does not exist.
    """

    label: int | None
    rows: tuple[Shown, ...]
    entries: int
    mass: float
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowView:
    """One window, ready to be drawn.

    Args:
        index: its number in the corpus.
        tokens: its ids.
        document_starts: positions at which a document starts.
        positions: one for each token.
        texts: of all its ids.
        facts: (name, value) pairs about the cache and the models.
        measures: names of the figures that exist here, in the order of `MEASURES`.
        models: which of "teacher" and "student" are at hand.
        previous: number of the window before it that is present, None where there is none.
        following: likewise the next.
    """

    index: int
    tokens: tuple[int, ...]
    document_starts: tuple[int, ...]
    positions: tuple[Position, ...]
    texts: TokenTexts
    facts: tuple[tuple[str, str], ...]
    measures: tuple[str, ...]
    models: tuple[str, ...]
    previous: int | None = None
    following: int | None = None


MEASURES = {
    "entropy": ("entropy of the cached entries", "nats"),
    "teacher_entropy": ("entropy of the teacher", "nats"),
    "teacher_loss": ("loss of the teacher", "nats"),
    "distance": ("cached entries against the teacher, total variation", ""),
    "student_entropy": ("entropy of the student", "nats"),
    "student_loss": ("loss of the student", "nats"),
    "kl": ("KL(teacher || student)", "nats"),
}
"""What a position can be coloured by: name and unit."""


class WindowViewer:
    """A cache with the models that are shown beside it; `view` makes one window ready.

    Args:
        dataset: the cache.
        tokenizer: of the cache, for its text; ids are shown by number when None.
        teacher: the cache's own, for the full distribution.
        student: a causal language model over the same ids.

    Raises:
        IdentityMismatchError: a tokenizer that is not the cache's.
    """

    def __init__(
        self,
        dataset: CacheDataset,
        *,
        tokenizer: Any | None = None,
        teacher: Engine | None = None,
        student: nn.Module | None = None,
    ) -> None:
        if tokenizer is not None:
            recorded = dataset.cache.recorded_tokenizer()
            require_tokenizer(tokenizer, dataset.identity.tokenizer, recorded)
        self.dataset, self.tokenizer, self.teacher = dataset, tokenizer, teacher
        self.student = None if student is None else StudentLogits(student.eval())

    def view(self, window: int) -> WindowView:
        """A window by its number in the corpus.

        Raises:
            CacheError: the cache does not hold it.
            CacheCorruptionError: it does not read back.
            InvalidArgumentError: a student with fewer ids than the teacher.
        """
        cache = self.dataset.cache
        place = self.require(window)
        item = self.dataset[place]
        record = cache.read(place)
        around = [
            cache.window_index(i) if 0 <= i < len(cache) else None for i in (place - 1, place + 1)
        ]
        tokens = record.tokens.tolist()
        return WindowView(
            index=window,
            tokens=tuple(tokens),
            document_starts=tuple(record.document_starts.tolist()),
            positions=tuple(self._positions(item)),
            texts=TokenTexts(self.tokenizer, tokens),
            facts=self._facts(record.teacher_loss, record.teacher_entropy),
            measures=tuple(self._measures()),
            models=tuple(self._models()),
            previous=around[0],
            following=around[1],
        )

    def require(self, window: int) -> int:
        """The place of a window among those present. Raises CacheError where it is not."""
        cache = self.dataset.cache
        place = bisect_left(range(len(cache)), window, key=cache.window_index)
        if place == len(cache) or cache.window_index(place) != window:
            raise CacheError(_not_there(self.dataset, window))
        return place

    def _models(self) -> list[str]:
        named = {"teacher": self.teacher, "student": self.student}
        return [name for name, model in named.items() if model is not None]

    def _measures(self) -> list[str]:
        needed = {"distance": ["teacher"], "kl": ["teacher", "student"]}
        present = self._models()
        return [
            name
            for name in MEASURES
            if all(
                model in present
                for model in needed.get(name, [m for m in ("teacher", "student") if m in name])
            )
        ]

    def _facts(self, loss: float, entropy: float) -> tuple[tuple[str, str], ...]:
        identity = self.dataset.identity
        facts = [
            ("cache", str(self.dataset.cache.root)),
            ("teacher", identity.teacher_in_words()),
            ("sampler", identity.sampler_in_words()),
            ("teacher's loss here", f"{loss:.3f} nats"),
            ("teacher's entropy here", f"{entropy:.3f} nats"),
        ]
        if identity.temperature != 1:
            facts.append(("temperature", f"{identity.temperature:g}, the teacher's throughout"))
        return tuple(facts)

    @torch.no_grad()
    def _positions(self, item: Mapping[str, Any]) -> list[Position]:
        found: list[Position] = []
        targets: SparseTargets = item["targets"]
        over = None if self.student is None else self.student.over(model_inputs(item))
        temperature = float(self.dataset.identity.temperature)
        for run, logits in teacher_slices(self.teacher, item):
            teacher = None if logits is None else Distribution.of(logits / temperature)
            student = None if over is None else Distribution.of(over(run))
            labels = item["shift_labels"][run].tolist()
            found += _positions_of(targets[run], labels, teacher, student)
        return found


@dataclass(frozen=True)
class Distribution:
    """A model's whole distribution over a run of positions.

    Args:
        log_p: float32 [P, V].
        entropy: [P], nats.
        likeliest: [P, K], ids by descending probability.
    """

    log_p: Tensor
    entropy: Tensor
    likeliest: Tensor

    @staticmethod
    def of(logits: Tensor) -> Distribution:
        """From float [P, V]; -inf where an id is no token."""
        log_p = logits.float().log_softmax(1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)
        likeliest = log_p.topk(min(LIKELIEST, log_p.shape[1]), 1).indices
        return Distribution(log_p, -terms.sum(1), likeliest)


def targets_entropy(targets: SparseTargets) -> Tensor:
    """float32 [P]: entropy of the cached entries themselves, nats, weights divided by their sum.

    The plug-in estimate of the teacher's entropy. It lies below it, the more so the fewer the
    entries: of what was not drawn it knows nothing, and K entries never give more than log K.
    """
    mass = targets.mass().clamp_min(torch.finfo(torch.float32).tiny)
    share = targets.weights / mass[targets.positions]
    terms = torch.where(share > 0, share * share.log(), 0.0)
    return -torch.zeros(len(targets)).index_add_(0, targets.positions, terms)


def _positions_of(
    targets: SparseTargets,
    labels: Sequence[int],
    teacher: Distribution | None,
    student: Distribution | None,
) -> list[Position]:
    entropy, mass = targets_entropy(targets).tolist(), targets.mass().tolist()
    if student is not None:
        require_ids(student.log_p.shape[1], targets.vocab_size)
    found = []
    for at, label in enumerate(labels):
        own = targets[at : at + 1]
        cached = dict(zip(own.ids.tolist(), own.weights.tolist(), strict=True))
        counts = {} if own.counts is None else dict(zip(cached, own.counts.tolist(), strict=True))
        ids = set(cached) | ({label} if label != IGNORE_INDEX else set())
        if own.entries or label != IGNORE_INDEX:
            for model in (teacher, student):
                ids |= set() if model is None else set(model.likeliest[at].tolist())
        p, q = _probabilities(teacher, at, ids), _probabilities(student, at, ids)
        rows = [Shown(i, cached.get(i), counts.get(i), p.get(i), q.get(i)) for i in ids]
        figures = {
            "entropy": entropy[at] if own.entries else None,
            **_figures(own, label, teacher, student, at),
        }
        found.append(
            Position(
                label=None if label == IGNORE_INDEX else label,
                rows=_largest(rows, label),
                entries=own.entries,
                mass=mass[at],
                figures=figures,
            )
        )
    return found


def _probabilities(model: Distribution | None, at: int, ids: set[int]) -> dict[int, float]:
    if model is None or not ids:
        return {}
    known = [i for i in sorted(ids) if i < model.log_p.shape[1]]
    values = model.log_p[at, torch.tensor(known, device=model.log_p.device)].exp()
    return dict(zip(known, values.tolist(), strict=True))


def _figures(
    own: SparseTargets,
    label: int,
    teacher: Distribution | None,
    student: Distribution | None,
    at: int,
) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        if model is not None:
            figures[f"{name}_entropy"] = float(model.entropy[at])
            known = label != IGNORE_INDEX
            figures[f"{name}_loss"] = float(-model.log_p[at, label]) if known else None
    if teacher is not None and own.entries:
        p = teacher.log_p[at].exp()
        ids = own.ids.to(p.device)
        drawn = p[ids]
        gap = (own.weights.to(p.device) - drawn).abs().sum() + (1 - drawn.sum()).clamp_min(0)
        figures["distance"] = float(gap) / 2
    if teacher is not None and student is not None:
        log_p = teacher.log_p[at]
        log_q = student.log_p[at, : len(log_p)].to(log_p.device)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        figures["kl"] = max(0.0, float(terms.sum()))
    return figures


def _largest(rows: list[Shown], label: int) -> tuple[Shown, ...]:
    """The likeliest ids first, by the teacher where it is known, at most `LARGEST` of them."""

    def rank(row: Shown) -> tuple[float, float, int]:
        first = row.teacher if row.teacher is not None else row.weight or 0.0
        return (-first, -(row.student or 0.0), row.id)

    ranked = sorted(rows, key=rank)
    kept = ranked[:LARGEST]
    return tuple(kept + [row for row in ranked[LARGEST:] if row.id == label])


def _not_there(dataset: CacheDataset, window: int) -> str:
    ranges = dataset.cache.finished()
    held = ", ".join(f"{start}:{stop}" for start, stop in _joined(ranges)[:4])
    return (
        f"the cache at {dataset.cache.root} does not hold window {window}; it holds {held}"
        f"{', ...' if len(_joined(ranges)) > 4 else ''} (first:one past the last)"
    )


def _joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined
