"""Render a page that compares one window of a cache with the predictions of models.

Logits are in memory for one slice of positions at a time.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselogits.corpus import require_tokenizer
from sparselogits.data import CacheDataset
from sparselogits.errors import CacheError
from sparselogits.evaluate.passes import (
    StudentLogits,
    model_inputs,
    require_ids,
    teacher_slices,
    without_padding,
)
from sparselogits.lab.report.page import render_page
from sparselogits.lab.report.tokens import TokenTexts
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.store.ranges import joined, ranges_in_words
from sparselogits.store.records import WindowRecord
from sparselogits.targets import SparseTargets
from sparselogits.teacher import Engine
from sparselogits.wording import counted

LIKELIEST = 10
"""Number of most likely ids per model, added to the cached ids before `LARGEST` applies."""

LARGEST = 64
"""Largest number of ids shown per position, besides the label; others are summed in one row."""


@dataclass(frozen=True)
class Shown:
    """Values displayed for one token id at one position.

    Args:
        id: id in the vocabulary.
        weight: weight of the cached entry; None if the id is not cached.
        count: number of rounds in which the id was drawn; None without rounds.
        teacher: probability that the teacher assigns to the id; None without a teacher.
        student: probability that the student assigns to the id; None without a student.
    """

    id: int
    weight: float | None = None
    count: int | None = None
    teacher: float | None = None
    student: float | None = None


@dataclass(frozen=True)
class Position:
    """Predictions of the cache and the models for the token that a position predicts.

    Args:
        label: id of the token that the position predicts; None if the position has no label.
        rows: displayed ids, including the label, in descending order of the teacher's probability,
            or of the cached weight without a teacher.
        entries: number of cached entries.
        mass: sum of the weights of all cached entries.
        metrics: values by the names in `MEASURES`; an undefined value is None or absent.
    """

    label: int | None
    rows: tuple[Shown, ...]
    entries: int
    mass: float
    metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class WindowView:
    """Content of a window's page.

    Args:
        index: index of the window in the corpus.
        tokens: ids of the tokens that the teacher read; without padding if windows have one
            document each.
        document_starts: positions at which documents start.
        positions: predictions at each position.
        texts: texts of the tokens.
        facts: pairs of name and value about the cache and the models.
        measures: names of the available measures, in the order of `MEASURES`.
        models: names of the given models, "teacher" and "student".
        previous: index of the previous window in the cache; None for the first window.
        following: index of the next window in the cache; None for the last window.
        predicted_at: for each token, the position that predicts it; None if no position does.
        chosen: for each token, whether it was chosen for prediction; None unless the teacher is a
            masked language model.
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
    predicted_at: tuple[int | None, ...] = ()
    chosen: tuple[bool, ...] | None = None


MEASURES = {
    "entropy": ("entropy of the cached entries", "nats"),
    "teacher_entropy": ("entropy of the teacher", "nats"),
    "teacher_loss": ("loss of the teacher", "nats"),
    "distance": ("total variation distance of the cached entries and the teacher", ""),
    "student_entropy": ("entropy of the student", "nats"),
    "student_loss": ("loss of the student", "nats"),
    "kl": ("KL(teacher || student)", "nats"),
}
"""Title and unit of the measures by which positions can be coloured, by name."""


