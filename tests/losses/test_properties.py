"""Test mathematical properties of the loss on random problems."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import RULES

from sparselogits.losses import sparse_cross_entropy

V = 9
seeds = st.integers(0, 2**31)
examples = settings(max_examples=40)


def draw(seed, rows=5, entries=4, mass=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, V, generator=generator, dtype=torch.float64)
    ids = torch.stack([torch.randperm(V, generator=generator)[:entries] for _ in range(rows)])
    weights = torch.rand(rows, entries, generator=generator)
    weights *= mass / weights.sum(1, keepdim=True)
    return logits.requires_grad_(), ids, weights


def value_and_gradient(logits, ids, weights, **options):
    loss = sparse_cross_entropy(logits, ids, weights, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@examples
@given(seeds, st.sampled_from(RULES), st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_gradient_of_a_row_sums_to_zero(seed, rule, mass, alpha):
    """Adding a constant to a row's logits changes nothing."""
    logits, ids, weights = draw(seed, mass=mass)
    options = {"missing_mass": rule, "alpha": alpha, "labels": ids[:, 0]}
    loss, gradient = value_and_gradient(logits, ids, weights, **options)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(5).double(), rtol=0, atol=1e-10)
    shift = torch.arange(5.0)[:, None] * 100
    shifted = sparse_cross_entropy(logits + shift, ids, weights, **options).detach()
    torch.testing.assert_close(loss, shifted, rtol=1e-9, atol=1e-9)


@examples
@given(seeds, st.sampled_from(RULES), st.integers(0, 3))
def test_order_of_entries_and_padding_do_not_matter(seed, rule, padding):
    logits, ids, weights = draw(seed, mass=0.7)
    options = {"missing_mass": rule, "labels": ids[:, 1]}
    expected = value_and_gradient(logits, ids, weights, **options)
    order = torch.randperm(4 + padding, generator=torch.Generator().manual_seed(seed))
    nothing = torch.zeros(5, padding)
    ids = torch.cat([ids, nothing.long()], 1)[:, order]
    weights = torch.cat([weights, nothing], 1)[:, order]
    assert_equal(value_and_gradient(logits, ids, weights, **options), expected)


@examples
@given(seeds, st.floats(-2.0, 3.0), st.floats(-2.0, 3.0))
def test_linear_in_the_target(seed, a, b):
    """What makes an unbiased target give an unbiased loss and gradient."""
    logits, ids, weights = draw(seed)
    _, other_ids, other_weights = draw(seed + 1)
    first = value_and_gradient(logits, ids, weights)
    second = value_and_gradient(logits, other_ids, other_weights)
    both = value_and_gradient(
        logits,
        torch.cat([ids, other_ids], 1),  # ids may repeat within a row under "drop"
        torch.cat([a * weights.double(), b * other_weights.double()], 1),
    )
    for x, y, mixed in zip(first, second, both, strict=True):
        torch.testing.assert_close(mixed, a * x + b * y, rtol=1e-9, atol=1e-9)


@examples
@given(seeds, st.permutations(range(5)), st.integers(1, 6))
def test_rows_are_independent_of_order_and_chunk(seed, order, chunk_rows):
    logits, ids, weights = draw(seed)
    order = torch.tensor(order)
    expected_loss, expected = value_and_gradient(logits, ids, weights)
    shuffled = logits.detach()[order].requires_grad_()
    loss, gradient = value_and_gradient(shuffled, ids[order], weights[order], chunk_rows=chunk_rows)
    assert_equal(loss, expected_loss)
    assert_equal(gradient, expected[order])


@examples
@given(seeds, st.floats(0.2, 5.0), st.floats(0.2, 5.0))
def test_temperature_divides_what_the_scale_multiplies(seed, scale, temperature):
    logits, ids, weights = draw(seed)
    a = value_and_gradient(logits, ids, weights, logit_scale=scale, temperature=temperature)
    b = value_and_gradient(logits, ids, weights, logit_scale=scale / temperature)
    assert_equal(a, b)


@examples
@given(seeds, st.integers(2, 5))
def test_integer_position_weights_repeat_rows(seed, repeats):
    logits, ids, weights = draw(seed)
    weight = torch.tensor([repeats, 1, 0, 1, 1])
    weighted = sparse_cross_entropy(logits, ids, weights, position_weights=weight.float())
    rows = torch.arange(5).repeat_interleave(weight)
    repeated = sparse_cross_entropy(logits[rows], ids[rows], weights[rows])
    assert_equal(weighted.detach(), repeated.detach())


@examples
@given(seeds)
def test_least_where_the_student_is_the_target(seed):
    """At s = t the gradient vanishes and the loss is the target's entropy."""
    logits, _, _ = draw(seed)
    p = logits.detach().softmax(1)
    every = torch.arange(V).expand(5, V)
    loss, gradient = value_and_gradient(logits, every, p)
    assert_equal(loss, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
