"""Compute the records of a range of windows by running the teacher and sampling targets.

Up to rounding, which depends on the device, the result does not depend on the worker or on other
ranges: batches start at the first window of the range and do not extend beyond the end of the
range, and uniforms are keyed by seed and window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparselogits.caching.teacher_input import TeacherInput
from sparselogits.corpus import Window
from sparselogits.corruption import Corruption
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.samplers import (
    DistributionStatistics,
    Sampler,
    draw_with_statistics,
    window_uniforms,
)
from sparselogits.store import WindowRecord
from sparselogits.targets import SparseTargets, offsets_from_lengths
from sparselogits.teacher.engine import Engine, logits_at


@dataclass(frozen=True)
class DrawSettings:
    """Sampling settings of one cache.

    Args:
        sampler: sampler of the targets.
        seed: random seed for sampling.
        temperature: divisor of the teacher's logits.
    """

    sampler: Sampler
    seed: int
    temperature: float


@dataclass
class _WindowInProgress:
    """Targets and sums of one window, collected while its slices of positions are computed."""

    targets: list[list[SparseTargets]]  # per draw, the targets of each slice
    nll: float = 0.0  # sum of the negative log-likelihoods of the labels, in nats
    labelled: int = 0  # number of positions with a label
    entropies: list[float] = field(default_factory=list)  # per draw, sum in nats
    carried: int = 0  # number of positions with a target


def compute_range(
    engine: Engine,
    windows: Sequence[Window],
    draws: Sequence[DrawSettings],
    *,
    batch: int,
    reset_attention: bool,
    corruption: Corruption | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[WindowRecord]]:
    """Return the records of a range of windows, one list per draw.

    Each forward pass serves all draws. Arguments are those of `build_caches`, except:

    Args:
        windows: windows of the range, in order.
        draws: sampling settings of each cache.
        reset_attention: whether attention restarts at document starts.
        progress: called after each batch with its number of windows.
    """
    records: list[list[WindowRecord]] = [[] for _ in draws]
    for first in range(0, len(windows), batch):
        group = [TeacherInput.of(w, corruption) for w in windows[first : first + batch]]
        for of_window in _compute_batch(engine, group, draws, reset_attention):
            for column, record in zip(records, of_window, strict=True):
                column.append(record)
        if progress is not None:
            progress(len(group))
    return records


def _compute_batch(
    engine: Engine,
    batch: Sequence[TeacherInput],
    draws: Sequence[DrawSettings],
    reset_attention: bool,
) -> Iterator[list[WindowRecord]]:
    """Run one forward pass, and yield each window's records, one per draw."""
    tokens = torch.stack([own.inputs for own in batch])
    starts = [own.window.document_starts for own in batch] if reset_attention else None
    length, longest = tokens.shape[1], max(own.length for own in batch)
    tokens, attention_mask = tokens[:, :longest], None
    # a causal model reads no padding before it, so its engine needs no mask
    if batch[0].corrupted is not None and any(own.length < longest for own in batch):
        lengths = torch.tensor([own.length for own in batch])
        attention_mask = (torch.arange(longest) < lengths[:, None]).long()
    uniforms: list[Tensor] = []
    current = _WindowInProgress([])
    wanted = torch.stack([own.carries[:longest] for own in batch])
    for piece in logits_at(engine, tokens, starts, wanted, attention_mask):
        given = batch[piece.row]
        if piece.positions.start == 0:
            current = _WindowInProgress([[] for _ in draws], entropies=[0.0] * len(draws))
            uniforms = [
                window_uniforms(d.seed, given.window.index, length, d.sampler.uniforms_per_position)
                for d in draws
            ]
        _take_slice(current, piece.logits, piece.positions, given, draws, uniforms)
        if piece.positions.stop == longest:
            if longest < length:  # the padding has no entries
                for targets in current.targets:
                    targets.append(_spread_over(targets[0][:0], torch.zeros(length - longest) > 0))
            yield _finish(given, current)


def _take_slice(
    current: _WindowInProgress,
    logits: Tensor,
    positions: slice,
    given: TeacherInput,
    draws: Sequence[DrawSettings],
    uniforms: Sequence[Tensor],
) -> None:
    """Sample targets at a slice of positions, and add the results to `current`.

    The logits [C, V] are those of the positions in the slice that carry a target.
    """
    kept = given.carries[positions]
    carrying = torch.arange(positions.start, positions.stop)[kept]
    current.carried += len(logits)
    statistics: dict[float, DistributionStatistics] = {}
    for column, draw in enumerate(draws):
        T = draw.temperature
        scaled = logits if T == 1.0 else logits / T
        sampler = draw.sampler.at(given.inputs[: given.length], carrying)
        share = uniforms[column][positions][kept].to(logits.device)
        if T in statistics:
            drawn = sampler(scaled, share)
        else:
            drawn, statistics[T] = draw_with_statistics(sampler, scaled, share)
        current.targets[column].append(_spread_over(drawn.to("cpu"), kept))
        current.entropies[column] += float(statistics[T].entropy.sum())
    plain = statistics[1.0] if 1.0 in statistics else DistributionStatistics.of(logits)
    labels = given.labels[carrying].to(logits.device)
    labelled = labels != IGNORE_INDEX
    label_logits = logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    nll = plain.log_normaliser - label_logits.double()
    current.nll += float(nll[labelled].sum())
    current.labelled += int(labelled.sum())


def _spread_over(drawn: SparseTargets, kept: Tensor) -> SparseTargets:
    """Expand the targets of the positions in `kept`, bool [P], to all P positions."""
    if bool(kept.all()):
        return drawn
    lengths = torch.zeros(len(kept), dtype=torch.int64)
    lengths[kept] = drawn.entries_per_position
    return replace(drawn, offsets=offsets_from_lengths(lengths), check=False)


def _finish(given: TeacherInput, done: _WindowInProgress) -> list[WindowRecord]:
    """Return the records of a window, one per draw."""
    window, corrupted = given.window, given.corrupted
    return [
        WindowRecord(
            window_index=window.index,
            tokens=window.tokens,
            document_starts=window.document_starts,
            mask=window.mask if corrupted is None else corrupted.chosen,
            targets=SparseTargets.cat(pieces),
            teacher_loss=done.nll / max(1, done.labelled),
            teacher_entropy=entropy_sum / max(1, done.carried),
            inputs=None if corrupted is None else corrupted.inputs,
            rate=None if corrupted is None else corrupted.rate,
        )
        for pieces, entropy_sum in zip(done.targets, done.entropies, strict=True)
    ]
