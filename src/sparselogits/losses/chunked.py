"""The loss on a linear head, one chunk of rows at a time, gradients formed on the way.

Three products a chunk, and none that autograd would not need too: logits = x W^T, then with g, the
gradient that has taken the logits' place, dx = g W and dW += g^T x.

Peak memory beyond the gradients: one chunk of logits, in the input's dtype (CPU) or float32
(CUDA, with a copy in the input's dtype for the products), one block of rows of that chunk, and,
for a low-precision head in more than one chunk, its weight gradient in float32 until the end (on
CPU with one more copy, in which a chunk's share is rounded).

What accumulates where: float64 input in float64 and float32 input in float32, all through.
bfloat16 and float16: softmax, sums and losses in float32 always; on CUDA the logits and the weight
gradient leave their products in float32 as well; CPU has no such product, so there the logits and
each chunk's share of the weight gradient are rounded to the input's dtype once, as `F.linear`
would, and shares are added in float32.

Nothing here waits for the device. Chunk sizes come from shapes and from an accelerator's total
memory, not from what happens to be free: a resumed run must add in the same order to repeat its
bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparselogits.losses.criterion import Criterion
from sparselogits.losses.rows import row_losses_
from sparselogits.losses.targets import RowTargets

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_MIB = 2**20
_BLOCK_ELEMENTS = 2**21  # 8 MiB: rows go through the softmax in blocks that a CPU's cache holds


class ChunkLosses(Protocol):
    """What turns a chunk of logits into losses and their gradient."""

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Weighted loss sums of some rows.

        Args:
            logits: raw logits [R, V] of these rows, of any floating dtype; overwritten.
            gradient: [R, V] to fill, possibly `logits` itself; None if none is wanted.
            rows: which of the N rows these are.

        Returns:
            0-dimensional sums of row_weight * kd and row_weight * ce.
        """
        ...


