"""Test extreme and degenerate input: finite where the formula is finite, NaN for NaN."""

import pytest
import torch
from problems import RULES, D, N, V, problem

from sparselogits.errors import InvalidArgumentError, InvalidTargetsError
from sparselogits.losses import linear_sparse_cross_entropy, sparse_cross_entropy


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits(rule, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(8, 32, generator=generator) * 2e4 - 1e4).to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(32, generator=generator)[:3] for _ in range(8)])
    options = {"labels": ids[:, 2], "alpha": 0.25, "missing_mass": rule}
    targets = (ids, torch.full((8, 3), 0.25))
    loss = sparse_cross_entropy(logits, *targets, **options)
    exact = logits.detach().double().requires_grad_()
    expected = sparse_cross_entropy(exact, *targets, **options, impl="reference")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_mass_beyond_one_and_of_zero():
    p = problem(torch.float32)
    p["target_weights"][:3] = 50.0
    p["target_weights"][3:] = 0.0
    for rule in RULES:
        loss = linear_sparse_cross_entropy(**p, missing_mass=rule)
        torch.testing.assert_close(
            loss, linear_sparse_cross_entropy(**p, missing_mass=rule, impl="reference")
        )
        loss.backward()
        assert all(p[k].grad.isfinite().all() for k in ("input", "linear_weight", "linear_bias"))


@pytest.mark.parametrize("rule", RULES)
def test_vocabulary_of_one_token(rule):
    x, W = torch.randn(3, D, requires_grad=True), torch.randn(1, D, requires_grad=True)
    zero = torch.zeros(3, 1, dtype=torch.int64)
    loss = linear_sparse_cross_entropy(
        x, W, zero, torch.full((3, 1), 0.4), labels=zero[:, 0], missing_mass=rule
    )
    loss.backward()
    for value in (loss, x.grad, W.grad):
        torch.testing.assert_close(value, torch.zeros_like(value))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("empty", ["ignored", "no rows", "weightless"])
def test_no_row_that_counts(impl, empty):
    p = problem()
    if empty == "ignored":
        p["labels"] = torch.full((N,), -100)
    elif empty == "weightless":
        p["position_weights"] = torch.zeros(N)
    else:
        p = {
            k: v if k in ("linear_weight", "linear_bias") else v[:0].detach() for k, v in p.items()
        }
        p["input"].requires_grad_()
    parts = linear_sparse_cross_entropy(**p, alpha=0.5, impl=impl, return_parts=True)
    assert [part.item() for part in parts] == [0, 0, 0]
    parts.loss.backward()
    for name in ("input", "linear_weight", "linear_bias"):
        assert p[name].grad.count_nonzero() == 0


