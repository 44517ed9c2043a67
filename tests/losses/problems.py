"""Create small loss problems that combine all edge cases."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

N, D, V, K = 13, 6, 11, 4
RULES = ["drop", "renormalise", "smooth", "ghost", "ground_truth"]


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Return a problem with padding next to a true id 0, empty rows, and masses around one."""
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


TARGETS = ["one-hot", "sparse"]


def errors_in_low_precision(
    dtype: torch.dtype, targets: str, alpha: float, loss_of: Callable[..., Tensor]
) -> Iterator[tuple[float, float]]:
    """Return the errors of loss and gradients, of the library and of torch with rounded logits.

    Both are compared with float64 on the same rounded inputs.

    Args:
        dtype: dtype of the input.
        targets: "one-hot" at the labels, or "sparse": twelve entries of mass 0.8 to 1.2.
        alpha: weight of the labels.
        loss_of: the library's loss of input, head, ids and weights, with keywords `labels` and
            `alpha`.
    """
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary, entries = 48, 64, 300, 12
    x = torch.randn(rows, width, generator=generator)
    W = torch.randn(vocabulary, width, generator=generator) / 8
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    ids, weights = labels[:, None], torch.ones(rows, 1)
    if targets == "sparse":
        drawn = torch.rand(rows, vocabulary, generator=generator)
        ids = drawn.topk(entries).indices
        weights = torch.rand(rows, entries, generator=generator).softmax(1)
        weights *= 0.8 + 0.4 * torch.rand(rows, 1, generator=generator)

    def gradients(computed: torch.dtype, loss: Callable[..., Tensor]) -> list[Tensor]:
        a, b = (t.to(dtype).to(computed).requires_grad_() for t in (x, W))
        value = loss(a, b)
        return [value.detach(), *torch.autograd.grad(value, (a, b))]

    def dense(a: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(a, b)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        t = torch.zeros(rows, vocabulary).scatter(1, ids, weights).to(logits.dtype)
        kd = -(t * logits.log_softmax(1)).sum(1).mean()
        return (1 - alpha) * kd + alpha * F.cross_entropy(logits, labels)

    exact, torchs = gradients(torch.float64, dense), gradients(dtype, dense)
    ours = gradients(dtype, lambda a, b: loss_of(a, b, ids, weights, labels=labels, alpha=alpha))
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == ours[2].dtype == dtype
    for mine, theirs, truth in zip(ours, torchs, exact, strict=True):
        yield float((mine.double() - truth).norm()), float((theirs.double() - truth).norm())
