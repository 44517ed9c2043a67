"""Compute a shuffled order over windows instead of storing it.

The order of an epoch is a pseudo-random permutation of the windows: a Feistel network keyed by
(seed, epoch), walked until it lands inside the range (cycle walking; Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). Memory is constant, any position can be computed alone, and
all ranks agree without communication. The state is (identity, seed, epoch, next position), so a run
that stops on 8 ranks can continue on 6 or 16 and still visit every window exactly once.
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
    """A request for one window of a dataset, made by the order.

    Args:
        index: index of the window in the dataset.
        epoch: number of the epoch, which determines the noise of thinned targets.
        rounds: number of rounds to thin the targets to; None for all.
    """

    index: int
    epoch: int = 0
    rounds: int | None = None


@dataclass(frozen=True)
class WindowOrder:
    """A permutation of `range(windows)` for every epoch.

    Args:
        windows: number of windows.
        seed: random seed; two seeds give unrelated orders.
        identity: fingerprint of the cache; a state with another fingerprint is refused.
    """

    windows: int
    seed: int = 0
    identity: str = ""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InvalidArgumentError(f"an order needs at least one window, found {self.windows}")

    def __getitem__(self, position: tuple[int, int]) -> int:
        """Return the window at (epoch, position)."""
        epoch, value = position
        if not 0 <= value < self.windows:
            raise IndexError(f"position {value} of an order of {self.windows} windows")
        half = max(1, ((self.windows - 1).bit_length() + 1) // 2)
        while True:
            value = self._permute(epoch, value, half)
            if value < self.windows:
                return value

    def _permute(self, epoch: int, value: int, half: int) -> int:
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for turn in range(_FEISTEL_ROUNDS):
            message = f"{self.seed}/{epoch}/{turn}/{right}".encode()
            digest = hashlib.blake2b(message, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return left << half | right


class WindowSampler(Sampler[WindowRequest]):
    """The order as a sampler of torch's DataLoader, for one rank of several.

    Rank r of R takes positions r, r + R, r + 2 R, ... from the next position on. Every rank gets
    the same number of windows, so that ranks that wait for each other at every step end together:
    up to R - 1 windows are skipped at the end of an epoch, different ones in each epoch. With
    `drop_last=False` every window is visited once, and some ranks take one more than others.

    Args:
        order: the permutation.
        rank: this rank; 0 if a Trainer divides the windows itself.
        world_size: number of ranks.
        drop_last: skip the last windows of an epoch that are too few for one per rank.
        thinning: schedule of the rounds to keep; None for all.
        pace: optimiser step of each position; required if the rounds change over steps.

    Raises:
        InvalidArgumentError: the rank is not below `world_size`, or a schedule of several stages
            has no pace.
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
            raise InvalidArgumentError(f"rank {rank} is not in [0, {world_size})")
        if thinning is not None and len(thinning.stages) > 1 and pace is None:
            raise InvalidArgumentError(
                "a thinning schedule of several stages needs a pace and none was given; "
                "pass pace=Pace(...)"
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
        index = self.order[self.epoch, position]
        if self.thinning is None:
            return WindowRequest(index, self.epoch)
        step, steps = 0, 1
        if self.pace is not None:
            step, steps = self.pace.step_of(self.epoch, position), self.pace.steps
        noise = self.epoch if self.thinning.fresh_noise else 0
        return WindowRequest(index, noise, self.thinning.rounds_at(step, steps))

    def _positions(self) -> range:
        left = self.order.windows - self.next_position
        stop = self.order.windows - (left % self.world_size if self.drop_last else 0)
        return range(self.next_position + self.rank, stop, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch; keep the position if this epoch is already current."""
        if epoch != self.epoch:
            self.epoch, self.next_position = epoch, 0

    def state_dict(self, windows_taken: int = 0) -> dict[str, int | str]:
        """Return the state of the order for a checkpoint.

        Args:
            windows_taken: windows that all ranks together have trained on in this epoch since the
                sampler was made or loaded. Workers read ahead, so the sampler cannot count them.
        """
        return {
            "identity": self.order.identity,
            "windows": self.order.windows,
            "seed": self.order.seed,
            "epoch": self.epoch,
            "next_position": self.next_position + windows_taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint, on any number of ranks.

        Raises:
            InvalidArgumentError: the state belongs to another cache or seed, or is not a state.
        """
        order = self.order
        expected = {"identity": order.identity, "windows": order.windows, "seed": order.seed}
        differing = {k: (state.get(k), v) for k, v in expected.items() if state.get(k) != v}
        if differing:
            told = ", ".join(
                f"{k} {was!r} there, {now!r} here" for k, (was, now) in differing.items()
            )
            raise InvalidArgumentError(
                f"the saved order is of another cache or seed: {told}; resume with the same ones"
            )
        self.epoch, self.next_position = int(state["epoch"]), int(state["next_position"])
