"""Create extreme distributions for samplers, as float64 logits with exact probabilities."""

import torch
from torch import Tensor

KINDS = ("peaked", "flat", "ties", "zeros", "one-hot", "subnormal", "zipf", "random")


def logits_of(kind: str, vocabulary: int, seed: int) -> Tensor:
    """Return the logits of a distribution of a kind, float64 [V]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    rank = torch.randperm(vocabulary, generator=generator).double() + 1
    if kind == "peaked":
        return noise * 6
    if kind == "flat":
        return torch.full_like(noise, -3.25)
    if kind == "ties":
        return noise.mul(2).round()
    if kind == "zeros":
        return noise.mul(2).masked_fill(rank > vocabulary / 2, -torch.inf)
    if kind == "one-hot":
        return torch.full_like(noise, -torch.inf).masked_fill(rank == 1, 17.0)
    if kind == "subnormal":  # exp(-95) is a subnormal float32, exp(-720) a subnormal float64
        return torch.where(rank % 3 == 0, -95.0, torch.where(rank % 3 == 1, -720.0, noise))
    if kind == "zipf":
        return -1.1 * rank.log()
    return noise * 2
