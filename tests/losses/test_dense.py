"""Test the dense baselines against independent formulas, autograd and TRL."""

import pytest
import torch
import torch.nn.functional as F
from problems import D, N, V
from tests.pages import ROOT, blocks

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses import (
    DIVERGENCES,
    Divergence,
    TeacherHead,
    linear_dense_kd,
    linear_sparse_cross_entropy,
)

VT, DT = V - 2, 5
MASK = torch.tensor([True] * 3 + [False] + [True] * (VT - 4))
PAGE = ROOT / "docs" / "extending.md"


def shown() -> Divergence:
    """Return the divergence that docs/extending.md shows how to add."""
    (code,) = (block.code for block in blocks(PAGE) if "class Hellinger" in block.code)
    names = {"torch": torch, "Tensor": torch.Tensor}
    exec(code, names)
    return names["Hellinger"]()


ADDED = shown()
EVERY = [*DIVERGENCES, ADDED]


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [normal(N, D), normal(V, D), normal(V)]
    teacher = [normal(N, DT), normal(VT, DT), normal(VT)]
    labels = torch.randint(VT, (N,), generator=generator)
    labels[[1, 5]] = -100
    weights = torch.rand(N, generator=generator) + 0.2
    return [t.requires_grad_() for t in student], teacher, labels, weights


def probabilities(teacher, temperature):
    hidden, weight, bias = teacher
    v = 6 * torch.tanh(F.linear(hidden, weight, bias) * 1.3 / 6) / temperature
    p = v.masked_fill(~MASK, -torch.inf).softmax(1)
    return F.pad(p, (0, V - VT))


def divergence_rows(divergence, z, p, beta):
    """Textbook formulas in probability space, ids without teacher probability left out by mask."""
    s = z.softmax(1)
    known = p > 0
    if divergence == "forward_kl":
        return (p * (p.clamp(min=1e-300).log() - s.log())).sum(1)
    if divergence == "reverse_kl":
        s = s * known / (s * known).sum(1, keepdim=True)
        return (s * torch.where(known, s.clamp(min=1e-300) / p.clamp(min=1e-300), 1.0).log()).sum(1)
    if divergence is ADDED:
        return 1 - (p.sqrt() * s.sqrt()).sum(1)
    m = beta * p + (1 - beta) * s
    first = (p * torch.where(known, p / m, 1.0).log()).sum(1)
    return beta * first + (1 - beta) * (s * (s / m).log()).sum(1)


