"""The loss of a chunk of rows as one Triton kernel: `rows.py` fused, for CUDA.

Two reads and one write of the chunk, against ten or so of the torch version. The matrix products
around it stay cuBLAS's.

Computes in float32; float64 belongs to "chunked". Also runs under Triton's interpreter on CPU
(TRITON_INTERPRET=1), slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparselogits.errors import InvalidArgumentError, MissingDependencyError
from sparselogits.losses.criterion import Criterion
from sparselogits.losses.targets import RowTargets

try:
    import triton

    from sparselogits.losses.triton_kernel import row_loss_kernel
except ImportError as error:
    raise MissingDependencyError(
        "impl='triton' needs the package triton: pip install 'sparselogits[triton]', or use "
        "impl='chunked'"
    ) from error


@dataclass(frozen=True)
class TritonLosses:
    """`ChunkLosses` of sparse targets, one kernel launch a chunk.

    Args:
        targets: of all N rows, float32.
        criterion: the formula.
        with_ce: compute the label's part too.

    Raises:
        InvalidArgumentError: for float64 targets (and so, float64 input).
    """

    targets: RowTargets
    criterion: Criterion
    with_ce: bool

    def __post_init__(self) -> None:
        if self.targets.row_weight.dtype != torch.float32:
            raise InvalidArgumentError(
                "impl='triton' computes in float32, the input is float64: use impl='chunked'"
            )

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """See `ChunkLosses`."""
        t, c = self.targets.rows(rows), self.criterion
        kd, ce = torch.empty_like(t.row_weight), torch.zeros_like(t.row_weight)
        ids, weights = t.ids.contiguous(), t.weights.contiguous()
        unused = t.row_weight
        block = min(8192, triton.next_power_of_2(logits.shape[1]))
        row_loss_kernel[(logits.shape[0],)](
            logits,
            logits if gradient is None else gradient,
            ids,
            weights,
            t.row_weight,
            t.mass,
            unused if t.label is None else t.label,
            unused if t.ghost is None else t.ghost,
            unused if t.spread is None else t.spread,
            kd,
            ce,
            logits.stride(0),
            logits.stride(0) if gradient is None else gradient.stride(0),
            logits.shape[1],
            ids.shape[1],
            float(c.alpha),
            float(c.logit_scale),
            float(c.logit_softcap or 1.0),
            float(c.temperature),
            **_constants(t, c, self.with_ce, gradient is not None),
            BLOCK_V=block,
            BLOCK_E=max(16, triton.next_power_of_2(ids.shape[1])),
            num_warps=max(1, min(16, block // 512)),
        )
        weight = t.row_weight
        return weight.dot(kd), weight.dot(ce)


def _constants(t: RowTargets, c: Criterion, with_ce: bool, with_grad: bool) -> dict[str, bool]:
    """What the kernel is specialised on."""
    return {
        "WITH_GRAD": with_grad,
        "WITH_CE": with_ce,
        "HAS_GHOST": t.ghost is not None,
        "HAS_SPREAD": t.spread is not None,
        "HAS_CAP": c.logit_softcap is not None,
        "TWO_TEMPERATURES": c.temperature != 1.0 and with_ce,
    }
