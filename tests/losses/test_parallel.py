"""The loss across real processes (gloo) against one process, gradients included.

pytest tests/losses/test_parallel.py
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from problems import RULES, D, N, V, problem
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses import (
    Criterion,
    linear_sparse_cross_entropy,
    sequence_parallel_sparse_cross_entropy,
    vocabulary_parallel_sparse_cross_entropy,
)
from sparselogits.train import leave_process_group

LEAVES = ("input", "linear_weight", "linear_bias")
WIDTHS = {2: [7, 4], 4: [1, 5, 2, 3]}  # uneven slices of the vocabulary
ROWS = {2: [4, 9], 4: [5, 0, 7, 1]}  # uneven shares of the positions


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one_process(ranks, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    command = [sys.executable, __file__, str(ranks), str(tmp_path / "rendezvous")]
    running = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
        assert "all agree" in output


def parts_and_gradients(function, p, **options):
    p = {k: v.detach().requires_grad_(k in LEAVES) for k, v in p.items()}
    parts = function(**p, **options)
    return list(parts), list(torch.autograd.grad(0.7 * parts.loss, [p[k] for k in LEAVES]))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def check_vocabulary_parallel(rank, ranks):
    first = sum(WIDTHS[ranks][:rank])
    own = slice(first, first + WIDTHS[ranks][rank])
    mixes = [(0.0, 1.0), (0.3, 2.5)]
    for rule, (alpha, temperature) in itertools.product(RULES, mixes):
        options = {"missing_mass": rule, "alpha": alpha, "temperature": temperature}
        options |= {"logit_softcap": 6.0}
        p = problem()
        parts, grads = parts_and_gradients(
            linear_sparse_cross_entropy, p, **options, chunk_rows=5, return_parts=True
        )
        p["linear_weight"], p["linear_bias"] = p["linear_weight"][own], p["linear_bias"][own]
        found, found_grads = parts_and_gradients(
            vocabulary_parallel_sparse_cross_entropy,
            p,
            criterion=Criterion(**options),
            first_id=first,
            vocab_size=V,
            chunk_rows=5,
        )
        assert_close(found, parts)
        assert_close(found_grads, [grads[0], grads[1][own], grads[2][own]])


def check_sequence_parallel(rank, ranks):
    first = sum(ROWS[ranks][:rank])
    own = slice(first, first + ROWS[ranks][rank])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    for rule, reduction in itertools.product(RULES, ("mean", "sum")):
        options = {"missing_mass": rule, "alpha": 0.3, "reduction": reduction}
        p = problem()
        parts, grads = parts_and_gradients(
            linear_sparse_cross_entropy, p, **options, return_parts=True
        )
        mine = {
            k: v if k in ("linear_weight", "linear_bias") else v[order][own] for k, v in p.items()
        }
        found, found_grads = parts_and_gradients(
            sequence_parallel_sparse_cross_entropy, mine, criterion=Criterion(**options)
        )
        for share in found_grads[1:]:
            dist.all_reduce(share)
        assert_close(found, parts)
        assert_close(found_grads, [grads[0][order][own], *grads[1:]])


class Student(nn.Module):
    """Embedding, one layer, head; the loss inside forward, where FSDP has gathered the head."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, ids, weights):
        return self.loss(tokens, ids, weights)

    def loss(self, tokens, ids, weights):
        hidden = self.layer(self.embedding(tokens)).tanh()
        return linear_sparse_cross_entropy(hidden, self.head.weight, ids, weights)


def check_fully_shard(rank, ranks, tied, registered):
    """A plain loop; the loss in forward, or in a method that FSDP has been told of."""
    p = problem(torch.float32)
    rows = N // ranks
    tokens = p["target_ids"][: rows * ranks, 1]
    batch = (tokens, p["target_ids"][: rows * ranks], p["target_weights"][: rows * ranks])
    own = slice(rank * rows, (rank + 1) * rows)

    def student():
        torch.manual_seed(0)
        return Student(tied).to(torch.float64)

    alone = student()
    alone(*batch).backward()
    sharded = student()
    fully_shard(sharded.layer)
    fully_shard(sharded)
    if registered:
        register_fsdp_forward_method(sharded, "loss")
    step = sharded.loss if registered else sharded
    for _ in range(2):  # twice: gradients accumulate, and the first step has built lazy state
        step(*(t[own] for t in batch)).backward()
    for (name, q), expected in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        assert isinstance(q.grad, DTensor), name
        assert_close(q.grad.full_tensor(), 2 * expected.grad)
    sharded.reshard()
    hidden = torch.zeros(rows, D, dtype=torch.float64)
    with pytest.raises(InvalidArgumentError, match="inside the wrapped module's forward"):
        linear_sparse_cross_entropy(hidden, sharded.head.weight, *(t[own] for t in batch[1:]))


def main(ranks, rendezvous, rank):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(rendezvous)}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    check_vocabulary_parallel(rank, ranks)
    check_sequence_parallel(rank, ranks)
    if ranks == 2:
        for tied, registered in itertools.product((False, True), repeat=2):
            check_fully_shard(rank, ranks, tied, registered)
    leave_process_group()
    print("all agree")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
