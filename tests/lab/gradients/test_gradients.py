"""Test gradients against autograd, and their metrics against theory.

Run with `pytest tests/lab/gradients/test_gradients.py`. The teacher is float32, students are
float64; sampled weights are always float32, which explains tolerances of 1e-5.
"""

import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparselogits.corruption import Corruption, TokenKinds
from sparselogits.data import TextDataset
from sparselogits.errors import InvalidArgumentError
from sparselogits.evaluate import t_interval
from sparselogits.evaluate.intervals import t_quantile
from sparselogits.lab.gradients import (
    GradientFidelity,
    Target,
    measure_gradients,
    standard_targets,
)
from sparselogits.lab.gradients.moments import Moments
from sparselogits.losses import MissingMass, sparse_cross_entropy
from sparselogits.objectives import Masked
from sparselogits.samplers import (
    Adaptive,
    Multinomial,
    StudentSignal,
    Systematic,
    Threshold,
    TopK,
    Uniform,
    thinning_starts,
    window_uniforms,
)
from sparselogits.targets import thinning_choices
from sparselogits.teacher import TransformersTeacher, load_teacher
from tests.conftest import PADDED_VOCABULARY, tiny_llama
from tests.masked_models import MODELS

LENGTH = 24
RULES = get_args(MissingMass)


@pytest.fixture(scope="module")
def windows(request, packed_text) -> TextDataset:
    corpus = packed_text(LENGTH, reset_attention=getattr(request, "param", False))
    return TextDataset(corpus, holdout=False, limit=6)


@pytest.fixture(scope="module")
def teacher(teacher_folder, tokenizer) -> TransformersTeacher:
    return load_teacher(str(teacher_folder), tokenizer=tokenizer, slice_positions=10)


@pytest.fixture(scope="module")
def student(request) -> nn.Module:
    return tiny_llama(seed=4, tie_word_embeddings=getattr(request, "param", True)).double()


# -- the whole measurement, against plain backward passes ------------------------------------------


def plain_gradients(
    student: nn.Module,
    item: dict[str, Tensor],
    weights: Tensor,
    ids: Tensor,
    rule: MissingMass = "drop",
    alpha: float = 0.0,
) -> dict[str, Tensor]:
    """Gradients of the summed sparse loss on one window, in the five spaces, by autograd."""
    student.zero_grad()
    inputs = {k: v[None] for k, v in item.items() if k in ("input_ids", "position_ids")}
    head_input: list[Tensor] = []
    head = student.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: head_input.append(given[0]))
    logits = student(**inputs).logits
    hook.remove()
    logits.retain_grad()
    head_input[0].retain_grad()
    labels = item["shift_labels"]
    loss = sparse_cross_entropy(
        logits[0], ids, weights, labels=labels, missing_mass=rule, alpha=alpha, reduction="sum"
    )
    (loss * item.get("loss_weight", 1.0)).backward()
    of_logits, of_hidden = logits.grad[0], head_input[0].grad[0]
    return {
        "logits": of_logits,
        "hidden": of_hidden,
        "summed logits": of_logits.sum(0),
        "summed hidden": of_hidden.sum(0),
        "parameters": torch.cat([p.grad.flatten() for p in student.parameters()]),
    }


def targets_on(
    target: Target, teacher: TransformersTeacher, item: dict[str, Tensor], window: int, seed: int
) -> tuple[Tensor, Tensor]:
    """A target of a whole window: ids and weights [L, K]."""
    labels = item["shift_labels"]
    if target.sampler is None:
        return labels.clamp_min(0)[:, None], torch.ones(len(labels), 1)
    logits = whole_logits(teacher, item)
    uniforms = window_uniforms(seed, window, len(labels), target.sampler.uniforms_per_position)
    drawn = target.sampler.at(item["input_ids"], slice(0, len(labels)))(logits, uniforms)
    if target.rounds is not None:
        choices = thinning_choices(drawn.rounds or 0, target.rounds)
        drawn = drawn.thin(target.rounds, thinning_starts(seed, 0, window, len(labels), choices))
    return drawn.padded()


def whole_logits(teacher: TransformersTeacher, item: dict[str, Tensor]) -> Tensor:
    starts = None
    if "position_ids" in item:
        starts = [(item["position_ids"] == 0).nonzero().flatten().numpy()]
    return torch.cat([piece.logits for piece in teacher.logits(item["input_ids"][None], starts)])


def plain_windows(
    student: nn.Module,
    windows: TextDataset,
    teacher: TransformersTeacher,
    target: Target,
    draws: int,
) -> list[list[dict[str, Tensor]]]:
    """For every window the gradients of full distillation, then those of each draw."""
    found = []
    for index in range(len(windows)):
        item = windows[index]
        everything = whole_logits(teacher, item).double().softmax(1)
        ids = torch.arange(everything.shape[1]).expand_as(everything)
        own = [plain_gradients(student, item, everything, ids)]
        for draw in range(draws):
            ids, weights = targets_on(target, teacher, item, index, seed=7 + draw)
            how = target.missing_mass, target.alpha
            own.append(plain_gradients(student, item, weights, ids, *how))
        found.append(own)
    return found


