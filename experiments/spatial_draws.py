"""Draw rounds that are spread over the space of unembedding rows (not part of the library).

In systematic rounds, tokens with neighbouring ids share one running sum, so their errors cancel to
the extent that their unembedding rows are similar. The three draws of this module use
neighbourhoods in the space of the rows instead, at a cost that is too high for a cache:

- `by_local_direction`: systematic rounds, with the likely tokens of a position ordered along their
  principal direction (weighted by probability), followed by the others in id order;
- `by_local_tree`: the same, with a recursive split in two along the principal direction;
- `LocalPivotal`: the local pivotal method (Grafström, Lundström, Schelin, Biometrics 2012) on the
  fractional parts of N p: each step decides between a token and its nearest neighbour.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparselogits import SparseTargets
from sparselogits.targets import offsets_from_lengths

LIKELY = 1024
"""Number of likely tokens per position to order; the others have a few per cent of the mass."""

TREE_DEPTH = 6


def by_local_direction(logits: Tensor, unembedding: Tensor) -> Tensor:
    """Return ids [P, V] ordered along the principal direction of each position's likely tokens."""
    return _arranged(logits, unembedding, depth=1)


def by_local_tree(logits: Tensor, unembedding: Tensor) -> Tensor:
    """Return ids [P, V] ordered by recursive splits of each position's likely tokens."""
    return _arranged(logits, unembedding, depth=TREE_DEPTH)


def _arranged(logits: Tensor, unembedding: Tensor, depth: int) -> Tensor:
    """Return an order of the vocabulary for each position, int64 [P, V]."""
    likely = min(LIKELY, logits.shape[1])
    probabilities = logits.softmax(-1)
    orders = []
    for p in probabilities:
        top = p.topk(likely).indices
        rest = torch.ones_like(p, dtype=torch.bool)
        rest[top] = False
        tree = _bisect(top, p, unembedding, depth)
        orders.append(torch.cat([tree, rest.nonzero()[:, 0]]))
    return torch.stack(orders)


def _bisect(ids: Tensor, p: Tensor, unembedding: Tensor, depth: int) -> Tensor:
    """Order ids by recursive splits of the probability in halves along a principal direction."""
    if depth == 0 or len(ids) < 3:
        return ids
    weight = p[ids] / p[ids].sum()
    rows = unembedding[ids]
    centred = (rows - weight @ rows) * weight.sqrt()[:, None]
    direction = centred[weight.argmax()] + 1e-6
    for _ in range(4):  # power iteration; an approximate direction is enough
        direction = centred.T @ (centred @ direction)
        direction = direction / direction.norm().clamp_min(1e-30)
    order = (rows @ direction).argsort()
    ids = ids[order]
    middle = int((weight[order].cumsum(0) < 0.5).sum()) + 1
    halves = ids[:middle], ids[middle:]
    return torch.cat([_bisect(half, p, unembedding, depth - 1) for half in halves])


class LocalPivotal:
    """Draw of counts floor(N p_i) or one more, in which near tokens exclude each other.

    Args:
        rounds: number of rounds N.
        unembedding: rows [V, D], whose distances define near tokens.
        seed: random seed, used instead of the uniforms passed to a call.
    """

    def __init__(self, rounds: int, unembedding: Tensor, seed: int = 0) -> None:
        self.rounds, self.unembedding = rounds, unembedding
        self.random = np.random.default_rng(seed)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> SparseTargets:
        """Draw targets whose counts sum to N at each position, as in a systematic draw."""
        rows = [self._draw(p) for p in logits.double().softmax(-1)]
        ids = torch.cat([row[0] for row in rows])
        counts = torch.cat([row[1] for row in rows])
        lengths = torch.tensor([len(row[0]) for row in rows])
        return SparseTargets(
            ids,
            counts.float() / self.rounds,
            offsets_from_lengths(lengths),
            logits.shape[1],
            counts=counts.to(torch.int32),
            rounds=self.rounds,
        )

    def _draw(self, p: Tensor) -> tuple[Tensor, Tensor]:
        expected = (p * self.rounds).numpy()
        counts = np.floor(expected)
        share = expected - counts
        top = p.topk(min(LIKELY, len(p))).indices
        rows = self.unembedding[top]
        near = torch.cdist(rows, rows).fill_diagonal_(torch.inf).numpy()
        share[top.numpy()] = self._duels(share[top.numpy()], near)
        # the remaining tokens, including the last likely one, in id order
        left = (share.cumsum() + self.random.uniform(1e-9, 1 - 1e-9)) // 1
        counts += np.diff(left, prepend=0.0)
        kept = counts.nonzero()[0]
        return torch.from_numpy(kept), torch.from_numpy(counts[kept])

    def _duels(self, share: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Round fractional parts [LIKELY] to 0 or 1, by decisions between nearest neighbours."""
        open_ = (share > 0) & (share < 1)
        near = np.where(open_[None], near, np.inf)
        for one in self.random.permutation(len(share)):
            while open_[one] and open_.sum() > 1:
                other = int(near[one].argmin())
                share[one], share[other] = self._duel(share[one], share[other])
                for settled in (one, other):
                    if not 1e-12 < share[settled] < 1 - 1e-12:
                        share[settled] = round(share[settled])
                        open_[settled] = False
                        near[:, settled] = np.inf
        return share

    def _duel(self, a: float, b: float) -> tuple[float, float]:
        """Move mass between two fractional parts until one of them is 0 or 1, without bias."""
        total, chance = a + b, self.random.random()
        if total < 1:
            return (total, 0.0) if chance * total < a else (0.0, total)
        return (1.0, total - 1) if chance * (2 - total) < 1 - b else (total - 1, 1.0)
