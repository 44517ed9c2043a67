"""Estimate the memory of one device, and whether a teacher's pass or a student's training fits.

The estimate counts weights, activations, and the slice of logits that is sampled or the chunk of
logits in the loss. Coefficients were fitted to Llamas of several shapes, whose allocations torch's
profiler counted (benchmarks/plan_memory.py; docs/planning.md has the errors). The margin is for an
accelerator's other memory (CUDA context, fragmentation). Attention is assumed to store no matrix of
window by window, as in PyTorch's fused kernels without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}
"""Bytes per weight by data type."""
PASS_HIDDEN, PASS_INTERMEDIATE = 4.1, 3.0
"""Values per token at the peak of a forward pass without gradients, per unit of hidden and of
intermediate width: benchmarks/plan_memory.json."""
SLICE_POSITIONS = 256
"""Positions whose logits a teacher has at a time, as in `teacher.transformers_engine`; checked by a
test."""
SLICE_BYTES = 4 * 2.5
"""Bytes per logit of a slice: the new one in float32, the one before, the head's own dtype:
benchmarks/plan_memory.json."""
SAMPLER_BYTES = 4
"""Bytes per logit of a slice for the sampler: one float32 copy of the weights. On a CPU it is less
(`samplers/distribution.py`); assumed for accelerators, not measured."""
STEP_HIDDEN = 40.0
STEP_INTERMEDIATE = {"float32": 16.0, "bfloat16": 8.5}
"""Bytes per token and layer that a training step keeps, per unit of width; bfloat16 is autocast
over float32 weights: benchmarks/plan_memory.json."""
KEPT_HIDDEN = 4.0
RECOMPUTED_HIDDEN = {"float32": 46.0, "bfloat16": 42.0}
RECOMPUTED_INTERMEDIATE = {"float32": 24.0, "bfloat16": 12.0}
"""With checkpointed activations: what each layer keeps, and what the layer that is recomputed takes
once: benchmarks/plan_memory.json."""
TRAINED_BYTES = 16
"""Bytes per parameter in training: float32 weight, gradient and AdamW's two moments."""
GRADIENT_BYTES = 4
CHUNK_SHARE, CHUNK_LEAST, CHUNK_MOST = 1 / 64, 64 * 2**20, 2**30
"""Bytes of float32 logits that the loss holds at a time on an accelerator: a share of its memory,
within limits, as `losses.chunked.default_chunk_rows` has it; checked by a test."""
MARGIN = 0.08
"""Share of the device that is left free: CUDA context, workspaces, fragmentation. Assumed."""


@dataclass(frozen=True)
class Shape:
    """The widths and depth of a model, which determine its activations.

    Args:
        name: name of the model.
        parameters: number of parameters of the model.
        hidden: width of the residual stream.
        layers: number of blocks.
        intermediate: width inside the feed-forward block (of the active experts together).
    """

    name: str
    parameters: float
    hidden: int
    layers: int
    intermediate: int


SHAPES = (
    Shape("SmolLM2-135M", 135e6, 576, 30, 1536),
    Shape("SmolLM2-360M", 362e6, 960, 32, 2560),
    Shape("Qwen2.5-0.5B", 494e6, 896, 24, 4864),
    Shape("Llama-3.2-1B", 1.24e9, 2048, 16, 8192),
    Shape("SmolLM2-1.7B", 1.71e9, 2048, 24, 8192),
    Shape("Llama-3.2-3B", 3.21e9, 3072, 28, 8192),
    Shape("Llama-3.1-8B", 8.03e9, 4096, 32, 14336),
    Shape("Qwen2.5-14B", 14.8e9, 5120, 48, 13824),
    Shape("Qwen2.5-32B", 32.8e9, 5120, 64, 27648),
    Shape("Llama-3.1-70B", 70.6e9, 8192, 80, 28672),
    Shape("Llama-3.1-405B", 405e9, 16384, 126, 53248),
)
"""Shapes as their published config.json files state them."""


def shape_of(parameters: float) -> Shape:
    """Return the published shape whose number of parameters is nearest, scaled if it is not near.

    Parameters grow with the square of the widths and with the depth; both are scaled by one factor.
    """
    near = min(SHAPES, key=lambda shape: abs(math.log(shape.parameters / parameters)))
    ratio = parameters / near.parameters
    if 2 / 3 < ratio < 3 / 2:
        return near
    hidden, layers, intermediate = (
        max(1, round(size * ratio ** (1 / 3)))
        for size in (near.hidden, near.layers, near.intermediate)
    )
    return Shape(f"{near.name}, scaled", parameters, hidden, layers, intermediate)


