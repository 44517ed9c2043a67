"""Compute a shuffled order over windows instead of storing it.

The order of an epoch is a pseudo-random permutation of the windows: a Feistel network keyed by
(seed, epoch) and applied repeatedly until the result is in range (cycle walking; Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002). Memory is constant, each position is computed
independently, and all ranks compute the same order without communication. The state does not depend
on the number of ranks, so a run that stops on 8 ranks can resume on 6 or 16, and still visits no
window twice per epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

from sparselogits.data.thinning import Pace, Schedule
from sparselogits.errors import InvalidArgumentError

_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class WindowRequest:
    """Request for a window of a `CacheDataset`, with its targets thinned to a number of rounds.

    Args:
        index: index of the window in the dataset.
        epoch: index of the epoch, from 0, which determines the rounds that thinning selects.
        rounds: number of rounds per position after thinning; None for all cached rounds.
    """

    index: int
    epoch: int = 0
    rounds: int | None = None


@dataclass(frozen=True)
class WindowOrder:
    """Permutations of `range(windows)`, one per epoch.

    Args:
        windows: number of windows, at least 1.
        seed: random seed of the permutations.
        identity: fingerprint of the cache, to be stored in checkpoints and compared on resuming.

    Raises:
        InvalidArgumentError: `windows` is below 1.

    Examples:
        >>> order = WindowOrder(5, seed=1)
        >>> sorted(order[0, position] for position in range(5))
        [0, 1, 2, 3, 4]
    """

    windows: int
    seed: int = 0
    identity: str = ""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InvalidArgumentError(
                f"an order has at least one window, found {self.windows}; pass windows >= 1"
            )

    def __getitem__(self, position: tuple[int, int]) -> int:
        """Return the index of the window at (epoch, position).

        Raises:
            IndexError: the position is not in [0, windows).
        """
        epoch, value = position
        if not 0 <= value < self.windows:
            raise IndexError(f"position {value} is out of range for {self.windows} windows")
        half = max(1, ((self.windows - 1).bit_length() + 1) // 2)
        while True:
            value = self._permute(epoch, value, half)
            if value < self.windows:
                return value

    def _permute(self, epoch: int, value: int, half: int) -> int:
        """Return the image of a value in [0, 4**half) under the epoch's Feistel network."""
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for turn in range(_FEISTEL_ROUNDS):
            message = f"{self.seed}/{epoch}/{turn}/{right}".encode()
            digest = hashlib.blake2b(message, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return left << half | right


class WindowSampler(Sampler[WindowRequest]):
    """Sampler for torch's DataLoader that yields one rank's share of an order.

    Rank r of R yields requests for the windows at positions r, r + R, r + 2 R, ... Every rank
    yields the same number, so that ranks that synchronise at every step finish together. Up to
    R - 1 windows are therefore skipped at the end of an epoch; which ones depends on the order of
    the epoch. With `drop_last=False` every window is visited, and some ranks may yield one window
    more than others.

    Args:
        order: order of the windows.
        rank: rank of this process; 0 if a Trainer distributes the windows.
        world_size: number of ranks.
        drop_last: whether to skip the last windows of an epoch if they are fewer than the ranks.
        thinning: schedule of the number of rounds; None for all cached rounds.
        pace: mapping from positions to optimiser steps; required if the schedule has several
            stages.

    Raises:
        InvalidArgumentError: the rank is not in [0, world_size), or a schedule of several stages
            has no pace.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from sparselogits import CacheDataset
        >>> from sparselogits.data import collate
        >>> cache = CacheDataset("my-cache")
        >>> sampler = WindowSampler(WindowOrder(len(cache), seed=1))
        >>> batches = DataLoader(cache, batch_size=4, sampler=sampler, collate_fn=collate)
    """

    def __init__(
        self,
        order: WindowOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        thinning: Schedule | None = None,
        pace: Pace | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(
                f"found rank {rank} of {world_size} ranks, expected a rank in [0, {world_size}); "
                "pass the rank and world size of the process group"
            )
        if thinning is not None and len(thinning.stages) > 1 and pace is None:
            raise InvalidArgumentError(
                "a thinning schedule with several stages requires a pace; pass pace=Pace(...)"
            )
        self.order = order
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.thinning, self.pace = thinning, pace
        self.epoch = 0
        self.next_position = 0

    def __len__(self) -> int:
        return len(self._positions())

    def __iter__(self) -> Iterator[WindowRequest]:
        for position in self._positions():
            yield self._request(position)

    def _request(self, position: int) -> WindowRequest:
        """Return the request for the window at a position of the current epoch."""
        index = self.order[self.epoch, position]
        if self.thinning is None:
            return WindowRequest(index, self.epoch)
        step, steps = 0, 1
        if self.pace is not None:
            step, steps = self.pace.step_of(self.epoch, position), self.pace.steps
        noise = self.epoch if self.thinning.fresh_noise else 0
        return WindowRequest(index, noise, self.thinning.rounds_at(step, steps))

    def _positions(self) -> range:
        """Return the remaining positions of this rank in the current epoch."""
        left = self.order.windows - self.next_position
        stop = self.order.windows - (left % self.world_size if self.drop_last else 0)
        return range(self.next_position + self.rank, stop, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch at its first position; do nothing if the epoch is the current one."""
        if epoch != self.epoch:
            self.epoch, self.next_position = epoch, 0

    def state_dict(self, windows_taken: int = 0) -> dict[str, int | str]:
        """Return the state for a checkpoint.

        Args:
            windows_taken: number of windows that all ranks together have trained on in this epoch
                since the sampler was created or loaded. The caller must count them, because
                DataLoader workers read ahead.
        """
        return {
            "identity": self.order.identity,
            "windows": self.order.windows,
            "seed": self.order.seed,
            "epoch": self.epoch,
            "next_position": self.next_position + windows_taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of a checkpoint, on any number of ranks.

        Args:
            state: a value that `state_dict` returned.

        Raises:
            InvalidArgumentError: the state belongs to another cache, number of windows or seed.
        """
        order = self.order
        expected = {"identity": order.identity, "windows": order.windows, "seed": order.seed}
        differing = {k: (state.get(k), v) for k, v in expected.items() if state.get(k) != v}
        if differing:
            listed = ", ".join(
                f"{k} is {was!r}, expected {now!r}" for k, (was, now) in differing.items()
            )
            raise InvalidArgumentError(
                f"the checkpoint's order belongs to another cache or seed: {listed}; resume with "
                "the same cache and seed"
            )
        self.epoch, self.next_position = int(state["epoch"]), int(state["next_position"])
