"""Plugin of pytest that sums blocks by the Triton kernel, in Triton's interpreter on a CPU."""

import pytest
import torch

from sparselogits.samplers import compiled, triton_sums

AT_ONCE = 4096
"""Blocks per program: the interpreter's time depends on the number of programs, the bits do not."""


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sums, "_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(
        compiled,
        "fastest_for",
        lambda logits: None if logits.dtype == torch.float64 else triton_sums.block_sums,
    )
