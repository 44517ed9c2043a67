"""Several teachers online: the logarithm of the mixture of their distributions."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.errors import InvalidArgumentError, TeacherError
from sparselogits.teacher import MixtureTeacher, TransformersTeacher, load_teacher
from tests.conftest import PADDED_VOCABULARY, VOCABULARY, tiny_llama

WEIGHTS = (0.7, 0.3)


@pytest.fixture(scope="module")
def teachers(teacher_folder, second_teacher, tokenizer) -> list[TransformersTeacher]:
    return [load_teacher(str(f), tokenizer=tokenizer) for f in (teacher_folder, second_teacher)]


def test_a_mixture_of_teachers_is_the_mean_of_their_distributions(teachers):
    tokens = torch.randint(0, VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(0))
    tokens = tokens[:, :100]
    mixture = MixtureTeacher(teachers, WEIGHTS)
    assert mixture.vocab_size == PADDED_VOCABULARY + 8
    rows = [[], []]
    for part in mixture.logits(tokens):
        assert part.logits.dtype == torch.float32
        rows[part.row].append(part.logits.double().softmax(-1))
    found = torch.stack([torch.cat(row) for row in rows])
    expected = torch.zeros(2, 100, mixture.vocab_size, dtype=torch.float64)
    for weight, teacher in zip(WEIGHTS, teachers, strict=True):
        logits = teacher.model(tokens).logits.detach().double()
        logits[..., ~teacher.token_mask] = -torch.inf
        expected[..., : logits.shape[-1]] += weight * logits.softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert bool((found[..., VOCABULARY:] == 0).all())
    assert mixture.token_mask.tolist() == [i < VOCABULARY for i in range(mixture.vocab_size)]


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.6], [1.0, 0.0], [1.5, -0.5], [float("nan")] * 2]
)
def test_weights_of_teachers_are_positive_shares(teachers, weights):
    with pytest.raises(InvalidArgumentError, match="weights"):
        MixtureTeacher(teachers, weights)


def test_teachers_with_other_slices_are_refused(teachers, teacher_folder):
    first = teachers[0]
    other = TransformersTeacher(
        tiny_llama(), token_mask=first.token_mask, identity=first.identity, slice_positions=7
    )
    with pytest.raises(TeacherError, match="the same slice_positions"):
        list(MixtureTeacher([first, other], WEIGHTS).logits(torch.zeros(1, 20).long()))


def test_a_student_is_measured_against_the_mixture(
    cache, second_cache, teacher_folder, second_teacher, tmp_path
):
    """A student that is one of the teachers; numbers that do not fit are refused."""

    def measured(*words: str, code: int = 0, stderr: bool = False) -> str:
        words = ("eval", *words, "--device", "cpu", "--limit", "3", "--resamples", "2")
        done = CliRunner().invoke(app, list(words))
        assert (done.exit_code == 0) is (code == 0), done.output + repr(done.exception)
        if code:
            return done.output + str(done.exception)
        return done.stderr if stderr else done.stdout

    def kl(*words: str) -> float:
        found = json.loads(measured(str(second_teacher), *words, "--json"))
        return float(found["student"]["kl"])

    both = ("--cache", str(cache), "--cache", str(second_cache))
    teachers = ("--teacher", str(teacher_folder), "--teacher", str(second_teacher))
    first = kl(*both[:2], *teachers[:2])
    own = kl(*both[2:], "--corpus", str(cache / "corpus"), *teachers[2:])
    assert kl(*both, *teachers, "--weights", "0,1") == pytest.approx(own, abs=1e-5)
    half = kl(*both, *teachers)
    assert own < half < (first + own) / 2  # KL is convex
    for words, said in (
        ((*both, *teachers[:2]), "found 1 --teacher and 2 --cache options"),
        ((*both, *teachers, "--weights", "best"), "held-out text has none"),
        ((*both, *teachers, "--weights", "0.5,0.3,0.2"), "3 numbers, but there are 2 teachers"),
        ((*both, *teachers, "--weights", "a,b"), "expected numbers separated by commas"),
        ((*both, *teachers, "--weights", "0.9,0.9"), "sum is 1"),
        ((*both[:2], *teachers[:2], "--weights", "0"), "--weights needs several teachers"),
        ((*both, *teachers[2:], *teachers[:2]), "give the cache's teacher"),
    ):
        assert said in measured(str(second_teacher), *words, code=1)
    advised = measured(str(second_teacher), *both, "--weights", "0.7,0.3", stderr=True)
    assert f"--cache {second_cache} --teacher MODEL --weights 0.7,0.3" in advised
