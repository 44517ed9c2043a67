"""Test the layouts of docs/loss.md by running its code."""

import pytest
import torch
import torch.distributed as dist
from tests.pages import ROOT, blocks

from sparselogits.losses import linear_sparse_cross_entropy

PAGE = ROOT / "docs" / "loss.md"
D, V, K, ROWS, BATCH = 6, 13, 3, 8, 2  # two sequences of eight positions


def shown(word: str) -> str:
    """The code of the page that holds this word."""
    (code,) = (block.code for block in blocks(PAGE) if word in block.code)
    return code


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (BATCH, ROWS), generator=generator)
    labels[0, 3], labels[:, -1] = -100, -100
    weights = torch.rand(BATCH, ROWS, K, generator=generator)
    return {
        "hidden": torch.randn(BATCH, ROWS, D, generator=generator, requires_grad=True),
        "head": torch.randn(V, D, generator=generator, requires_grad=True),
        "target_ids": torch.rand(BATCH, ROWS, V, generator=generator).argsort(-1)[..., :K],
        "target_weights": weights / weights.sum(-1, keepdim=True),
        "shift_labels": labels,
    }


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def loss_and_gradients(loss, batch):
    return [loss, *torch.autograd.grad(loss, (batch["hidden"], batch["head"]))]


def plain(batch):
    loss = linear_sparse_cross_entropy(
        batch["hidden"],
        batch["head"],
        batch["target_ids"],
        batch["target_weights"],
        labels=batch["shift_labels"],
        alpha=0.1,
    )
    return loss_and_gradients(loss, batch)


def test_megatron_layout(batch, one_rank):
    names = dict(batch)
    names |= {
        "hidden": batch["hidden"].transpose(0, 1),
        "head_slice": batch["head"],
        "first_id": 0,
        "V": V,
        "tensor_group": None,
    }
    exec(shown("tensor_group"), names)
    torch.testing.assert_close(loss_and_gradients(names["loss"], batch), plain(batch))


def test_zigzag_of_a_context_parallel_ring(batch, one_rank):
    """All ranks' shares in turn, over a group of one: their sums add up to the whole."""
    whole, shares = plain(batch), []
    for rank in range(2):
        names = dict(batch) | {"rank": rank, "ranks": 2, "context_group": None}
        exec(shown("context_group"), names)
        counted = (names["own_labels"] != -100).sum()
        shares.append([counted * t for t in loss_and_gradients(names["loss"], batch)])
    count = (batch["shift_labels"] != -100).sum()
    added = [(a + b) / count for a, b in zip(*shares, strict=True)]
    torch.testing.assert_close(added, whole)
