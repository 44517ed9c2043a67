"""Small problems that hold every awkward case at once."""

from __future__ import annotations

import torch
from torch import Tensor

N, D, V, K = 13, 6, 11, 4
RULES = ["drop", "renormalise", "smooth", "ghost", "ground_truth"]


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Padding that collides with a true id 0, empty rows, masses below, at and above one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    weights = torch.rand(N, K, generator=generator) / K
    weights[1] = 0
    weights[2] = 1 / K
    weights[3] *= 3 * K
    ids[4:9, 2:], weights[4:9, 2:] = 0, 0
    ids[4:6, 0], ids[4:6, 1] = 0, 5
    labels = torch.randint(V, (N,), generator=generator)
    labels[[0, 7]] = -100
    return {
        "input": normal(N, D),
        "linear_weight": normal(V, D),
        "linear_bias": normal(V),
        "target_ids": ids,
        "target_weights": weights,
        "labels": labels,
        "position_weights": torch.rand(N, generator=generator) + 0.1,
    }
