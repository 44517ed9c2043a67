"""Detect whether the processor has instructions for products of 16-bit numbers."""

from __future__ import annotations

import platform

import torch


def has_products(dtype: torch.dtype) -> bool | None:
    """Return whether the processor has instructions for products of bfloat16 or float16 numbers.

    Without such instructions PyTorch computes the products several times slower than in float32.
    The result is None if unknown: for other data types, for processors other than x86, and for
    float16 if PyTorch lacks oneDNN.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype == torch.float16 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return None
