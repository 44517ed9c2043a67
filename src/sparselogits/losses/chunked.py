"""Compute a loss and its gradients one chunk of rows at a time.

Each chunk takes the same three matrix products as autograd: logits = x W^T, then, with the gradient
g of the logits, dx = g W and dW += g^T x. docs/loss.md states the memory.

For bfloat16 and float16, softmax, sums and losses are float32. On CUDA the products also return
logits, and weight gradients of several chunks, in float32. PyTorch has no such products on other
devices: logits and each chunk's contribution to the weight gradient are rounded to the input's
dtype once, as in `F.linear`, and contributions are added in float32.

No function here synchronises with the device. Chunk sizes do not depend on free memory, because a
resumed run has bitwise equal results only if it adds in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from sparselogits.losses.call import Call, LossAndGradients, LossParts, Operands
from sparselogits.losses.criterion import Criterion
from sparselogits.losses.rows import SparseLosses
from sparselogits.losses.targets import RowTargets

Needs = tuple[bool, bool, bool]
"""Whether to compute the gradients with respect to input, weight and bias."""

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_MIB = 2**20


class ChunkLosses(Protocol):
    """Callable that computes the losses of a chunk of rows, and the gradient of the logits."""

    def __call__(
        self, logits: Tensor, gradient: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of row_weight * kd and row_weight * ce over R rows, 0-dimensional.

        The second sum is 0 if ce is not computed.

        Args:
            logits: raw logits [R, V] of these rows, in any floating-point dtype; overwritten.
            gradient: output [R, V], possibly `logits` itself, for the gradient of the sum of
                row_weight * ((1 - alpha) kd + alpha ce); None if no gradient is required.
            rows: indices of these rows among the N rows.
        """
        ...


def loss_and_gradients(
    operands: Operands,
    row_weight: Tensor,
    losses_of: ChunkLosses,
    *,
    needs: Needs,
    chunk_rows: int | None = None,
) -> LossAndGradients:
    """Compute loss sums over N rows and their gradients, without autograd or autocast.

    Gradients have the dtype of the operands, or float32 for float16. For given logits, one tensor
    of their shape is allocated for their gradient.

    Args:
        operands: input [N, D], weight [V, D] and bias of a head in one dtype, or logits [N, V].
        row_weight: [N], in `accumulation_dtype(input.dtype)`; 0 for rows excluded from the loss.
        losses_of: callable that computes the losses of a chunk.
        needs: gradients to compute.
        chunk_rows: largest number of rows per chunk; None for `default_chunk_rows`.
    """
    device = operands.input.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if operands.weight is None:
            return _of_logits(operands.input, row_weight, losses_of, needs[0], chunk_rows)
        return _of_head(*operands, row_weight, losses_of, needs, chunk_rows)  # type: ignore[arg-type]


