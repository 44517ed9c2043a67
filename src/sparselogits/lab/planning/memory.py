"""Estimate the memory of one device, and whether a teacher's pass or a student's training fits.

The coefficients were fitted to the allocations of Llama models, counted by torch's profiler
(benchmarks/plan_memory.py and .json; docs/planning.md states the errors). Attention is assumed to
be computed by a fused kernel that does not store the matrix of attention scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}
"""Bytes per weight by data type."""
PASS_HIDDEN, PASS_INTERMEDIATE = 4.1, 3.0
"""Values per token and unit of hidden or intermediate size at the peak of a pass without gradients.
"""
# a test compares the value with the teacher's, which is not imported because that would load torch
SLICE_POSITIONS = 256
"""Number of positions whose logits a teacher computes at a time."""
SLICE_BYTES = 4 * 2.5  # float32 copies of this slice and the previous one, and a bfloat16 copy
"""Bytes of memory per logit of a slice of positions, at the peak."""
SAMPLER_BYTES = 4  # one float32 copy, assumed and not measured; less on a CPU
"""Bytes of memory that the sampler needs per logit of a slice."""
STEP_HIDDEN = 40.0
"""Bytes per token, layer and unit of hidden size that a training step stores for the backward pass.
"""
STEP_INTERMEDIATE = {"float32": 16.0, "bfloat16": 8.5}  # bfloat16: autocast over float32 weights
"""Bytes per token, layer and unit of intermediate size that a training step stores, by dtype."""
KEPT_HIDDEN = 4.0
"""Bytes per token, layer and unit of hidden size that are stored with activation checkpointing."""
RECOMPUTED_HIDDEN = {"float32": 46.0, "bfloat16": 42.0}
"""Bytes per token and unit of hidden size that recomputing one layer takes, by dtype."""
RECOMPUTED_INTERMEDIATE = {"float32": 24.0, "bfloat16": 12.0}
"""Bytes per token and unit of intermediate size that recomputing one layer takes, by dtype."""
TRAINED_BYTES = 16
"""Bytes per parameter in training: float32 weight, gradient and AdamW's two moments."""
GRADIENT_BYTES = 4
"""Bytes per parameter for a float32 gradient."""
# as in losses.chunked.default_chunk_rows; a test checks it
CHUNK_SHARE, CHUNK_LEAST, CHUNK_MOST = 1 / 64, 64 * 2**20, 2**30
"""Share of a device's memory for a chunk of float32 logits in the loss, and its limits in bytes."""
MARGIN = 0.08
"""Share of the device's memory for CUDA context, workspaces and fragmentation; an assumption."""


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model, which determine the size of its activations.

    Args:
        name: name of the model.
        parameters: number of parameters.
        hidden: hidden size.
        layers: number of transformer blocks.
        intermediate: intermediate size of the MLP, summed over all active experts.
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
"""Shapes of published models, from their config.json files."""