def batches(found: list[list[dict[str, Tensor]]], space: str, size: int) -> Iterator[Moments]:
    """Moments of every `size` windows, side by side or summed as the space wants it."""
    for first in range(0, len(found), size):
        many = zip(*found[first : first + size], strict=True)
        own = [[window[space] for window in draw] for draw in many]
        side_by_side = space in ("logits", "hidden")
        full, *draws = (torch.cat(v) if side_by_side else torch.stack(v).sum(0) for v in own)
        yield Moments.of(full, draws)


@pytest.mark.parametrize(
    "target",
    [
        Target("a", TopK(5), "ghost"),
        Target("a", TopK(5), "renormalise"),
        Target("a", TopK(5), "ground_truth"),
        Target("a", Systematic(9)),
        Target("a", Threshold(0.2)),
        Target("a", None),
        Target("a", Systematic(9), alpha=0.3),
        Target("a", TopK(5), "ground_truth", alpha=0.3),
        Target("a", TopK(5), "smooth", alpha=0.3),
        Target("a", Systematic(9), rounds=3),
        Target("a", Multinomial(9), alpha=0.5, rounds=4),
    ],
    ids=lambda t: f"{t.sampler} {t.missing_mass} {t.alpha} {t.rounds}",
)
@pytest.mark.parametrize(
    ("student", "windows"),
    [(True, False), (False, True)],
    indirect=True,
    ids=["tied", "untied, attention reset"],
)
def test_figures_are_those_of_plain_backward_passes(student, windows, teacher, target):
    rows = measure_gradients(
        {"s": student},
        windows,
        teacher,
        [target],
        batch_tokens=[LENGTH, 3 * LENGTH],
        draws=2,
        seed=7,
    )
    assert_plain(rows, student, windows, teacher, target)


@pytest.mark.parametrize("rate", [0.4, None])
@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "ELECTRA's generator"])
def test_masked_students_are_compared_at_the_chosen_positions(name, rate, packed_text):
    """With a random rate per window, whose inverse is the weight of the window's gradient."""
    corpus = packed_text(LENGTH)
    kinds = TokenKinds(np.arange(520) < 4, None, np.zeros(520, np.int8), np.zeros(520, np.int8))
    corruption = Corruption(Masked(3, rate=rate), kinds)
    windows = TextDataset(corpus, holdout=False, limit=6, corruption=corruption)
    torch.manual_seed(1)
    taught = MODELS["BERT"](vocab_size=520)
    teacher = TransformersTeacher(taught, identity={}, slice_positions=10)
    torch.manual_seed(4)
    student = MODELS[name](vocab_size=520, tie_word_embeddings=name != "ModernBERT").eval().double()
    torch.nn.init.normal_(student.get_output_embeddings().bias)
    target = Target("a", Systematic(9), rounds=3, alpha=0.2)
    sizes = [LENGTH, 3 * LENGTH]
    rows = measure_gradients(
        {"s": student}, windows, teacher, [target], batch_tokens=sizes, draws=2, seed=7
    )
    assert_plain(rows, student, windows, teacher, target)
    with pytest.raises(InvalidArgumentError, match=r"student s \(LlamaForCausalLM\) is a causal"):
        measure_gradients({"s": tiny_llama()}, windows, teacher, [target], batch_tokens=sizes)