@dataclass(frozen=True)
class Memory:
    """The peak memory of one device.

    Args:
        parts: bytes by purpose; not all of them are allocated at once.
        total: bytes at the peak.
    """

    parts: tuple[tuple[str, float], ...]
    total: float

    def fits(self, capacity: float) -> bool:
        """Return whether the parts and the margin fit in a device's memory."""
        return self.total <= capacity * (1 - MARGIN)


def pass_memory(
    parameters: float,
    shape: Shape,
    *,
    vocab: int,
    window: int,
    batch: int,
    dtype: str = "bfloat16",
    devices: int = 1,
) -> Memory:
    """Return the memory of a teacher's pass on each device that the teacher is split over.

    Args:
        parameters: number of parameters of the teacher.
        shape: shape of the teacher.
        vocab: rows of the teacher's head.
        window: tokens per window.
        batch: windows per forward pass.
        dtype: dtype of the weights, a key of `BYTES`.
        devices: number of devices over which the weights are split.
    """
    _require_dtype(dtype)
    computed = max(2, BYTES[dtype])  # quantised weights are multiplied in 16 bits
    tokens = batch * window
    widths = PASS_HIDDEN * shape.hidden + PASS_INTERMEDIATE * shape.intermediate
    slices = min(SLICE_POSITIONS, window) * vocab
    weights = parameters * BYTES[dtype] / devices
    activations, states = tokens * widths * computed, tokens * shape.hidden * computed
    logits, sampler = slices * SLICE_BYTES, slices * SAMPLER_BYTES
    return Memory(
        (
            ("weights", weights),
            ("activations", activations),
            ("logits", logits),
            ("sampler", sampler),
        ),
        # when logits are made, of the activations only the last hidden states are left
        weights + max(activations, states + logits + sampler),
    )


def training_memory(
    parameters: float,
    shape: Shape,
    *,
    vocab: int,
    window: int,
    batch: int,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    ranks: int = 1,
    capacity: float = 80e9,
) -> Memory:
    """Return the memory of a student's training step on each rank.

    Args:
        parameters: number of parameters of the student.
        shape: shape of the student.
        vocab: rows of the student's head.
        window: tokens per window.
        batch: windows per rank and step.
        dtype: dtype of the products: float32, or bfloat16 by autocast over float32 weights.
        checkpointing: whether activations are recomputed in the backward pass.
        ranks: ranks over which weights, gradients and moments are sharded (FSDP); 1 for DDP.
        capacity: bytes of the device, which determine the size of the loss's chunks.
    """
    if dtype not in STEP_INTERMEDIATE:
        raise InvalidArgumentError(f"a student's dtype is {dtype!r}; give float32 or bfloat16")
    tokens, product = batch * window, BYTES[dtype]
    if checkpointing:
        kept = tokens * shape.layers * KEPT_HIDDEN * shape.hidden
        widths = RECOMPUTED_HIDDEN[dtype] * shape.hidden
        again = tokens * (widths + RECOMPUTED_INTERMEDIATE[dtype] * shape.intermediate)
    else:
        widths = STEP_HIDDEN * shape.hidden + STEP_INTERMEDIATE[dtype] * shape.intermediate
        kept, again = tokens * shape.layers * widths, 0.0
    copies = product * parameters if dtype == "bfloat16" else 0.0
    state = ((TRAINED_BYTES - GRADIENT_BYTES) * parameters + copies) / ranks
    gradients = GRADIENT_BYTES * parameters / ranks
    chunk = min(max(capacity * CHUNK_SHARE, CHUNK_LEAST), CHUNK_MOST, tokens * vocab * 4)
    head = vocab * shape.hidden * (GRADIENT_BYTES + (product if dtype == "bfloat16" else 0))
    loss = chunk * (1 + product / 4) + head  # a chunk's copy in the products' dtype
    return Memory(
        (
            ("weights and moments", state),
            ("gradients", gradients),
            ("activations", kept + again),
            ("loss", loss),
        ),
        # gradients grow while activations are given back
        state + max(kept + loss, kept + again + head, gradients),
    )


MemoryOf = Callable[[int, int], Memory]
"""Returns the memory for a number of windows, on each of a number of devices."""


def largest_batch(memory_of: MemoryOf, capacity: float) -> int | None:
    """Return the largest power of two as a batch that fits on one device; None if one does not."""
    fitting = [2**power for power in range(16) if memory_of(2**power, 1).fits(capacity)]
    return max(fitting, default=None)


def fewest_devices(memory_of: MemoryOf, batch: int, capacity: float) -> int | None:
    """Return the smallest power of two of devices on which the shares fit; None above 1 024."""
    fitting = (2**power for power in range(11))
    return next((n for n in fitting if memory_of(batch, n).fits(capacity)), None)


def _require_dtype(dtype: str) -> None:
    if dtype not in BYTES:
        raise InvalidArgumentError(f"dtype is {dtype!r}; give one of {', '.join(BYTES)}")