class LossAndGradients(NamedTuple):
    """Sums over rows, weighted but not yet divided, and their gradients where asked for."""

    kd: Tensor
    ce: Tensor
    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def loss_and_gradients(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    losses_of: ChunkLosses,
    *,
    needs: tuple[bool, bool, bool],
    chunk_rows: int | None = None,
) -> LossAndGradients:
    """Loss sums over the N rows of a linear head.

    Args:
        input: [N, D].
        weight: [V, D], same dtype.
        bias: [V] or None, same dtype.
        row_weight: [N] in `accumulation_dtype(input.dtype)`, 0 where a row adds nothing.
        losses_of: the loss of a chunk.
        needs: which of the gradients with respect to input, weight and bias to form.
        chunk_rows: rows whose logits exist at a time; None chooses.

    Returns:
        The sums, and gradients in the dtype of their tensors, or float32 for float16.
    """
    N, V = input.shape[0], weight.shape[0]
    rows = _balanced(N, chunk_rows or default_chunk_rows(N, V, input.device, input.dtype))
    logits, g = _chunk_buffers(input, rows, V)
    kd, ce = row_weight.new_zeros(()), row_weight.new_zeros(())
    kept = kept_dtype(input.dtype)
    d_input = torch.empty_like(input, dtype=kept) if needs[0] else None
    d_weight = _weight_gradient(weight, kept, chunks=-(-N // rows)) if needs[1] else None
    share = torch.empty_like(weight) if _rounds_shares(d_weight, weight) else None
    d_bias = row_weight.new_zeros(V) if needs[2] else None
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        # a row that does not count may hold NaN, and 0 * NaN would reach the weight's gradient
        x = torch.where((row_weight[start:stop] != 0)[:, None], input[start:stop], 0.0)
        z = logits[: stop - start]
        gradient = z if g is logits else g[: stop - start]
        _product(x, weight.t(), out=z)
        if bias is not None:
            z += bias
        kd_part, ce_part = losses_of(z, gradient if any(needs) else None, slice(start, stop))
        kd += kd_part
        ce += ce_part
        if d_input is not None:
            _product(gradient, weight, out=d_input[start:stop])
        if d_weight is not None:
            _product(gradient.t(), x, out=d_weight, add=start > 0, rounded=share)
        if d_bias is not None:
            d_bias += gradient.sum(0, dtype=d_bias.dtype)
    if d_weight is not None:
        reused = share if share is not None and share.dtype == kept else None
        d_weight = d_weight.to(kept) if reused is None else reused.copy_(d_weight)
    return LossAndGradients(
        kd,
        ce,
        d_input,
        d_weight,
        None if d_bias is None else d_bias.to(kept),
    )


def logits_loss_and_gradients(
    logits: Tensor,
    row_weight: Tensor,
    losses_of: ChunkLosses,
    *,
    needs_grad: bool,
    chunk_rows: int | None = None,
) -> LossAndGradients:
    """The same for logits [N, V] that exist already; their gradient is the only copy of them."""
    N, V = logits.shape
    rows = _balanced(N, chunk_rows or default_chunk_rows(N, V, logits.device, logits.dtype))
    kd, ce = row_weight.new_zeros(()), row_weight.new_zeros(())
    kept = kept_dtype(logits.dtype)
    d_logits = torch.empty_like(logits, dtype=kept) if needs_grad else None
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        z = torch.where((row_weight[part] != 0)[:, None], logits[part].to(kept), 0.0)
        gradient = None
        if d_logits is not None:
            z = gradient = d_logits[part].copy_(z)
        kd_part, ce_part = losses_of(z, gradient, part)
        kd += kd_part
        ce += ce_part
    return LossAndGradients(kd, ce, d_logits, None, None)


@dataclass(frozen=True)
class SparseLosses:
    """`ChunkLosses` of sparse targets, in torch operations on blocks of rows.

    Args:
        targets: of all N rows.
        criterion: the formula.
        with_ce: compute the label's part too.
    """

    targets: RowTargets
    criterion: Criterion
    with_ce: bool

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """See `ChunkLosses`."""
        targets = self.targets.rows(rows)
        dtype = targets.row_weight.dtype
        kd = ce = targets.row_weight.new_zeros(())
        step = block_rows(logits)
        for start in range(0, logits.shape[0], step):
            block = logits[start : start + step]
            part = targets.rows(slice(start, start + step))
            work = block.to(dtype)  # the block itself where the dtype is the same
            losses = row_losses_(
                work, part, self.criterion, with_ce=self.with_ce, with_grad=gradient is not None
            )
            assert losses.kd is not None
            kd = kd + part.row_weight.dot(losses.kd)
            if losses.ce is not None:
                ce = ce + part.row_weight.dot(losses.ce)
            if gradient is not None and not (work is block and gradient is logits):
                gradient[start : start + step].copy_(work)
        return kd, ce


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients between forward and backward: float16 would overflow or underflow undivided."""
    return torch.float32 if dtype == torch.float16 else dtype


def default_chunk_rows(rows: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows whose logits exist at a time, of `rows` in all.

    On an accelerator, as many float32 rows as take 1/64 of its memory (of 16 GiB where it is not
    CUDA's), from 64 MiB to 1 GiB: large enough for products at full speed. On CPU 64 MiB, but no
    more than half the rows: the system hands out a buffer page by page, which only several chunks
    make up for (at D = 128 all rows at once cost more than the softmax). And at least 256 rows, in
    low precision 512: each chunk packs the weight for its products anew and adds to the weight's
    gradient, in low precision by a pass of its own.
    """
    if device.type == "cpu":
        least = 512 if dtype in _LOW_PRECISION else 256
        return max(least, min(64 * _MIB // (4 * vocab_size), -(-rows // 2)))
    budget = min(max(_accelerator_memory(device) // 64, 64 * _MIB), 1024 * _MIB)
    return max(1, budget // (4 * vocab_size))


@cache
def _accelerator_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return 16 * 1024 * _MIB  # a middling one


def _balanced(total: int, at_most: int) -> int:
    """Rows a chunk, so that all chunks are about equal: a small last one wastes the products."""
    chunks = max(1, -(-total // at_most))
    return max(1, -(-total // chunks))


def block_rows(logits: Tensor) -> int:
    """Rows to treat at a time within a chunk of logits [R, V]."""
    if logits.device.type != "cpu":  # launches cost more than caches save; an eighth bounds copies
        return max(1, -(-logits.shape[0] // 8))
    return max(8, _BLOCK_ELEMENTS // logits.shape[1])


def _chunk_buffers(input: Tensor, rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Logits, and the gradient for the products: one buffer wherever the dtypes allow."""
    gradient = input.new_empty(rows, vocab_size)
    if input.dtype in _LOW_PRECISION and input.device.type == "cuda":
        return torch.empty_like(gradient, dtype=torch.float32), gradient
    return gradient, gradient


def _weight_gradient(weight: Tensor, kept: torch.dtype, chunks: int) -> Tensor:
    if chunks == 0:
        return torch.zeros_like(weight, dtype=kept)
    low = weight.dtype in _LOW_PRECISION and chunks > 1
    return torch.empty_like(weight, dtype=torch.float32 if low else kept)


def _rounds_shares(gradient: Tensor | None, weight: Tensor) -> bool:
    """Whether a chunk's share of the weight's gradient leaves its product in low precision."""
    on_cpu = weight.device.type == "cpu"
    return gradient is not None and gradient.dtype != weight.dtype and on_cpu


def _product(
    a: Tensor, b: Tensor, *, out: Tensor, add: bool = False, rounded: Tensor | None = None
) -> None:
    """out (+)= a b, with float32 out of low-precision factors where the device can.

    Where it cannot, the product is rounded, into `rounded` if that is there to be overwritten.
    """
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and out.dtype == torch.float32:
        if add:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        product = torch.mm(a, b) if rounded is None else torch.mm(a, b, out=rounded)
        out.add_(product) if add else out.copy_(product)
