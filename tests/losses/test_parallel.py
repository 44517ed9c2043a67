"""Test the loss across processes (gloo) against one process, gradients included."""

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


def reductions(call):
    """How many times a call reduces over the group."""
    counted, reduce = [], dist.all_reduce
    dist.all_reduce = lambda *tensors, **options: counted.append(1) or reduce(*tensors, **options)
    try:
        call()
    finally:
        dist.all_reduce = reduce
    return len(counted)


def check_reductions(rank, ranks):
    """What `parallel.py` says a chunk costs, and one more for the input's gradient at the end."""
    first = sum(WIDTHS[ranks][:rank])
    own = slice(first, first + WIDTHS[ranks][rank])
    p = problem()
    p["linear_weight"] = p["linear_weight"][own].detach().requires_grad_()
    p["linear_bias"] = p["linear_bias"][own].detach().requires_grad_()
    bare = {**p, "labels": None}
    hot = {"temperature": 2.5}
    cases = [
        (bare, {}, 3),
        (bare, {"missing_mass": "ghost"}, 3),
        (bare, {"missing_mass": "smooth"}, 4),
        (bare, hot, 3),
        (p, {}, 4),
        (p, {"alpha": 0.3}, 4),
        (p, {"alpha": 0.3, "missing_mass": "ground_truth"}, 4),
        (p, {"alpha": 0.3, "missing_mass": "smooth"}, 5),
        (p, {"alpha": 0.3, **hot}, 6),
        (p, {"alpha": 0.3, "missing_mass": "smooth", **hot}, 7),
    ]
    for tensors, options, of_a_chunk in cases:

        def call(tensors=tensors, options=options):
            return vocabulary_parallel_sparse_cross_entropy(
                **tensors,
                criterion=Criterion(**options),
                first_id=first,
                vocab_size=V,
                chunk_rows=5,
            ).loss

        chunks = -(-N // 5)
        assert reductions(lambda call=call: call().backward()) == of_a_chunk * chunks + 1, options
        with torch.no_grad():
            assert reductions(call) == of_a_chunk * chunks, options


def check_low_precision(rank, ranks):
    """Scaled logits, to +-1e4 too, and rows that hold NaN: as near the truth as one process is."""
    first = sum(WIDTHS[ranks][:rank])
    own = slice(first, first + WIDTHS[ranks][rank])
    generator = torch.Generator().manual_seed(0)
    exact = problem()
    # small whole numbers: every product is exact, so that 1e4 does not magnify rounding
    for name in LEAVES:
        exact[name] = torch.randint(-3, 4, exact[name].shape, generator=generator).double()
    exact["linear_weight"][1] = 3.0
    exact["input"][2], exact["input"][3] = 3.0, -3.0  # logits of +-54 and a bias, times the scale
    exact["target_weights"] = exact["target_weights"].float()
    settings = itertools.product(
        (torch.float32, torch.bfloat16), (0.13, 185.0), ("drop", "ghost", "smooth")
    )
    for dtype, scale, rule in settings:
        options = {"missing_mass": rule, "alpha": 0.3, "logit_scale": scale}
        truth = parts_and_gradients(
            linear_sparse_cross_entropy, exact, **options, return_parts=True, impl="reference"
        )
        p = {k: v.to(dtype) if k in LEAVES else v for k, v in exact.items()}
        p["input"][0], p["target_weights"] = torch.nan, p["target_weights"].clone()
        p["target_weights"][7] = torch.nan  # the labels of rows 0 and 7 are ignored
        alone = parts_and_gradients(
            linear_sparse_cross_entropy, p, **options, chunk_rows=5, return_parts=True
        )
        p["linear_weight"], p["linear_bias"] = p["linear_weight"][own], p["linear_bias"][own]
        sliced = {"criterion": Criterion(**options), "first_id": first, "vocab_size": V}
        found = parts_and_gradients(
            vocabulary_parallel_sparse_cross_entropy, p, **sliced, chunk_rows=5
        )
        assert_close_in(dtype, found[0], truth[0], alone[0])
        for result in (truth[1], alone[1]):
            result[1:] = [g[own] for g in result[1:]]
        assert_close_in(dtype, found[1], truth[1], alone[1])
        if rank == ranks - 1:  # NaN in one rank's slice reaches the loss of all
            p["linear_weight"][0] = torch.nan
        poisoned = vocabulary_parallel_sparse_cross_entropy(**p, **sliced)
        assert poisoned.loss.isnan()


def assert_close_in(dtype, found, truth, alone):
    """Twice the error of one process, and a few roundings of the result: shares are added."""
    for a, exact, one in zip(found, truth, alone, strict=True):
        rounding = 4 * torch.finfo(torch.float32 if a.dim() == 0 else dtype).eps
        allowed = 2 * (one.double() - exact).norm() + rounding * exact.norm() + 1e-7
        assert (a.double() - exact).norm() <= allowed


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
    check_reductions(rank, ranks)
    check_low_precision(rank, ranks)
    check_sequence_parallel(rank, ranks)
    if ranks == 2:
        for tied, registered in itertools.product((False, True), repeat=2):
            check_fully_shard(rank, ranks, tied, registered)
    leave_process_group()
    print("all agree")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