class WindowViewer:
    """Cache with models, whose predictions are compared with the windows of the cache.

    Args:
        dataset: dataset of one cache.
        tokenizer: tokenizer of the cache; None to show ids instead of texts.
        teacher: teacher of the cache; None to show no probabilities of the teacher.
        student: language model of the kind and with the ids of the cache, set to eval mode; None to
            show no student.

    Raises:
        InvalidArgumentError: If the dataset mixes several caches, or the student is causal and the
            cache that of a masked teacher, or the reverse.
        IdentityMismatchError: If the tokenizer is not the tokenizer of the cache.
    """

    def __init__(
        self,
        dataset: CacheDataset,
        *,
        tokenizer: Any | None = None,
        teacher: Engine | None = None,
        student: nn.Module | None = None,
    ) -> None:
        cache = dataset.only_cache("shown")
        if tokenizer is not None:
            recorded = cache.recorded_tokenizer()
            require_tokenizer(tokenizer, dataset.identity.tokenizer, recorded)
        self.dataset, self.tokenizer, self.teacher = dataset, tokenizer, teacher
        self.student = None
        if student is not None:
            masked = dataset.identity.objective is not None
            self.student = StudentLogits(student.eval(), masked=masked)

    def view(self, window: int) -> WindowView:
        """Compare a window with the models.

        Args:
            window: index of the window in the corpus.

        Raises:
            CacheError: If the cache does not contain the window.
            CacheCorruptionError: If the window cannot be read.
            InvalidArgumentError: If the student has fewer ids than the teacher.
        """
        cache = self.dataset.cache
        position = self.require(window)
        item = without_padding(self.dataset[position])
        record = cache.read(position)
        previous, following = (
            cache.window_index(i) if 0 <= i < len(cache) else None
            for i in (position - 1, position + 1)
        )
        tokens = item["input_ids"].tolist()
        length = len(tokens)
        position_of = self.dataset.identity.predicts.at_tokens(np.arange(length), -1)
        return WindowView(
            index=window,
            tokens=tuple(tokens),
            document_starts=tuple(at for at in record.document_starts.tolist() if at < length),
            positions=tuple(self._positions(item)),
            texts=TokenTexts(self.tokenizer, tokens),
            facts=self._facts(record, padding=len(record.tokens) - length),
            measures=tuple(self._measures()),
            models=tuple(self._models()),
            previous=previous,
            following=following,
            predicted_at=tuple(at if at >= 0 else None for at in position_of.tolist()),
            chosen=None if record.inputs is None else tuple(record.present()[:length].tolist()),
        )

    def require(self, window: int) -> int:
        """Return the position in the cache at which a window is stored.

        Args:
            window: index of the window in the corpus.

        Raises:
            CacheError: If the cache does not contain the window.
        """
        cache = self.dataset.cache
        position = bisect_left(range(len(cache)), window, key=cache.window_index)
        if position == len(cache) or cache.window_index(position) != window:
            raise CacheError(
                f"the cache at {cache.root} does not contain window {window}; it contains windows "
                f"{ranges_in_words(joined(cache.finished()))}. Give one of these"
            )
        return position

    def _models(self) -> list[str]:
        return [name for name in ("teacher", "student") if getattr(self, name) is not None]

    def _measures(self) -> list[str]:
        """Return the names of the measures that can be computed with the given models."""
        needed = {"distance": {"teacher"}, "kl": {"teacher", "student"}}
        for name in MEASURES:
            needed.setdefault(name, {m for m in ("teacher", "student") if m in name})
        return [name for name in MEASURES if needed[name] <= set(self._models())]

    def _facts(self, record: WindowRecord, padding: int) -> tuple[tuple[str, str], ...]:
        identity = self.dataset.identity
        facts = [
            ("cache", str(self.dataset.cache.root)),
            ("teacher", identity.teacher_in_words()),
            ("sampler", identity.sampler_in_words()),
            ("teacher's loss on this window", f"{record.teacher_loss:.3f} nats"),
            ("teacher's entropy on this window", f"{record.teacher_entropy:.3f} nats"),
        ]
        if padding:
            facts.append(("padding, not shown", counted(padding, "token")))
        if identity.temperature != 1:
            facts.append(("temperature", f"{identity.temperature:g}, of the teacher"))
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
    """Full distribution of a model at P positions.

    Args:
        log_p: log-probabilities, float32 [P, V].
        entropy: entropy per position in nats, float32 [P].
        likeliest: most likely ids in descending order of probability, int64 [P, K].
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
    """Compute the entropy of the normalised weights per position in nats, float32 [P].

    The entropy of K entries is at most log K, even where the teacher's entropy is larger.
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
    """Compare the targets of consecutive positions with the models and the predicted tokens."""
    entropy, mass = targets_entropy(targets).tolist(), targets.mass().tolist()
    if student is not None:
        require_ids(student.log_p.shape[1], targets.vocab_size)
    found = []
    for at, label in enumerate(labels):
        target = targets[at : at + 1]
        cached = dict(zip(target.ids.tolist(), target.weights.tolist(), strict=True))
        counts: dict[int, int] = {}
        if target.counts is not None:
            counts = dict(zip(cached, target.counts.tolist(), strict=True))
        ids = set(cached) | ({label} if label != IGNORE_INDEX else set())
        if target.entries or label != IGNORE_INDEX:
            for model in (teacher, student):
                ids |= set() if model is None else set(model.likeliest[at].tolist())
        p, q = _probabilities(teacher, at, ids), _probabilities(student, at, ids)
        rows = [Shown(i, cached.get(i), counts.get(i), p.get(i), q.get(i)) for i in ids]
        metrics = {"entropy": entropy[at] if target.entries else None}
        metrics |= _model_metrics(target, label, teacher, student, at)
        known = None if label == IGNORE_INDEX else label
        found.append(Position(known, _largest(rows, label), target.entries, mass[at], metrics))
    return found


