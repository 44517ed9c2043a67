"""The page of a window of a cache: at each position what was cached, compared with the models.

A `WindowView` holds plain values per position: the true next token, the cached entries, and, for
each given model, its probability of each of these ids and of the ids that it finds likeliest.
Logits exist one slice of positions at a time. The page is one file, or served on loopback.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparselogits.corpus import require_tokenizer
from sparselogits.data import CacheDataset
from sparselogits.errors import CacheError
from sparselogits.evaluate.passes import StudentLogits, model_inputs, require_ids, teacher_slices
from sparselogits.lab.report.page import render_page
from sparselogits.lab.report.tokens import TokenTexts
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.targets import SparseTargets
from sparselogits.teacher import Engine

LIKELIEST = 10
"""Number of the likeliest ids of each model that are shown with the cached ones."""

LARGEST = 64
"""Largest number of ids shown per position; the others are summed in one row."""


@dataclass(frozen=True)
class Shown:
    """One id at one position.

    Args:
        id: id in the vocabulary.
        weight: weight of the cached entry; None if the id was not cached.
        count: number of the rounds that drew the id; None without rounds.
        teacher: the teacher's probability of the id; None without a teacher.
        student: the student's probability of the id; None without a student.
    """

    id: int
    weight: float | None = None
    count: int | None = None
    teacher: float | None = None
    student: float | None = None


@dataclass(frozen=True)
class Position:
    """Hold what the cache and the models predict for the token after one position.

    Args:
        label: id of that token; None if there is none to learn.
        rows: ids, the likeliest first; the label is among them.
        entries: number of cached entries.
        mass: sum of all cached weights.
        figures: values by the names of `MEASURES`; None if a value does not exist.
    """

    label: int | None
    rows: tuple[Shown, ...]
    entries: int
    mass: float
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowView:
    """One window with everything that its page shows.

    Args:
        index: number of the window in the corpus.
        tokens: ids of the tokens.
        document_starts: positions at which a document starts.
        positions: one per token.
        texts: texts of the tokens.
        facts: (name, value) pairs about the cache and the models.
        measures: names of the available measures, in the order of `MEASURES`.
        models: which of "teacher" and "student" are given.
        previous: number of the window before this one in the cache; None for the first.
        following: number of the window after this one in the cache; None for the last.
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
"""Measures by which positions can be coloured: name and unit."""


class WindowViewer:
    """A cache with the models that are compared with it; `view` returns one window.

    Args:
        dataset: the cache.
        tokenizer: tokenizer of the cache; None to show ids by number.
        teacher: teacher of the cache, for the full distribution.
        student: a causal language model over the same ids.

    Raises:
        IdentityMismatchError: the tokenizer is not that of the cache.
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
        """Return a window by its number in the corpus.

        Raises:
            CacheError: the cache does not hold the window.
            CacheCorruptionError: the window cannot be read.
            InvalidArgumentError: the student has fewer ids than the teacher.
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
        """Return the index of a window among those of the cache. Raises CacheError."""
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
    """The full distribution of a model at consecutive positions.

    Args:
        log_p: log probabilities, float32 [P, V].
        entropy: entropies in nats, [P].
        likeliest: ids by descending probability, [P, K].
    """

    log_p: Tensor
    entropy: Tensor
    likeliest: Tensor

    @staticmethod
    def of(logits: Tensor) -> Distribution:
        """Compute the distribution from logits, float [P, V]; -inf where an id is not a token."""
        log_p = logits.float().log_softmax(1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)
        likeliest = log_p.topk(min(LIKELIEST, log_p.shape[1]), 1).indices
        return Distribution(log_p, -terms.sum(1), likeliest)


def targets_entropy(targets: SparseTargets) -> Tensor:
    """Return the entropy of the cached entries, normalised, in nats, float32 [P].

    This is the plug-in estimate of the teacher's entropy. It is too low, the more so the fewer the
    entries: K entries never give more than log K.
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
    """Return the likeliest ids, by the teacher if it is given, at most `LARGEST` and the label."""

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
    """Return ranges with adjacent ones merged."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def view_page(view: WindowView, *, rounds: int | None, link: str | None = None) -> str:
    """Return the page of a window.

    Args:
        view: the window.
        rounds: rounds of the cache; None if it draws none.
        link: address of other windows with a placeholder for the number (`/window/{}`).
    """
    title = f"Window {view.index}"
    near = (("← before", view.previous, "prev"), ("next →", view.following, "next"))
    return render_page(
        "view.html",
        "view",
        title=f"{title} of {view.facts[0][1]}",
        data=_data(view, rounds),
        heading=title,
        summary=f"{len(view.tokens)} tokens of {view.facts[0][1]}",
        facts=view.facts,
        links=[
            (relation, link.format(window), name)
            for name, window, relation in near
            if link is not None and window is not None
        ],
    )


def _data(view: WindowView, rounds: int | None) -> dict[str, Any]:
    ids = {row.id for position in view.positions for row in position.rows}
    measures = [dict(zip(("name", "unit"), MEASURES[k], strict=True), key=k) for k in view.measures]
    return {
        "tokens": view.texts.running(),
        "starts": list(view.document_starts),
        "texts": {token: view.texts.alone(token) for token in sorted(ids)},
        "measures": measures,
        "models": list(view.models),
        "rounds": rounds,
        "positions": [_position(position) for position in view.positions],
    }


def _position(position: Position) -> dict[str, Any]:
    return {
        "label": position.label,
        "entries": position.entries,
        "mass": _short(position.mass),
        "figures": {name: _short(value) for name, value in position.figures.items()},
        "rows": [
            [row.id, _short(row.weight), row.count, _short(row.teacher), _short(row.student)]
            for row in position.rows
        ],
    }


def _short(value: float | None) -> float | None:
    """Round to five digits; what is not finite, which JSON has no number for, becomes None."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
