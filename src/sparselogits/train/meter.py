"""What a log line reports besides the loss, summed without waiting for the device.

    kd                  cross-entropy to the target (divergence, with the teacher online), nats
    ce                  cross-entropy to the label, nats
    kl                  KL(teacher || student), nats: kd less the teacher's entropy
    entries             stored entries a position
    tokens_per_second   over all ranks, evaluation and saving after a log line left out
    data_seconds        time a rank waited for batches, mean over ranks

The cache holds a teacher's entropy as one mean a window, over all its positions; the few without a
label (the window's last one) are in that mean and not in kd, which `kl` overlooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_SUMS = ("kd", "ce", "entropy", "entries", "positions", "tokens")


class LossMeter:
    """Sums since the last log line; in place in one vector, so a compiled forward can add to it."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(_SUMS))
        self._present: frozenset[str] = frozenset()
        self._waited = 0.0
        self._began: float | None = None

    def add(self, **values: Tensor | int | None) -> None:
        """Add sums over a batch's positions, by the names in `_SUMS`; None where there is none."""
        given = {name: value for name, value in values.items() if value is not None}
        device = next(v.device for v in given.values() if isinstance(v, Tensor))
        if self._sums.device != device:
            self._sums = self._sums.to(device)
        self._sums += torch.stack([_scalar(given.get(name, 0), device) for name in _SUMS])
        self._present = frozenset(given)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        started = time.perf_counter()
        if self._began is None:
            self._began = started
        yield
        self._waited += time.perf_counter() - started

    def take(self, gather: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The figures of a log line since the last one, see the module's docstring.

        Args:
            gather: sums a vector over all ranks; called on every rank or on none.
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
        positions, tokens = sums.pop("positions"), sums.pop("tokens")
        if not positions:
            return {}
        means = {name: value / positions for name, value in sums.items() if name in present}
        entropy = means.pop("entropy", None)
        if entropy is not None and "kd" in means:
            means["kl"] = means["kd"] - entropy
        if timed and seconds > 0:
            means |= {"tokens_per_second": tokens / seconds, "data_seconds": waited / ranks}
        return means


def _scalar(value: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().float()
    return torch.full((), float(value), device=device)  # filled there: copying it would wait
