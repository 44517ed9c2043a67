"""Accumulate the metrics of a log line, except the loss, without waiting for the device.

Losses are means over positions with a label, in masked diffusion weighted by the windows' loss
weights; the cosine loss is a mean over all positions that are not padding.

    kd                  cross-entropy to the cached target, or in training divergence from the
                        online teacher, nats
    ce                  cross-entropy to the label, nats
    kl                  KL(teacher || student), nats: kd minus the cached teacher's entropy, for
                        unbiased targets
    cosine              1 - cosine of the last hidden states of student and online teacher
    entries             stored entries per position with a label, without loss weights
    tokens_per_second   tokens per second over all ranks; the time from a log line to the next batch
                        (evaluation, saving) does not count
    data_seconds        seconds that a rank waited for batches, mean over ranks

The cached teacher's entropy is a mean over the positions of a window with a target. Those without a
label count in that mean but not in `kd`; `kl` ignores the difference. For several teachers, `kl` is
the mean of their divergences, by weight. A retokenized cache, whose entropy is unknown, has no
`kl`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_SUMS = ("kd", "ce", "cosine", "entropy", "entries", "positions", "labelled", "tokens")


class LossMeter:
    """Accumulator of losses and counts over positions, and of the time spent waiting for data.

    `take` returns the metrics. The sums are elements of one tensor, which a compiled forward can
    update.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(len(_SUMS))
        self._present: frozenset[str] = frozenset()
        self._waited = 0.0
        self._began: float | None = None

    def add(self, **values: Tensor | int | None) -> None:
        """Add the sums of a batch.

        Args:
            values: sums over the positions of the batch, by the names in `_SUMS`; None for a sum
                that the training method does not have.
        """
        given = {name: value for name, value in values.items() if value is not None}
        device = next(v.device for v in given.values() if isinstance(v, Tensor))
        if self._sums.device != device:
            self._sums = self._sums.to(device)
        self._sums += torch.stack([_scalar(given.get(name, 0), device) for name in _SUMS])
        self._present = frozenset(given)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in the `with` block as waiting for data."""
        started = time.perf_counter()
        if self._began is None:
            self._began = started
        yield
        self._waited += time.perf_counter() - started

    def take(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the metrics since the last call, and reset the sums.

        Args:
            gather: function that sums a vector over all ranks; called on every rank or on none.

        Returns:
            The metrics that the module's docstring lists, by name; empty if no position was added.
        """
        now = time.perf_counter()
        seconds = now - self._began if self._began is not None else 0.0
        clock = self._sums.new_tensor([1.0, self._waited])
        line = torch.cat([self._sums, clock])
        if gather is not None:
            line = gather(line)
        *totals, ranks, waited = line.tolist()
        sums = dict(zip(_SUMS, totals, strict=True))
        present, timed = self._present, self._began is not None
        self._sums.zero_()
        self._present, self._waited, self._began = frozenset(), 0.0, None
        positions, labelled, tokens = (sums.pop(n) for n in ("positions", "labelled", "tokens"))
        if not positions:
            return {}
        means = {name: value / positions for name, value in sums.items() if name in present}
        if "entries" in means:
            means["entries"] = sums["entries"] / labelled
        entropy = means.pop("entropy", None)
        if entropy is not None and "kd" in means:
            means["kl"] = means["kd"] - entropy
        if timed and seconds > 0:
            means |= {"tokens_per_second": tokens / seconds, "data_seconds": waited / ranks}
        return means


def _scalar(value: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().float()
    # a copy from the host would wait for the device
    return torch.full((), float(value), device=device)
