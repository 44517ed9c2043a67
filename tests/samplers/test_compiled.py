"""Test block sums in C against those of PyTorch: equal bits, or a fallback to PyTorch."""

import logging
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from sparselogits.caching.work import DrawSettings, compute_range
from sparselogits.corpus import Window
from sparselogits.errors import InvalidLogitsError
from sparselogits.samplers import (
    Multinomial,
    Systematic,
    Threshold,
    TopK,
    compiled,
    window_uniforms,
)
from sparselogits.samplers.distribution import Blocks, sum_by_block
from sparselogits.teacher import ModuleTeacher
from tests.samplers.distributions import KINDS, logits_of

VOCABULARY = 3_333  # no multiple of 64
SAMPLERS = [Systematic(50), Systematic(50, 0.7), Multinomial(20), Threshold(0.02), TopK(12)]

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="no C compiler, or a processor for which nothing is compiled",
)


@pytest.fixture(autouse=True)
def for_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "WORTHWHILE", 0)
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


def logits(positions: int = 70) -> Tensor:
    kinds = list(KINDS)
    rows = [logits_of(kinds[i % len(kinds)], VOCABULARY, i) for i in range(positions)]
    return torch.stack(rows).float()


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    compiled.library.cache_clear()
    assert compiled.library() is None


def bits(given: Tensor, exponent: float, with_moment: bool) -> list[Tensor]:
    blocks = Blocks.of(given, exponent, with_moment=with_moment)
    own = (blocks.shift, blocks.sums, blocks.moment)
    return [part.view(torch.int64) for part in own if part is not None]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("exponent", "with_moment"), [(1.0, True), (1.0, False), (0.6, False)])
def test_bits_are_those_of_pytorch(threads, exponent, with_moment, monkeypatch):
    given = logits()
    given = torch.cat([given, given * 30, given - 1000, given - 2**23, given.requires_grad_()])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compiled.library() is not None
        fast = bits(given, exponent, with_moment)
        without_compiler(monkeypatch)
        torch.set_num_threads(1)
        slow = bits(given, exponent, with_moment)
    finally:
        torch.set_num_threads(before)
    for ours, expected in zip(fast, slow, strict=True):
        assert torch.equal(ours, expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtype_and_device_do_not_matter(dtype, device):
    given = logits()
    few = given[:, :3328].contiguous()
    expected = bits(given, 1.0, with_moment=True)
    compiled.library.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            library = compiled.library()
            assert library is not None
            found = bits(given, 1.0, with_moment=True)
            peaks, _ = sum_by_block(few, 1.0, with_moment=False, library=library)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(peaks, few.amax(-1, keepdim=True))
    for ours, first in zip(found, expected, strict=True):
        assert torch.equal(ours, first)


@needs_compiler
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_build_has_the_same_records(sampler, monkeypatch):
    torch.manual_seed(0)
    trunk, head = torch.nn.Embedding(97, 32), torch.nn.Linear(32, VOCABULARY)
    mask = torch.arange(VOCABULARY) < VOCABULARY - 5
    teacher = ModuleTeacher(trunk, head, token_mask=mask, name="test", architecture="embedding")
    tokens = np.arange(3 * 90, dtype=np.int32).reshape(3, 90) % 97
    windows = [Window(i, row, np.zeros(0, np.int32), None) for i, row in enumerate(tokens)]
    draws = [DrawSettings(sampler, 0, 1.0), DrawSettings(sampler, 1, 2.0)]

    def records() -> list[object]:
        made = compute_range(teacher, windows, draws, batch=2, reset_attention=False)
        return [
            (r.teacher_loss, r.teacher_entropy, r.targets.ids.tolist(), r.targets.weights.tolist())
            for column in made
            for r in column
        ]

    assert compiled.library() is not None
    fast = records()
    without_compiler(monkeypatch)
    assert fast == records()


@needs_compiler
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "position 66: logit of id 33 is nan"),
        (float("inf"), "position 66: logit of id 33 is inf"),
        (1e9, "position 66: logit of id 33 is 1000000000.0, expected the row's largest"),
        (3e38, r"position 66: logit of id 33 is 3.*e\+38, expected the row's largest"),
        (-1e9, "position 66: logit of id .* is -.*, expected the row's largest"),
    ],
)
def test_bad_logits_are_named(value, message):
    assert compiled.library() is not None
    for given in (logits(), torch.full((70, VOCABULARY), -torch.inf)):
        given[66, given[66] > value] = value
        given[66, 33] = value
        given[:66, 5] = 1.0
        with pytest.raises(InvalidLogitsError, match=message):
            Systematic(5)(given, window_uniforms(0, 0, 70, 1))
    given[66] = -torch.inf
    with pytest.raises(InvalidLogitsError, match="position 66: every logit is -inf"):
        Systematic(5)(given, window_uniforms(0, 0, 70, 1))


@needs_compiler
@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("0.2402264476e+0f", "0.2402265069e+0f"),
        ("sum += lanes[i]", "sum += lanes[i ^ 1]"),
        ("0.2402265069591012214e+0", "0.2402265069591012e+0"),
    ],
)
def test_a_function_that_is_not_exact_is_refused(own, other, tmp_path, monkeypatch, caplog):
    source = compiled._SOURCE.read_text()
    assert own in source
    changed = tmp_path / "block_sums.c"
    changed.write_text(source.replace(own, other))
    monkeypatch.setattr(compiled, "_SOURCE", changed)
    with caplog.at_level(logging.INFO):
        assert compiled.library() is None
    assert "differ from those of PyTorch" in caplog.text


@pytest.mark.parametrize(
    "compiler",
    ["false", "no-such-compiler", "'", "", "true", "cc --no-such-option", "sh -c 'exec sleep 60'"],
)
def test_without_a_compiler_pytorch_is_used(compiler, monkeypatch, caplog):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(compiled, "_TIMEOUT", 1)
    with caplog.at_level(logging.INFO):
        drawn = Systematic(9)(logits(), window_uniforms(0, 0, 70, 1))
    assert "were not compiled" in caplog.text
    drawn.__post_init__(True)