@pytest.mark.parametrize("where", ["input", "linear_weight", "linear_bias", "target_weights"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_nan_in_nan_out(where, rule, impl):
    p = problem()
    with torch.no_grad():
        p[where].view(-1)[-1] = torch.nan
    assert linear_sparse_cross_entropy(**p, missing_mass=rule, impl=impl).isnan()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nan_reaches_rows_without_entries(temperature):
    logits = torch.tensor([[0.0, torch.nan, 1.0]])
    none = torch.zeros(1, 0)
    assert sparse_cross_entropy(logits, none.long(), none, temperature=temperature).isnan()


def test_nan_in_gradients_too():
    p = problem()
    with torch.no_grad():
        p["input"][3, 0] = torch.nan
    linear_sparse_cross_entropy(**p).backward()
    assert p["input"].grad[3].isnan().all()
    assert not p["input"].grad[4].isnan().any()
    assert p["linear_weight"].grad.isnan().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_targets_that_do_not_count_may_hold_nan(rule, temperature, impl):
    """With alpha=1 the loss is the labels' cross-entropy, and so are its gradients."""
    p, names = problem(), ("input", "linear_weight", "linear_bias")
    options = {"missing_mass": rule, "temperature": temperature, "impl": impl, "alpha": 1.0}
    clean = linear_sparse_cross_entropy(**p, **options)
    expected = torch.autograd.grad(clean, [p[name] for name in names])
    with torch.no_grad():
        stored = p["target_weights"] != 0
        p["target_weights"] = p["target_weights"].masked_fill(stored, torch.nan)
    parts = linear_sparse_cross_entropy(**p, **options, return_parts=True)
    assert parts.kd.isnan()
    torch.testing.assert_close(parts.loss, clean)
    torch.testing.assert_close(torch.autograd.grad(parts.loss, [p[n] for n in names]), expected)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_rows_that_do_not_count_may_hold_nan(impl):
    p = problem()
    clean = linear_sparse_cross_entropy(**p, impl=impl)
    expected = torch.autograd.grad(clean, (p["linear_weight"], p["linear_bias"]))
    with torch.no_grad():
        p["input"][0] = torch.nan  # its label is ignored
        p["target_weights"][7] = torch.nan
    loss = linear_sparse_cross_entropy(**p, impl=impl)
    torch.testing.assert_close(loss, clean)
    found = torch.autograd.grad(loss, (p["linear_weight"], p["linear_bias"], p["input"]))
    torch.testing.assert_close(found[:2], expected)
    assert found[2][0].count_nonzero() == 0


@pytest.mark.parametrize("rule", ["drop", "renormalise", "ghost", "ground_truth"])
def test_ids_masked_by_minus_infinity(rule):
    """Padding points at id 0; that id may be one the student has masked out."""
    p = problem()
    p["target_ids"][4:6] = torch.tensor([5, 3, 0, 0])
    p["target_ids"], p["target_weights"] = p["target_ids"][4:6], p["target_weights"][4:6]
    labels = torch.tensor([5, 3])
    logits = torch.randn(2, 11, dtype=torch.float64)
    logits[:, [0, 7]] = -torch.inf
    targets = (p["target_ids"], p["target_weights"])
    results = []
    for impl in ("chunked", "reference"):
        z = logits.clone().requires_grad_()
        loss = sparse_cross_entropy(z, *targets, labels=labels, missing_mass=rule, impl=impl)
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    assert results[0][0].isfinite()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("rule", RULES)
def test_with_labels_alone_an_infinite_divergence_is_only_logged(rule, impl):
    """As ce is with alpha = 0."""
    p = problem()
    logits = torch.randn(N, V, dtype=torch.float64)
    logits[:, 0] = -torch.inf
    labels = p["labels"].clamp(min=1)
    z = logits.clone().requires_grad_()
    options = {"labels": labels, "alpha": 1.0, "missing_mass": rule, "impl": impl}
    targets = (torch.zeros(N, 1).long(), torch.full((N, 1), 0.5))
    parts = sparse_cross_entropy(z, *targets, **options, return_parts=True)
    assert parts.kd == torch.inf
    expected = torch.nn.functional.cross_entropy(logits.requires_grad_(), labels)
    torch.testing.assert_close(parts.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(parts.loss, z), torch.autograd.grad(expected, logits)
    )


def test_ids_out_of_range_are_caught_on_cpu():
    p = problem()
    p["target_ids"][0, 0] = 2**40
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        linear_sparse_cross_entropy(**p)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"alpha": 1.5}, InvalidArgumentError, "alpha"),
        ({"alpha": 0.5, "labels": None}, InvalidArgumentError, "pass labels"),
        ({"missing_mass": "ground_truth", "labels": None}, InvalidArgumentError, "pass labels"),
        ({"missing_mass": "gost"}, InvalidArgumentError, "ghost"),
        ({"temperature": 0.0}, InvalidArgumentError, "temperature"),
        ({"logit_softcap": -1.0}, InvalidArgumentError, "logit_softcap"),
        ({"logit_scale": float("nan")}, InvalidArgumentError, "logit_scale"),
        ({"reduction": "none"}, InvalidArgumentError, "reduction"),
        ({"impl": "cuda"}, InvalidArgumentError, "chunked"),
        ({"chunk_rows": 0}, InvalidArgumentError, "chunk_rows"),
        ({"alhpa": 0.5}, TypeError, "alhpa"),
        ({"labels": torch.zeros(3).long()}, InvalidArgumentError, "labels must have shape"),
        ({"labels": torch.zeros(N)}, InvalidArgumentError, "int64 or int32, found torch.float"),
        ({"labels": torch.zeros(N).bool()}, InvalidArgumentError, "labels must be int64"),
        ({"position_weights": torch.ones(3)}, InvalidArgumentError, "position_weights"),
        ({"linear_weight": torch.ones(7, 2)}, InvalidArgumentError, "of the same D"),
        ({"linear_bias": torch.ones(2)}, InvalidArgumentError, "linear_bias"),
        ({"input": torch.ones(N, D)}, InvalidArgumentError, "one dtype"),
        ({"target_ids": torch.zeros(N, 3).long()}, InvalidTargetsError, "both have shape"),
        ({"target_ids": torch.zeros(N, 4).int()}, InvalidTargetsError, "int64"),
    ],
)
def test_bad_arguments(change, error, says):
    with pytest.raises(error, match=says):
        linear_sparse_cross_entropy(**{**problem(), **change})
