"""A shuffled order over windows that is computed, not stored.

The order of an epoch is a pseudo-random permutation of the windows: a Feistel network keyed by
(seed, epoch), walked until it lands inside the range (cycle walking; Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). Memory is constant, any position can be looked up alone, and
all ranks agree without talking. Its state is (identity, seed, epoch, next position), so a run that
stops on 8 ranks can go on with 6 or 16 and still visit every window exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

from sparselogits.errors import InvalidArgumentError

_FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class WindowRequest:
    """A window as the order asks a dataset for it.

    Args:
        index: of the window in the dataset.
        epoch: keys the noise of thinned targets.
        rounds: thin the window's targets to so many rounds; None leaves them.
    """

    index: int
    epoch: int = 0
    rounds: int | None = None


@dataclass(frozen=True)
class WindowOrder:
    """A permutation of `range(windows)` for every epoch.

    Args:
        windows: how many there are.
        seed: two seeds give unrelated orders.
        identity: fingerprint of the cache the windows are of; a state of another one is refused.
    """

    windows: int
    seed: int = 0
    identity: str = ""

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InvalidArgumentError(f"an order needs at least one window, found {self.windows}")

    def __getitem__(self, place: tuple[int, int]) -> int:
        """The window at (epoch, position)."""
        epoch, value = place
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
    """The order as torch's DataLoader wants it, for one rank of several.

    Rank r of R takes positions r, r + R, r + 2 R, ... from the next position on. Every rank gets
    equally many, so that ranks that wait for each other at every step end together: up to R - 1
    windows are left out at an epoch's end, others in each epoch. With `drop_last=False` none is:
    every window is visited exactly once, and some ranks take one window more than others.

    Args:
        order: the permutation.
        rank: this rank, when the caller divides the work itself (a Trainer divides it on its own).
        world_size: number of ranks.
        drop_last: leave out what does not divide by the ranks.
        rounds: thin targets to so many rounds.
        fresh_noise: keep other rounds each epoch; otherwise those of epoch 0 always.
    """

    def __init__(
        self,
        order: WindowOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        rounds: int | None = None,
        fresh_noise: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(f"rank {rank} does not lie in [0, {world_size})")
        self.order = order
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.rounds, self.fresh_noise = rounds, fresh_noise
        self.epoch = 0
        self.next_position = 0

    def __len__(self) -> int:
        return len(self._places())

    def __iter__(self) -> Iterator[WindowRequest]:
        noise = self.epoch if self.fresh_noise else 0
        for place in self._places():
            yield WindowRequest(self.order[self.epoch, place], noise, self.rounds)

    def _places(self) -> range:
        left = self.order.windows - self.next_position
        stop = self.order.windows - (left % self.world_size if self.drop_last else 0)
        return range(self.next_position + self.rank, stop, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; to the epoch already current, a no-op."""
        if epoch != self.epoch:
            self.epoch, self.next_position = epoch, 0

    def state_dict(self, windows_taken: int = 0) -> dict[str, int | str]:
        """Where the order stands, for a checkpoint.

        Args:
            windows_taken: windows that all ranks together have trained on in this epoch since the
                sampler was made or loaded. The sampler cannot know: workers read ahead.
        """
        return {
            "identity": self.order.identity,
            "windows": self.order.windows,
            "seed": self.order.seed,
            "epoch": self.epoch,
            "next_position": self.next_position + windows_taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` stood, on any number of ranks.

        Raises:
            InvalidArgumentError: when the state is of another cache or seed, or no such state.
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