@pytest.mark.parametrize("divergence", EVERY)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_matches_textbook_formula(divergence, alpha, temperature, dtype, tolerance):
    (x, W, bias), teacher, labels, weights = problem(dtype)
    parts = linear_dense_kd(
        x,
        W,
        TeacherHead(*teacher, logit_softcap=6.0, logit_scale=1.3, token_mask=MASK),
        divergence=divergence,
        beta=0.3,
        labels=labels,
        alpha=alpha,
        linear_bias=bias,
        logit_softcap=4.0,
        logit_scale=0.8,
        temperature=temperature,
        position_weights=weights,
        chunk_rows=5,
    )
    exact = [t.detach().double().requires_grad_() for t in (x, W, bias)]
    teacher, weights = [t.double() for t in teacher], weights.double()
    z = 4 * torch.tanh(F.linear(*exact) * 0.8 / 4)
    rows = divergence_rows(divergence, z / temperature, probabilities(teacher, temperature), 0.3)
    weight = weights * (labels != -100)
    kd = (weight * rows).sum() / weight.sum()
    ce = (weight * F.cross_entropy(z, labels, reduction="none")).sum() / weight.sum()
    expected = (1 - alpha) * kd + alpha * ce
    for a, b in zip(parts, (expected, kd, ce), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)
    found = torch.autograd.grad(parts.loss * 0.7, (x, W, bias))
    wanted = torch.autograd.grad(expected * 0.7, exact)
    torch.testing.assert_close(
        [g.double() for g in found], list(wanted), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("divergence", "beta"),
    [("forward_kl", 0), ("reverse_kl", 1), ("jensen_shannon", 0.2), ("jensen_shannon", 0.5)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_matches_trl(divergence, beta, temperature):
    """TRL's own function, with its mean over the tokens that have a label."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    (x, W, _), (hidden, _, _), labels, _ = problem()
    weight = torch.randn(V, DT, dtype=torch.float64)
    found = linear_dense_kd(
        *(x, W, TeacherHead(hidden, weight)),
        divergence=divergence,
        beta=beta if 0 < beta < 1 else 0.5,
        labels=labels,
        temperature=temperature,
    ).loss
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        x @ W.t(), hidden @ weight.t(), labels=labels, beta=beta, temperature=temperature
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, W)), torch.autograd.grad(expected, (x, W))
    )


def test_forward_kl_has_the_gradient_of_the_sparse_loss_at_the_whole_teacher():
    (x, W, _), teacher, labels, _ = problem()
    head = TeacherHead(*teacher, logit_softcap=6.0, logit_scale=1.3, token_mask=MASK)
    p = probabilities(teacher, 1.0)
    dense = linear_dense_kd(x, W, head, labels=labels)
    sparse = linear_sparse_cross_entropy(x, W, torch.arange(V).expand(N, V), p, labels=labels)
    entropy = -torch.special.xlogy(p, p).sum(1)[labels != -100].mean()
    torch.testing.assert_close(dense.loss + entropy, sparse)
    torch.testing.assert_close(
        torch.autograd.grad(dense.loss, (x, W)), torch.autograd.grad(sparse, (x, W))
    )


@pytest.mark.parametrize("divergence", EVERY)
def test_teacher_equal_to_student_is_the_minimum(divergence):
    (x, W, _), _, _, _ = problem()
    teacher = TeacherHead(x.detach(), W.detach())
    parts = linear_dense_kd(x, W, teacher, divergence=divergence)
    parts.loss.backward()
    assert abs(parts.loss.item()) < 1e-12
    assert x.grad.abs().max() < 1e-12


@pytest.mark.parametrize("divergence", EVERY)
def test_nan_in_nan_out_except_in_ignored_rows(divergence):
    (x, W, _), teacher, labels, _ = problem()
    for row, is_nan in ((1, False), (2, True)):
        hidden = teacher[0].clone()
        hidden[row] = torch.nan
        loss = linear_dense_kd(
            x, W, TeacherHead(hidden, teacher[1]), divergence=divergence, labels=labels
        ).loss
        assert bool(loss.isnan()) == is_nan
        assert bool(torch.autograd.grad(loss, W)[0].isnan().any()) == is_nan


@pytest.mark.parametrize("divergence", EVERY)
def test_huge_logits(divergence):
    """Teacher and student to +-1e4: the float32 result is the float64 one."""
    generator = torch.Generator().manual_seed(0)
    x, hidden = (torch.rand(4, 1, generator=generator) + 0.5 for _ in range(2))
    W, head = (torch.rand(V, 1, generator=generator) * 1.3e4 - 6.5e3 for _ in range(2))
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = (t.to(dtype).requires_grad_() for t in (x, W))
        teacher = TeacherHead(hidden.to(dtype), head.to(dtype))
        loss = linear_dense_kd(a, b, teacher, divergence=divergence).loss
        results.append([t.double() for t in (loss.detach(), *torch.autograd.grad(loss, (a, b)))])
    assert results[0][0].isfinite()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", EVERY)
def test_chunks_do_not_change_the_result(divergence):
    (x, W, bias), teacher, labels, weights = problem()

    def result(chunk_rows):
        parts = linear_dense_kd(
            x,
            W,
            TeacherHead(*teacher),
            divergence=divergence,
            labels=labels,
            alpha=0.3,
            linear_bias=bias,
            position_weights=weights,
            chunk_rows=chunk_rows,
        )
        return [*parts, *torch.autograd.grad(parts.loss, (x, W, bias))]

    torch.testing.assert_close(result(3), result(N))


def test_bad_arguments():
    (x, W, _), (hidden, weight, _), _, _ = problem()
    teacher = TeacherHead(hidden, weight)
    with pytest.raises(InvalidArgumentError, match="divergence"):
        linear_dense_kd(x, W, teacher, divergence="backward_kl")
    with pytest.raises(InvalidArgumentError, match="beta"):
        linear_dense_kd(x, W, teacher, divergence="jensen_shannon", beta=1.0)
    with pytest.raises(InvalidArgumentError, match="support impl='triton'"):
        linear_dense_kd(x, W, teacher, impl="triton")
    with pytest.raises(InvalidArgumentError, match="missing_mass"):
        linear_dense_kd(x, W, teacher, missing_mass="ghost")
    with pytest.raises(InvalidArgumentError, match="rows"):
        linear_dense_kd(x, W, TeacherHead(hidden[:3], weight))
    with pytest.raises(InvalidArgumentError, match="tokenizer"):
        linear_dense_kd(x, W, TeacherHead(hidden, torch.randn(V + 1, DT).double()))