def shape_of(parameters: float) -> Shape:
    """Return a plausible shape for a model with this number of parameters.

    The shape is that of the published model nearest in size. If the sizes differ by a factor of 1.5
    or more, widths and depth are scaled by the cube root of the ratio.

    Examples:
        >>> shape_of(8e9).name, shape_of(1e12).name
        ('Llama-3.1-8B', 'Llama-3.1-405B, scaled')
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
    """Peak memory of one device.

    Args:
        parts: pairs of purpose and bytes; not all parts are allocated at the same time.
        total: bytes at the peak.
    """

    parts: tuple[tuple[str, float], ...]
    total: float

    def fits(self, capacity: float) -> bool:
        """Return whether the peak and the margin fit in a memory of `capacity` bytes."""
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
    """Estimate the memory of a teacher's forward pass per device.

    Args:
        parameters: number of parameters in the teacher.
        shape: shape of the teacher.
        vocab: number of rows in the teacher's head.
        window: number of tokens per window.
        batch: number of windows per forward pass.
        dtype: data type of the weights, a key of `BYTES`.
        devices: number of devices over which the weights are split.

    Raises:
        InvalidArgumentError: If `dtype` is unknown.

    Examples:
        >>> found = pass_memory(8e9, shape_of(8e9), vocab=128_256, window=1024, batch=8)
        >>> round(found.total / 1e9, 1), found.fits(80e9)
        (17.0, True)
    """
    if dtype not in BYTES:
        raise InvalidArgumentError(f"unknown dtype {dtype!r}; give one of {', '.join(BYTES)}")
    computed = max(2, BYTES[dtype])  # quantised weights are multiplied in 16 bits
    tokens = batch * window
    widths = PASS_HIDDEN * shape.hidden + PASS_INTERMEDIATE * shape.intermediate
    slices = min(SLICE_POSITIONS, window) * vocab
    weights = parameters * BYTES[dtype] / devices
    activations, states = tokens * widths * computed, tokens * shape.hidden * computed
    logits, sampler = slices * SLICE_BYTES, slices * SAMPLER_BYTES
    # when logits are computed, the only activations in memory are the last hidden states
    total = weights + max(activations, states + logits + sampler)
    parts = {"weights": weights, "activations": activations, "logits": logits, "sampler": sampler}
    return Memory(tuple(parts.items()), total)


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
    """Estimate the memory of a student's training step per rank.

    Args:
        parameters: number of parameters in the student.
        shape: shape of the student.
        vocab: number of rows in the student's head.
        window: number of tokens per window.
        batch: number of windows per rank and step.
        dtype: data type of the products: float32, or bfloat16 by autocast over float32 weights.
        checkpointing: whether activations are recomputed in the backward pass.
        ranks: number of ranks over which weights, gradients and moments are sharded (FSDP); 1 for
            DDP.
        capacity: bytes of the device's memory, which determine the size of the loss's chunks.

    Raises:
        InvalidArgumentError: If `dtype` is neither float32 nor bfloat16.
    """
    if dtype not in STEP_INTERMEDIATE:
        raise InvalidArgumentError(f"the student's dtype is {dtype!r}; give float32 or bfloat16")
    tokens, product = batch * window, BYTES[dtype]
    if checkpointing:
        stored = tokens * shape.layers * KEPT_HIDDEN * shape.hidden
        widths = RECOMPUTED_HIDDEN[dtype] * shape.hidden
        recomputed = tokens * (widths + RECOMPUTED_INTERMEDIATE[dtype] * shape.intermediate)
    else:
        widths = STEP_HIDDEN * shape.hidden + STEP_INTERMEDIATE[dtype] * shape.intermediate
        stored, recomputed = tokens * shape.layers * widths, 0.0
    copies = product * parameters if dtype == "bfloat16" else 0.0
    state = ((TRAINED_BYTES - GRADIENT_BYTES) * parameters + copies) / ranks
    gradients = GRADIENT_BYTES * parameters / ranks
    chunk = min(max(capacity * CHUNK_SHARE, CHUNK_LEAST), CHUNK_MOST, tokens * vocab * 4)
    head = vocab * shape.hidden * (GRADIENT_BYTES + (product if dtype == "bfloat16" else 0))
    loss = chunk * (1 + product / 4) + head  # in float32, and a copy in the products' dtype
    # gradients are allocated while activations are freed
    total = state + max(stored + loss, stored + recomputed + head, gradients)
    parts = {"weights and moments": state, "gradients": gradients}
    return Memory((*parts.items(), ("activations", stored + recomputed), ("loss", loss)), total)


MemoryOf = Callable[[int, int], Memory]
"""Function from the windows per batch and the number of devices to the memory per device."""


def largest_batch(memory_of: MemoryOf, capacity: float) -> int | None:
    """Return the largest batch of 2^n windows, n <= 15, that fits on one device, or None."""
    fitting = [2**power for power in range(16) if memory_of(2**power, 1).fits(capacity)]
    return max(fitting, default=None)


def fewest_devices(memory_of: MemoryOf, batch: int, capacity: float) -> int | None:
    """Return the fewest devices, a power of two up to 1 024, on which a batch fits, or None."""
    fitting = (2**power for power in range(11))
    return next((n for n in fitting if memory_of(batch, n).fits(capacity)), None)