def assert_plain(
    rows: list[GradientFidelity],
    student: nn.Module,
    windows: TextDataset,
    teacher: TransformersTeacher,
    target: Target,
) -> None:
    """Compare the metrics of one target with those of plain backward passes."""
    assert len(rows) == 5 * 2
    found = plain_windows(student, windows, teacher, target, rows[0].draws)
    for row in rows:
        plain = list(batches(found, row.space, row.batch_tokens // LENGTH))
        assert row.angle.units == len(plain) == len(windows) * LENGTH // row.batch_tokens
        expected = {
            "angle": [float(m.angles().mean()) for m in plain],
            "norm_ratio": [float(m.norm_ratios().mean()) for m in plain],
            "squared_bias": [m.squared_bias() for m in plain],
            "variance": [m.variance() for m in plain],
        }
        for figure, values in expected.items():
            mean = sum(values) / len(values)
            assert getattr(row, figure).mean == pytest.approx(mean, rel=1e-5, abs=1e-6), (
                row,
                figure,
            )


def test_the_students_mode_and_gradients_are_left_alone(windows, teacher):
    student = tiny_llama(seed=4, attention_dropout=0.5).train()
    twice = [
        measure_gradients(
            {"s": student}, windows, teacher, [Target("a", TopK(3))], batch_tokens=[LENGTH]
        )
        for _ in range(2)
    ]
    assert twice[0] == twice[1]  # dropout is off
    assert student.training
    assert all(p.grad is None for p in student.parameters())


# -- what theory says of the figures ---------------------------------------------------------------


def test_the_whole_distribution_as_a_target_is_full_distillation(student, windows, teacher):
    targets = [Target("full", TopK(PADDED_VOCABULARY))]
    for row in measure_gradients({"s": student}, windows, teacher, targets, batch_tokens=[LENGTH]):
        assert row.angle.mean < 1e-3
        assert row.norm_ratio.mean == pytest.approx(1, abs=1e-5)
        assert abs(row.squared_bias.mean) < 1e-9
        assert row.entries == 512  # padding rows of the head are no tokens


UNBIASED = [Systematic(9), Multinomial(9), Multinomial(9, 0.8), Uniform(60), Threshold(0.1)]


@pytest.mark.parametrize("sampler", UNBIASED, ids=str)
def test_unbiased_targets_show_no_bias(sampler, student, windows, teacher):
    """t-tests over 6 windows of 32 draws: 5 spaces of 5 samplers, at 1e-4 / 25 each.

    The false-alarm rate of the whole is so 1e-4 were the estimates normal; seeds are fixed.
    """
    rows = measure_gradients(
        {"s": student}, windows, teacher, [Target("a", sampler)], batch_tokens=[LENGTH], draws=32
    )
    quantile = t_quantile(5, 1 - 0.5e-4 / 25)
    for row in rows:
        bias = row.squared_bias
        assert bias.high is not None
        error = (bias.high - bias.mean) / t_quantile(5, 0.975)
        assert abs(bias.mean) < quantile * error
        assert row.variance.mean > 10 * abs(bias.mean)


def test_the_bias_of_top_k_is_its_closed_form(student, windows, teacher):
    """Of a position: |(m - 1) s + tail|^2, with m the stored mass and tail the p not stored."""
    targets = [Target("a", TopK(6))]
    rows = measure_gradients({"s": student}, windows, teacher, targets, batch_tokens=[6 * LENGTH])
    error = full = 0.0
    for index in range(6):
        item = windows[index]
        counted = item["shift_labels"] != -100
        p = whole_logits(teacher, item).double().softmax(1)[counted]
        inputs = {k: v[None] for k, v in item.items() if k != "shift_labels"}
        s = student(**inputs).logits[0][counted].softmax(1).detach()
        tail = p.scatter(1, p.topk(6, 1).indices, 0.0)
        error += float((tail - tail.sum(1, keepdim=True) * s).square().sum())
        full += float((s - p).square().sum())
    row = next(row for row in rows if row.space == "logits")
    assert row.squared_bias.mean == pytest.approx(error / full, rel=1e-5)
    assert row.variance.mean == 0
    assert row.draws == 1


def test_the_variance_of_independent_rounds_is_its_closed_form(student, windows, teacher):
    """docs/theory.md, section 3, summed over positions; 138 positions of 48 draws leave 1 %."""
    rounds = 9
    rows = measure_gradients(
        {"s": student},
        windows,
        teacher,
        [Target("a", Multinomial(rounds))],
        batch_tokens=[6 * LENGTH],
        draws=48,
    )
    U = student.lm_head.weight.detach()
    logit_noise = hidden_noise = 0.0
    logit_full, hidden_full, logit_sum, hidden_sum = 0.0, 0.0, torch.zeros(()), torch.zeros(())
    for index in range(6):
        item = windows[index]
        counted = item["shift_labels"] != -100
        p = whole_logits(teacher, item).double().softmax(1)[counted]
        inputs = {k: v[None] for k, v in item.items() if k != "shift_labels"}
        g = student(**inputs).logits[0][counted].softmax(1).detach() - p
        logit_noise += float((p * (1 - p)).sum()) / rounds
        mean = p @ U
        hidden_noise += float((p @ U.square().sum(1) - mean.square().sum(1)).sum()) / rounds
        logit_full += float(g.square().sum())
        hidden_full += float((g @ U).square().sum())
        logit_sum, hidden_sum = logit_sum + g.sum(0), hidden_sum + (g @ U).sum(0)
    expected = {
        "logits": logit_noise / logit_full,
        "hidden": hidden_noise / hidden_full,
        "summed logits": logit_noise / float(logit_sum.square().sum()),
        "summed hidden": hidden_noise / float(hidden_sum.square().sum()),
    }
    found = {row.space: row.variance.mean for row in rows}
    for space, value in expected.items():
        assert found[space] == pytest.approx(value, rel=0.1 if "summed" in space else 0.03), space


def test_a_sampler_that_follows_a_student_is_measured_like_any_other(windows, teacher):
    student = tiny_llama(seed=4)
    adaptive = Adaptive(StudentSignal.of(student, "distance"), 9, reference=0.5)
    pilot = [whole_logits(teacher, windows[0])]
    targets = standard_targets(pilot, budget=5, top_k=(5,), missing_mass=RULES, adaptive=adaptive)
    rows = measure_gradients(
        {"s": student}, windows, teacher, targets, batch_tokens=[2 * LENGTH], against="RS-KD"
    )
    assert [t.name for t in targets][5:] == [
        "RS-KD",
        "systematic",
        "threshold",
        "uniform",
        "adaptive",
        "label (CE)",
    ]
    entries = {row.target: row.entries for row in rows}
    assert entries["Top-5"] == 5
    assert entries["label (CE)"] == 1
    for name in ("RS-KD", "systematic", "threshold", "uniform"):
        assert entries[name] == pytest.approx(5, rel=0.25), name
    assert all(math.isfinite(row.angle.mean) for row in rows)
    relative = {(row.target, row.space): row.relative_angle for row in rows}
    assert relative["RS-KD", "parameters"].mean == 1
    assert relative["uniform", "hidden"].mean > 1


# -- moments and intervals -------------------------------------------------------------------------


def test_moments_tell_bias_from_noise():
    g, e = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 1.0, 0.0])
    constant = Moments.of(g, [g + e] * 3)
    assert constant.squared_bias() == pytest.approx(1 / 25)
    assert constant.variance() == pytest.approx(0, abs=1e-12)
    opposite = Moments.of(g, [g + e, g - e])
    assert opposite.variance() == pytest.approx(2 / 25)
    assert opposite.squared_bias() == pytest.approx(-1 / 25)  # |mean|^2 = 0 less its noise
    both = Moments.of(torch.cat([g, g]), [torch.cat([g + e, g - e]), torch.cat([g - e, g + e])])
    parts = Moments.of(g, [g + e, g - e]) + Moments.of(g, [g - e, g + e])
    _assert_same(parts, both, 1e-12)


