"""Test the chunked loss against the reference: every option, value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from problems import RULES, TARGETS, D, N, errors_in_low_precision, problem
from torch import Tensor

from sparselogits.losses import (
    Criterion,
    LossParts,
    SparseKDLoss,
    linear_sparse_cross_entropy,
    sparse_cross_entropy,
)

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def run(p: dict[str, Tensor], **options: object) -> tuple[LossParts, list[Tensor]]:
    arguments = {**p, **options}
    parts = linear_sparse_cross_entropy(**arguments, return_parts=True)
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    return parts, list(torch.autograd.grad(parts.loss * 0.7, leaves))


def assert_same(found, expected, tolerance):
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_chunked_matches_reference(rule, alpha, temperature, softcap, dtype, tolerance):
    p = problem(dtype)
    options = {
        "missing_mass": rule,
        "alpha": alpha,
        "temperature": temperature,
        "logit_softcap": softcap,
        "logit_scale": 1.7,
    }
    expected = run(p, **options, impl="reference")
    assert_same(run(p, **options, impl="chunked", chunk_rows=4), expected, tolerance)


@pytest.mark.parametrize("absent", ["labels", "linear_bias", "position_weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_optional_tensor_may_be_absent(absent, reduction):
    p = {**problem(), absent: None}
    expected = run(p, reduction=reduction, impl="reference")
    assert_same(run(p, reduction=reduction, chunk_rows=5), expected, 1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_loss_of_logits_matches_loss_of_head(rule):
    p = problem()
    x, W, bias = p["input"], p["linear_weight"], p["linear_bias"]
    rest = {k: v for k, v in p.items() if k not in ("input", "linear_weight", "linear_bias")}
    options = {"missing_mass": rule, "alpha": 0.2, "temperature": 2.0, "logit_softcap": 3.0}
    logits = F.linear(x, W, bias)
    parts = sparse_cross_entropy(logits, **rest, **options, chunk_rows=4, return_parts=True)
    grads = list(torch.autograd.grad(parts.loss * 0.7, (x, W, bias)))
    assert_same((parts, grads), run(p, **options), 1e-10)


def test_matches_torch_cross_entropy_for_one_hot_targets():
    p = problem()
    labels = p["labels"]
    one_hot = torch.where(labels == -100, 0, labels)[:, None]
    expected = F.cross_entropy(F.linear(p["input"], p["linear_weight"]), labels, ignore_index=-100)
    for alpha in (0.0, 0.4, 1.0):
        found = linear_sparse_cross_entropy(
            p["input"], p["linear_weight"], one_hot, torch.ones(N, 1), labels=labels, alpha=alpha
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_leading_dimensions_are_rows():
    p = {k: v[:12] if v.shape[0] == N else v for k, v in problem().items()}
    shaped = {
        k: v if k in ("linear_weight", "linear_bias") else v.reshape(3, 4, *v.shape[1:])
        for k, v in p.items()
    }
    torch.testing.assert_close(
        linear_sparse_cross_entropy(**shaped), linear_sparse_cross_entropy(**p)
    )


def test_student_vocabulary_may_be_padded():
    p = problem()
    weight = torch.cat([p["linear_weight"], torch.randn(5, D, dtype=torch.float64)])
    padded = {**p, "linear_weight": weight.detach().requires_grad_(), "linear_bias": None}
    assert_same(run(padded), run(padded, impl="reference"), 1e-10)


@pytest.mark.parametrize("wanted", ["input", "linear_weight", "linear_bias"])
def test_only_the_gradients_asked_for(wanted):
    p = problem()
    expected = torch.autograd.grad(linear_sparse_cross_entropy(**p), p[wanted])[0]
    alone = {k: v if k == wanted else v.detach() for k, v in p.items()}
    loss = linear_sparse_cross_entropy(**alone, chunk_rows=3)
    loss.backward()
    torch.testing.assert_close(alone[wanted].grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_low_precision_error_is_at_most_twice_that_of_torch(dtype, targets, alpha):
    def loss_of(*tensors, **options):
        return linear_sparse_cross_entropy(*tensors, **options, chunk_rows=32)

    for ours, torchs in errors_in_low_precision(dtype, targets, alpha, loss_of):
        assert ours <= 2 * torchs


def test_float16_gradients_survive_a_large_mean():
    """Divided by many rows before backward's loss scale, float16 gradients would underflow."""
    torch.manual_seed(0)
    rows, vocabulary, loss_scale = 4096, 512, 1024.0
    x = torch.randn(rows, 8).half().requires_grad_()
    W = torch.randn(vocabulary, 8).div(8).half().requires_grad_()
    labels = torch.randint(vocabulary, (rows,))
    loss = linear_sparse_cross_entropy(x, W, labels[:, None], torch.ones(rows, 1), chunk_rows=1024)
    (loss * loss_scale).backward()
    exact = torch.autograd.grad(
        F.cross_entropy(x.double() @ W.double().t(), labels) * loss_scale, (x, W)
    )
    for tensor, truth in zip((x, W), exact, strict=True):
        assert (tensor.grad.double() - truth).norm() < 1e-3 * truth.norm()


def test_options_as_keywords_as_one_value_and_bound_in_a_module_are_the_same():
    p = problem()
    options = {"missing_mass": "ghost", "temperature": 1.5, "reduction": "sum"}
    expected = linear_sparse_cross_entropy(**p, alpha=0.3, **options, return_parts=True)
    whole, part = Criterion(alpha=0.3, **options), Criterion(alpha=0.9, **options)
    for found in (
        linear_sparse_cross_entropy(**p, criterion=whole, return_parts=True),
        linear_sparse_cross_entropy(**p, criterion=part, alpha=0.3, return_parts=True),
        SparseKDLoss(alpha=0.3, **options)(**p),
        SparseKDLoss(whole)(**p),
    ):
        assert_same((found, []), (expected, []), 0.0)


def test_parts_mix_to_the_loss_and_carry_no_gradient():
    parts = linear_sparse_cross_entropy(**problem(), alpha=0.3, return_parts=True)
    torch.testing.assert_close(parts.loss, 0.7 * parts.kd + 0.3 * parts.ce)
    assert not parts.kd.requires_grad
    assert not parts.ce.requires_grad


def test_k_may_be_zero():
    p = problem()
    p["target_ids"] = torch.zeros(N, 0, dtype=torch.int64)
    p["target_weights"] = torch.zeros(N, 0)
    for rule in RULES:
        options = {"missing_mass": rule, "alpha": 0.5}
        assert_same(run(p, **options), run(p, **options, impl="reference"), 1e-10)