def _probabilities(model: Distribution | None, at: int, ids: set[int]) -> dict[int, float]:
    if model is None or not ids:
        return {}
    known = [i for i in sorted(ids) if i < model.log_p.shape[1]]
    values = model.log_p[at, torch.tensor(known, device=model.log_p.device)].exp()
    return dict(zip(known, values.tolist(), strict=True))


def _model_metrics(
    target: SparseTargets,
    label: int,
    teacher: Distribution | None,
    student: Distribution | None,
    at: int,
) -> dict[str, float | None]:
    """Compute the measures that need a model, at index `at` of the distributions."""
    metrics: dict[str, float | None] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        if model is not None:
            metrics[f"{name}_entropy"] = float(model.entropy[at])
            has_label = label != IGNORE_INDEX
            metrics[f"{name}_loss"] = float(-model.log_p[at, label]) if has_label else None
    if teacher is not None and target.entries:
        p = teacher.log_p[at].exp()
        cached = p[target.ids.to(p.device)]
        gap = (target.weights.to(p.device) - cached).abs().sum() + (1 - cached.sum()).clamp_min(0)
        metrics["distance"] = float(gap) / 2
    if teacher is not None and student is not None:
        log_p = teacher.log_p[at]
        log_q = student.log_p[at, : len(log_p)].to(log_p.device)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        metrics["kl"] = max(0.0, float(terms.sum()))
    return metrics


def _largest(rows: list[Shown], label: int) -> tuple[Shown, ...]:
    """Return the first `LARGEST` rows and the label's row, in descending order of probability.

    The probability is the teacher's, or the cached weight where that of the teacher is unknown.
    """

    def rank(row: Shown) -> tuple[float, float, int]:
        first = row.teacher if row.teacher is not None else row.weight or 0.0
        return (-first, -(row.student or 0.0), row.id)

    ranked = sorted(rows, key=rank)
    return tuple(row for i, row in enumerate(ranked) if i < LARGEST or row.id == label)


def view_page(view: WindowView, *, rounds: int | None, link: str | None = None) -> str:
    """Return the page of a window as HTML.

    Args:
        view: the window.
        rounds: number of rounds per position in the cache; None for a sampler without rounds.
        link: URL of other windows with a placeholder for the index, such as `/window/{}`; None for
            a page without links.
    """
    title = f"Window {view.index}"
    near = (("← previous", view.previous, "prev"), ("next →", view.following, "next"))
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
        "predicted_at": list(view.predicted_at),
        "chosen": None if view.chosen is None else list(view.chosen),
        "positions": [_position(position) for position in view.positions],
    }


def _position(position: Position) -> dict[str, Any]:
    return {
        "label": position.label,
        "entries": position.entries,
        "mass": _short(position.mass),
        "metrics": {name: _short(value) for name, value in position.metrics.items()},
        "rows": [
            [row.id, _short(row.weight), row.count, _short(row.teacher), _short(row.student)]
            for row in position.rows
        ],
    }


def _short(value: float | None) -> float | None:
    """Round to five significant digits; return None for None and for a value that is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")
