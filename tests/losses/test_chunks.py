"""Test that the rows per chunk depend only on shapes and the accelerator's total memory."""

from types import SimpleNamespace

import pytest
import torch

from sparselogits.losses import chunked
from sparselogits.losses.chunked import default_chunk_rows

MIB = 2**20
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype", "expected"),
    [
        (10_000, 32_768, torch.float32, 512),  # 64 MiB of float32
        (10_000, 32_768, torch.float64, 512),
        (10_000, 151_936, torch.float32, 256),  # 64 MiB would be 110 rows: never below 256
        (10_000, 151_936, torch.bfloat16, 512),  # nor in low precision below 512
        (10_000, 151_936, torch.float16, 512),
        (10_000, 1024, torch.float32, 5_000),  # half of the rows at most
        (601, 1024, torch.float32, 301),
        (100, 1024, torch.float32, 256),
        (0, 1024, torch.float32, 256),
    ],
)
def test_on_a_cpu(rows, vocabulary, dtype, expected):
    assert default_chunk_rows(rows, vocabulary, CPU, dtype) == expected


@pytest.mark.parametrize(
    ("memory", "budget"),
    [
        (141 * 1024 * MIB, 1024 * MIB),  # never above 1 GiB
        (64 * 1024 * MIB, 1024 * MIB),
        (24 * 1024 * MIB, 384 * MIB),  # 1/64
        (2 * 1024 * MIB, 64 * MIB),  # never below 64 MiB
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_accelerator(memory, budget, dtype, monkeypatch):
    monkeypatch.setattr(chunked, "_accelerator_memory", lambda device: memory)
    for vocabulary in (32_768, 151_936):
        expected = budget // (4 * vocabulary)  # logits are float32 whatever the input
        assert default_chunk_rows(10_000, vocabulary, GPU, dtype) == expected
    assert default_chunk_rows(10_000, 10**9, GPU, dtype) == 1


def test_memory_is_the_total_of_a_gpu_and_is_asked_once(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(total_memory=24 * 1024 * MIB)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    chunked._accelerator_memory.cache_clear()
    try:
        rows = [default_chunk_rows(1000, 32_768, GPU, torch.float32) for _ in range(3)]
        assert rows == [384 * MIB // (4 * 32_768)] * 3
        assert asked == [GPU]
        assert chunked._accelerator_memory(torch.device("mps")) == 16 * 1024 * MIB
        assert asked == [GPU]
    finally:
        chunked._accelerator_memory.cache_clear()


@pytest.mark.parametrize(("total", "at_most"), [(0, 256), (1, 256), (513, 512), (1000, 256)])
def test_chunks_are_about_equal(total, at_most):
    """A last chunk of one row would waste three products."""
    rows = chunked._balanced(total, at_most)
    assert 1 <= rows <= at_most
    chunks = -(-total // rows)
    assert chunks == -(-total // at_most)
    assert chunks * rows - total < max(1, chunks)
