"""Test the loss under all transformations of autograd and torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from problems import RULES, D, N, V, problem
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses import linear_sparse_cross_entropy, sparse_cross_entropy

DIFFERENTIABLE = ("input", "linear_weight", "linear_bias")


def bound(p, **options):
    """The loss as a function of its differentiable tensors."""
    rest = {k: v for k, v in p.items() if k not in DIFFERENTIABLE}

    def loss(x, head, bias):
        return linear_sparse_cross_entropy(x, head, linear_bias=bias, **rest, **options)

    return loss


def leaves(p):
    return tuple(p[name] for name in DIFFERENTIABLE)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule):
    p = problem()
    loss = bound(p, missing_mass=rule, alpha=0.3, temperature=1.7, logit_softcap=4.0, chunk_rows=5)

    class Again(torch.autograd.Function):
        """gradcheck runs backward twice on one graph: form the gradients anew each time."""

        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return loss(*tensors)

        @staticmethod
        def backward(ctx, d_loss):
            with torch.enable_grad():
                fresh = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                return torch.autograd.grad(loss(*fresh), fresh, d_loss)

    assert torch.autograd.gradcheck(Again.apply, leaves(p))


def test_second_backward_raises_instead_of_scaling_twice():
    p = problem()
    loss = bound(p)(*leaves(p))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_refused():
    p = problem()
    (gradient,) = torch.autograd.grad(bound(p)(*leaves(p)), p["input"], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_nothing_is_formed_without_gradients():
    p = problem()
    with torch.no_grad():
        loss = bound(p)(*leaves(p))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, bound(p)(*leaves(p)).detach())


def test_gradients_accumulate_to_those_of_the_large_batch():
    p = problem()
    expected = torch.autograd.grad(bound(p, reduction="sum")(*leaves(p)), leaves(p))
    for rows in (slice(0, 5), slice(5, N)):
        part = {k: v if k in ("linear_weight", "linear_bias") else v[rows] for k, v in p.items()}
        linear_sparse_cross_entropy(**part, reduction="sum").backward()
    for tensor, gradient in zip(leaves(p), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    p = problem()
    loss = bound(p)
    expected = torch.autograd.grad(loss(*leaves(p)), leaves(p))
    checkpoint(loss, *leaves(p), use_reentrant=reentrant).backward()
    for tensor, gradient in zip(leaves(p), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_tied_embeddings():
    torch.manual_seed(0)
    p = problem()
    embedding = nn.Embedding(V, D, dtype=torch.float64)
    tokens = torch.randint(V, (N,))

    def gradient(impl):
        embedding.zero_grad()
        hidden = embedding(tokens).tanh()
        linear_sparse_cross_entropy(
            hidden, embedding.weight, p["target_ids"], p["target_weights"], impl=impl
        ).backward()
        return embedding.weight.grad.clone()

    torch.testing.assert_close(gradient("chunked"), gradient("reference"))


def test_autocast_computes_in_its_dtype_and_returns_float32():
    p = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bound(p)(*leaves(p))
    assert loss.dtype == torch.float32
    loss.backward()
    x, W, bias = (t.detach().bfloat16().requires_grad_() for t in leaves(p))
    low = bound(p)(x, W, bias)
    low.backward()
    torch.testing.assert_close(loss, low)
    for tensor, rounded in zip(leaves(p), (x, W, bias), strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, rounded.grad.float())


def test_autocast_leaves_float64_alone_as_torch_does():
    p = problem(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.linear(*leaves(p)).dtype == torch.float64
        loss = bound(p)(*leaves(p))
        x, W, bias = leaves(p)
        with pytest.raises(InvalidArgumentError, match="bfloat16: convert them to one dtype"):
            bound(p)(x.double(), W.double(), bias.float())
    torch.testing.assert_close(loss, bound(p)(*leaves(p)), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["drop", "ghost"])
def test_compile_fullgraph(rule):
    p = problem(torch.float32)
    options = {"missing_mass": rule, "alpha": 0.2, "chunk_rows": 4, "return_parts": True}

    def step(x, head, bias):
        rest = {k: v for k, v in p.items() if k not in DIFFERENTIABLE}
        parts = linear_sparse_cross_entropy(2 * x, head, linear_bias=bias, **rest, **options)
        return parts.loss, parts.kd, parts.ce

    compiled = torch.compile(step, fullgraph=True)
    found, expected = compiled(*leaves(p)), step(*leaves(p))
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found[0] * 3, leaves(p)),
        torch.autograd.grad(expected[0] * 3, leaves(p)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compile_fullgraph_of_logits():
    p = problem(torch.float32)
    logits = F.linear(*leaves(p)).detach().requires_grad_()

    def step(z):
        return sparse_cross_entropy(z, p["target_ids"], p["target_weights"])

    found, expected = torch.compile(step, fullgraph=True)(logits), step(logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0]
    )