def _of_head(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    losses_of: ChunkLosses,
    needs: Needs,
    chunk_rows: int | None,
) -> LossAndGradients:
    """Compute `loss_and_gradients` from the hidden states and weight of a head."""
    N, V = input.shape[0], weight.shape[0]
    rows = _balanced(N, chunk_rows or default_chunk_rows(N, V, input.device, input.dtype))
    logits, g = _chunk_buffers(input, rows, V)
    kd, ce = row_weight.new_zeros(()), row_weight.new_zeros(())
    kept = _kept_dtype(input.dtype)
    d_input = torch.empty_like(input, dtype=kept) if needs[0] else None
    d_weight = _weight_gradient(weight, kept, chunks=-(-N // rows)) if needs[1] else None
    # on a CPU, each chunk's contribution is computed in the weight's dtype
    rounds = d_weight is not None and d_weight.dtype != weight.dtype and weight.device.type == "cpu"
    rounded = torch.empty_like(weight) if rounds else None
    d_bias = row_weight.new_zeros(V) if needs[2] else None
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        # excluded rows may contain NaN, and 0 * NaN would make the weight's gradient NaN
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
            _product(gradient.t(), x, out=d_weight, add=start > 0, rounded=rounded)
        if d_bias is not None:
            d_bias += gradient.sum(0, dtype=d_bias.dtype)
    if d_weight is not None:
        reused = rounded if rounded is not None and rounded.dtype == kept else None
        d_weight = d_weight.to(kept) if reused is None else reused.copy_(d_weight)
    return LossAndGradients(
        kd, ce, (d_input, d_weight, None if d_bias is None else d_bias.to(kept))
    )


def _of_logits(
    logits: Tensor,
    row_weight: Tensor,
    losses_of: ChunkLosses,
    needs_grad: bool,
    chunk_rows: int | None,
) -> LossAndGradients:
    """Compute `loss_and_gradients` from given logits."""
    N, V = logits.shape
    rows = _balanced(N, chunk_rows or default_chunk_rows(N, V, logits.device, logits.dtype))
    kd, ce = row_weight.new_zeros(()), row_weight.new_zeros(())
    kept = _kept_dtype(logits.dtype)
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
    return LossAndGradients(kd, ce, (d_logits, None, None))


def sparse_parts(call: Call, *, with_ce: bool) -> LossParts:
    """Compute the loss of sparse targets with the implementation "chunked" or "triton".

    Under `torch.compile` sums and gradients are computed by one opaque operator, so the order of
    additions is the same as in eager mode, and the graph does not depend on the number of chunks.
    Given labels, `with_ce` computes ce even if alpha is 0.
    """
    criterion, operands = call.criterion, call.operands
    with_ce = call.label is not None and (with_ce or criterion.alpha > 0)
    head = operands.weight
    targets = call.targets(operands.input.shape[1] if head is None else head.shape[0])
    needs = call.needs
    with torch.no_grad():
        if torch.compiler.is_compiling():
            flat = (*operands, *targets, *criterion.values(), with_ce, list(needs))
            kd, ce, *formed = _operator(*flat)
            d_input, d_weight, d_bias = (
                gradient if wanted else None for gradient, wanted in zip(formed, needs, strict=True)
            )
            result = LossAndGradients(kd, ce, (d_input, d_weight, d_bias))
        else:
            result = _sparse_sums(operands, targets, criterion, with_ce, needs)
    return call.finish(result, with_ce=with_ce)


def _sparse_sums(
    operands: Operands, targets: RowTargets, criterion: Criterion, with_ce: bool, needs: Needs
) -> LossAndGradients:
    """Compute sums and gradients for sparse targets."""
    losses_of: ChunkLosses = SparseLosses(targets, criterion, with_ce)
    if criterion.impl == "triton":
        from sparselogits.losses.triton_rows import TritonLosses

        losses_of = TritonLosses(targets, criterion, with_ce)
    return loss_and_gradients(
        operands, targets.row_weight, losses_of, needs=needs, chunk_rows=criterion.chunk_rows
    )


def _schema() -> str:
    """Return the operator's schema, which lists all fields of the classes in `_unflattened`."""
    types = {"float": "float", "float | None": "float?", "int": "SymInt", "int | None": "SymInt?"}
    tensors = [
        f"Tensor{'?' if name in value._field_defaults else ''} {name}"
        for value, names in ((Operands, Operands._fields), (RowTargets, RowTargets._fields))
        for name in names
    ]
    options = [f"{types.get(str(f.type), 'str')} {f.name}" for f in fields(Criterion)]
    arguments = ", ".join([*tensors, *options, "bool with_ce", "bool[] needs"])
    return f"({arguments}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


def _unflattened(
    arguments: Iterable[Any],
) -> tuple[Operands, RowTargets, Criterion, bool, Needs]:
    """Return the operator's arguments as instances of the classes whose fields they are."""
    left = iter(arguments)
    operands = Operands(*(next(left) for _ in Operands._fields))
    targets = RowTargets(*(next(left) for _ in RowTargets._fields))
    criterion = Criterion(*(next(left) for _ in fields(Criterion)))
    with_ce, needs = left
    return operands, targets, criterion, with_ce, tuple(needs)


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the operator's results: kd, ce and three gradients, empty if not requested."""
    operands, targets, criterion, with_ce, needs = _unflattened(arguments)
    kd, ce, gradients = _sparse_sums(operands, targets, criterion, with_ce, needs)
    empty = (operands.input.new_empty(0) if g is None else g for g in gradients)
    return kd, ce, *empty


_operator = torch.library.custom_op(
    "sparselogits::linear_sparse_loss", _run, mutates_args=(), schema=_schema()
)


@_operator.register_fake
def _shapes(*arguments: Any) -> tuple[Tensor, ...]:
    """Return empty tensors with the shapes and dtypes of the operator's results."""
    operands, targets, _, _, needs = _unflattened(arguments)
    input, kept = operands.input, _kept_dtype(operands.input.dtype)  # noqa: A001
    gradients = (
        input.new_empty(0) if t is None or not wanted else torch.empty_like(t, dtype=kept)
        for t, wanted in zip(operands, needs, strict=True)
    )
    return targets.row_weight.new_empty(()), targets.row_weight.new_empty(()), *gradients


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are stored between forward and backward passes.

    For float16 it is float32, because float16 gradients would underflow before the backward pass
    applies the loss scale.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def default_chunk_rows(rows: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the largest number of rows per chunk for `rows` rows in total.

    On an accelerator, a chunk of float32 logits takes 1/64 of the device's memory, from 64 MiB to
    1 GiB, which is enough for products at full speed. On a CPU a chunk takes 64 MiB, but at most
    half of the rows, because the page faults of a new buffer are amortised only over several
    chunks. The result is at least 256 rows (512 in low precision) on a CPU, because each chunk
    repacks the weight for its products and adds to the weight's gradient.
    """
    if device.type == "cpu":
        least = 512 if dtype in _LOW_PRECISION else 256
        return max(least, min(64 * _MIB // (4 * vocab_size), -(-rows // 2)))
    budget = min(max(_accelerator_memory(device) // 64, 64 * _MIB), 1024 * _MIB)
    return max(1, budget // (4 * vocab_size))


@cache
def _accelerator_memory(device: torch.device) -> int:
    """Return the total memory of a device in bytes; 16 GiB for other devices than CUDA's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return 16 * 1024 * _MIB  # torch has no query for other devices


def _balanced(total: int, at_most: int) -> int:
    """Return a number of rows per chunk, at most `at_most`, for chunks of about equal sizes."""
    chunks = max(1, -(-total // at_most))
    return max(1, -(-total // chunks))


def _chunk_buffers(input: Tensor, rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Return buffers for logits and their gradient: the same buffer if their dtypes are equal."""
    gradient = input.new_empty(rows, vocab_size)
    if input.dtype in _LOW_PRECISION and input.device.type == "cuda":
        return torch.empty_like(gradient, dtype=torch.float32), gradient
    return gradient, gradient


def _weight_gradient(weight: Tensor, kept: torch.dtype, chunks: int) -> Tensor:
    """Return a buffer for the weight's gradient, filled with zeros if there are no chunks."""
    if chunks == 0:
        return torch.zeros_like(weight, dtype=kept)
    low = weight.dtype in _LOW_PRECISION and chunks > 1
    return torch.empty_like(weight, dtype=torch.float32 if low else kept)


def _product(
    a: Tensor, b: Tensor, *, out: Tensor, add: bool = False, rounded: Tensor | None = None
) -> None:
    """Compute out = a b, or out += a b if `add`.

    If `out` is float32 and the factors have low precision, CUDA computes the product in float32; on
    other devices the product is rounded first, to the buffer `rounded` if there is one.
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
