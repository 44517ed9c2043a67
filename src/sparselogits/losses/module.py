"""The loss as a module: the same function with its options bound."""

from __future__ import annotations

from torch import Tensor, nn

from sparselogits.losses.arguments import Reduction
from sparselogits.losses.criterion import Criterion, MissingMass
from sparselogits.losses.functional import (
    Implementation,
    LossParts,
    linear_sparse_cross_entropy,
)


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
        self.criterion = Criterion(alpha, missing_mass, logit_scale, logit_softcap, temperature)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
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
        return linear_sparse_cross_entropy(
            input,
            linear_weight,
            target_ids,
            target_weights,
            labels=labels,
            alpha=self.criterion.alpha,
            linear_bias=linear_bias,
            logit_softcap=self.criterion.logit_softcap,
            logit_scale=self.criterion.logit_scale,
            temperature=self.criterion.temperature,
            position_weights=position_weights,
            ignore_index=self.ignore_index,
            missing_mass=self.criterion.missing_mass,
            reduction=self.reduction,
            impl=self.impl,
            chunk_rows=self.chunk_rows,
            return_parts=True,
        )

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        return f"{self.criterion}, reduction={self.reduction!r}, impl={self.impl!r}"