def test_quantiles_are_the_tabulated_ones():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 31: 2.040, 120: 1.980}
    for degrees, value in table.items():
        assert t_quantile(degrees, 0.975) == pytest.approx(value, abs=6e-4)
    assert t_quantile(7, 0.9995) == pytest.approx(5.408, abs=1e-3)


def test_an_interval_needs_two_units():
    assert t_interval([2.0]).low is None
    found = t_interval([1.0, 3.0])
    assert (found.mean, found.units) == (2.0, 2)
    assert found.high == pytest.approx(2 + 12.706, abs=1e-3)
    with pytest.raises(InvalidArgumentError, match="at least one"):
        t_interval([])


def _assert_same(a: Moments, b: Moments, tolerance: float) -> None:
    assert a.full == pytest.approx(b.full, rel=tolerance)
    assert a.total == pytest.approx(b.total, rel=tolerance)
    torch.testing.assert_close(a.dots, b.dots, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.squares, b.squares, rtol=tolerance, atol=tolerance)


# -- mistakes --------------------------------------------------------------------------------------


def test_mistakes_say_what_to_do(windows, teacher):
    student, topk = tiny_llama(seed=4), [Target("a", TopK(3))]

    def measure(model: nn.Module = student, targets: Any = topk, **options: Any) -> None:
        options = {"batch_tokens": [LENGTH]} | options
        measure_gradients({"s": model}, windows, teacher, targets, **options)

    with pytest.raises(InvalidArgumentError, match="would make unbiased targets biased"):
        Target("a", Systematic(3), "renormalise")
    with pytest.raises(InvalidArgumentError, match="give the share"):
        Target("a", TopK(3), alpha=1.5)
    with pytest.raises(InvalidArgumentError, match="cannot be thinned"):
        Target("a", TopK(3), rounds=2)
    with pytest.raises(InvalidArgumentError, match="choose between 1 and 3"):
        Target("a", Systematic(3), rounds=4)
    with pytest.raises(InvalidArgumentError, match="multiples of the window"):
        measure(batch_tokens=[LENGTH + 1])
    with pytest.raises(InvalidArgumentError, match="more text"):
        measure(batch_tokens=[7 * LENGTH])
    with pytest.raises(InvalidArgumentError, match="2 or more"):
        measure(draws=1)
    with pytest.raises(InvalidArgumentError, match="distinct names"):
        measure(targets=topk * 2)
    with pytest.raises(InvalidArgumentError, match="unknown target"):
        measure(against="RS-KD")
    with pytest.raises(InvalidArgumentError, match="fewer than the teacher"):
        measure(tiny_llama(vocab_size=515))
