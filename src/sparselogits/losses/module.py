"""The loss as a module: the same function with its options bound."""

from __future__ import annotations

from torch import Tensor, nn

from sparselogits.losses.arguments import prepare
from sparselogits.losses.criterion import Criterion, MissingMass, Reduction
from sparselogits.losses.function import LossParts
from sparselogits.losses.functional import Implementation, loss_parts


class SparseKDLoss(nn.Module):
    """`linear_sparse_cross_entropy` with its options bound; holds no parameters.

    Args:
        alpha: share of the label's cross-entropy, in [0, 1].
        logit_softcap: bound of the logits, after scaling; None for none.
        logit_scale: factor of the logits.
        temperature: divides the student's logits in the KD part only.
        ignore_index: the label of rows that add nothing.
        missing_mass: rule for biased targets.
        reduction: "mean" or "sum".
        impl: "auto", "chunked", "triton" or "reference".
        chunk_rows: rows whose logits exist at a time; None chooses.

    Raises:
        InvalidArgumentError: for a number outside its range or an unknown rule.

    Examples:
        >>> import torch
        >>> loss = SparseKDLoss(alpha=0.1)
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> ids, weights = torch.randint(100, (6, 4)), torch.full((6, 4), 0.25)
        >>> parts = loss(hidden, head, ids, weights, labels=torch.randint(100, (6,)))
        >>> parts.loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        alpha: float = 0.0,
        logit_softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        ignore_index: int = -100,
        missing_mass: MissingMass = "drop",
        reduction: Reduction = "mean",
        impl: Implementation = "auto",
        chunk_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.criterion = Criterion(
            alpha, missing_mass, logit_scale, logit_softcap, temperature, ignore_index, reduction
        )
        self.impl: Implementation = impl
        self.chunk_rows = chunk_rows

    def forward(
        self,
        input: Tensor,  # noqa: A002
        linear_weight: Tensor,
        target_ids: Tensor,
        target_weights: Tensor,
        *,
        labels: Tensor | None = None,
        linear_bias: Tensor | None = None,
        position_weights: Tensor | None = None,
    ) -> LossParts:
        """The loss and its parts; arguments as in `linear_sparse_cross_entropy`."""
        arguments = prepare(
            input,
            linear_weight,
            linear_bias,
            target_ids,
            target_weights,
            labels,
            position_weights,
            self.criterion,
        )
        return loss_parts(arguments, self.criterion, self.impl, self.chunk_rows)

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        return f"{self.criterion}, impl={self.impl!r}"
