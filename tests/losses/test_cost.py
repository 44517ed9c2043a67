"""What the loss promises to cost: one chunk of logits, and no waiting for the device.

pytest tests/losses/test_cost.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from problems import RULES, problem
from torch.utils._python_dispatch import TorchDispatchMode

from sparselogits.losses import (
    SparseKDLoss,
    TeacherHead,
    linear_dense_kd,
    linear_sparse_cross_entropy,
)

MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.py"
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


@pytest.fixture
def peak_bytes(monkeypatch):
    """The benchmark's own function; `peak_bytes(run)`."""
    monkeypatch.syspath_prepend(MEMORY.parent)  # where the script finds its own kin
    spec = importlib.util.spec_from_file_location("memory", MEMORY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda run: module.peak_bytes(run, "cpu")


@pytest.mark.parametrize("rule", ["drop", "ghost"])
def test_peak_memory_is_one_chunk_of_logits(rule, peak_bytes):
    rows, width, vocabulary, chunk_rows = 512, 8, 50_000, 64
    x = torch.randn(rows, width, requires_grad=True)
    W = torch.randn(vocabulary, width, requires_grad=True)
    ids, weights = torch.arange(4).expand(rows, 4), torch.full((rows, 4), 0.2)

    def step():
        linear_sparse_cross_entropy(
            x, W, ids, weights, missing_mass=rule, chunk_rows=chunk_rows
        ).backward()

    gradients = 4 * (x.numel() + W.numel())
    beyond = peak_bytes(step) - gradients
    assert beyond < 1.1 * 4 * chunk_rows * vocabulary


def test_logits_are_not_kept_for_backward():
    p = problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_sparse_cross_entropy(**p)
    assert sorted(kept) == sorted(
        [torch.Size([])] + [p[k].shape for k in ("input", "linear_weight", "linear_bias")]
    )


class NoWaiting(TorchDispatchMode):
    """Refuses every operator whose result the host has to wait for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def test_the_guard_guards():
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_waits_for_the_device(rule):
    p = problem()
    module = SparseKDLoss(alpha=0.2, temperature=2.0, logit_softcap=5.0, missing_mass=rule)
    with NoWaiting():
        module(**p).loss.backward()


def test_dense_baselines_do_not_wait_either():
    p = problem()
    teacher = TeacherHead(p["input"].detach(), p["linear_weight"].detach())
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        with NoWaiting():
            linear_dense_kd(
                p["input"],
                p["linear_weight"],
                teacher,
                divergence=divergence,
                labels=p["labels"],
                alpha=0.1,
            ).loss.backward()
