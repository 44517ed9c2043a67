"""Test each missing-mass rule against its definition and the closed form of its gradient."""

import pytest
import torch

from sparselogits.errors import InvalidArgumentError
from sparselogits.losses import require_rule_for, sparse_cross_entropy

IDS = torch.tensor([[1, 4, 0], [0, 2, 0], [5, 3, 1]])
WEIGHTS = torch.tensor([[0.5, 0.2, 0.0], [0.1, 0.3, 0.0], [0.25, 0.25, 0.125]])
LABELS = torch.tensor([4, 3, 0])
V = 7


def gradient_of(rule, logits):
    logits = logits.clone().requires_grad_()
    loss = sparse_cross_entropy(
        logits, IDS, WEIGHTS, labels=LABELS, missing_mass=rule, reduction="sum"
    )
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.fixture
def parts():
    logits = 2 * torch.randn(3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.zeros(3, V, dtype=torch.float64).scatter_add_(1, IDS, WEIGHTS.double())
    return logits, logits.softmax(1), t, t.sum(1, keepdim=True), 1 - t.sum(1, keepdim=True)


TARGETS = {
    "drop": lambda t, mass, missing: t,
    "renormalise": lambda t, mass, missing: t / mass,
    "smooth": lambda t, mass, missing: t + missing / V,
    "ground_truth": lambda t, mass, missing: t.scatter_add(1, LABELS[:, None], missing),
}


@pytest.mark.parametrize("rule", TARGETS)
def test_a_rule_is_the_cross_entropy_to_its_target(rule, parts):
    logits, s, t, mass, missing = parts
    target = TARGETS[rule](t, mass, missing)
    loss, gradient = gradient_of(rule, logits)
    torch.testing.assert_close(gradient, target.sum(1, keepdim=True) * s - target)
    torch.testing.assert_close(loss, -(target * s.log()).sum())


def test_ghost(parts):
    """s - t on the stored ids, s (1 - m / M) elsewhere."""
    logits, s, t, _, missing = parts
    stored = t > 0
    student_missing = (s * ~stored).sum(1, keepdim=True)
    loss, gradient = gradient_of("ghost", logits)
    expected = torch.where(stored, s - t, s * (1 - missing / student_missing))
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss, -(t * s.log()).sum() - (missing * student_missing.log()).sum())


def test_ghost_survives_a_student_without_missing_mass():
    """M underflows: one minus the stored probabilities would be 0 and its logarithm -inf."""
    logits = torch.tensor([[200.0, 200.0, 0.0, 0.0]], requires_grad=True)
    loss = sparse_cross_entropy(
        logits, torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.4]]), missing_mass="ghost"
    )
    # -0.8 log(1/2) - 0.2 log(exp(-200) (1 + 1) / 2)
    torch.testing.assert_close(loss.item(), 0.8 * 0.6931471806 + 0.2 * 200, rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.1, 0.1, -0.1, -0.1]]))


def test_ghost_without_other_ids_is_drop():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    ids, weights = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[0.2, 0.3, 0.1]] * 2)
    ghost = sparse_cross_entropy(logits, ids, weights, missing_mass="ghost")
    drop = sparse_cross_entropy(logits, ids, weights)
    torch.testing.assert_close(ghost, drop)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ghost, drop)))


@pytest.mark.parametrize("rule", ["renormalise", "smooth", "ghost", "ground_truth"])
def test_rules_are_refused_for_unbiased_targets(rule):
    with pytest.raises(InvalidArgumentError, match="unbiased"):
        require_rule_for(rule, unbiased=True)
    require_rule_for(rule, unbiased=False)
    require_rule_for("drop", unbiased=True)
