"""Test that adaptive rounds with a small student are unbiased for any signal."""

from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from sparselogits import CacheDataset, SparseKDTrainer
from sparselogits.caching import CacheRequest, build_caches
from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.samplers import (
    Adaptive,
    NamedSignal,
    StudentSignal,
    from_parameters,
    window_uniforms,
)
from sparselogits.samplers.budget import Pilot, PilotSlice
from sparselogits.store import Cache, verify
from sparselogits.teacher import load_teacher
from tests.conftest import tiny_llama

VOCABULARY = 96
TOKENS = torch.arange(24) * 5 % VOCABULARY


@pytest.fixture(scope="module")
def student() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    with torch.no_grad():  # rows of unequal norm, so that the proposal differs from the teacher
        model.lm_head.weight.mul_(torch.linspace(0.2, 5, VOCABULARY)[:, None])
    return model


def teacher_logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.1, 5, len(TOKENS))[:, None]  # from flat to peaked
    return torch.randn(len(TOKENS), VOCABULARY, generator=generator) * scale


@pytest.mark.parametrize("signal", ["distance", "variance"])
@pytest.mark.parametrize(("position_power", "token_power"), [(0, 1), (0.5, 0), (0.5, 1), (1, 0.5)])
def test_mean_is_the_teacher(student, signal, position_power, token_power):
    """z-test over 1 024 draws of 24 positions, on ids drawn at least 20 times.

    The bound is that of test_unbiased.py, at 1e-6 a case.
    """
    reference = 0.5 if signal == "distance" else 0.02  # rounds between 3 and 64
    read = StudentSignal.of(student, signal).at(TOKENS, slice(0, 24))
    draws, together = 1024, 64
    assert read.hidden is not None
    many = Adaptive(
        replace(read, hidden=read.hidden.repeat(together, 1)),
        8,
        reference,
        position_power,
        token_power,
    )
    logits = teacher_logits()
    total, square, hits = torch.zeros(3, 24, VOCABULARY, dtype=torch.float64)
    for window in range(draws // together):
        uniforms = window_uniforms(9, window, 24 * together, 1)
        dense = many(logits.repeat(together, 1), uniforms).dense().double()
        total += dense.view(together, 24, -1).sum(0)
        square += dense.square().view(together, 24, -1).sum(0)
        hits += (dense > 0).view(together, 24, -1).sum(0)
    mean = total / draws
    spread = ((square / draws - mean.square()).clamp_min(0) / draws).sqrt()
    p = logits.double().softmax(-1)
    often = hits >= 20  # the tilt makes some likely tokens rare: for those no z-test holds
    assert float(p[often].sum()) > 0.8 * 24
    z = (mean - p).abs() / spread.clamp_min(1e-7)
    assert float(z[often].max()) < 1.25 * NormalDist().inv_cdf(1 - 0.5e-6 / int(often.sum()))
    assert float((mean.sum(-1) - 1).abs().max()) < 0.05


def test_rounds_follow_the_signal(student):
    signal = StudentSignal.of(student, "distance")
    sampler = Adaptive(signal, 20, 0.5, position_power=1, token_power=0)
    here = sampler.at(TOKENS, slice(4, 20))
    logits = teacher_logits()[4:20]
    signals = here.signals(logits)
    assert not signals.requires_grad  # a graph would keep every slice's logits alive
    targets = here(logits, window_uniforms(0, 0, 16, 1))
    targets.__post_init__(True)
    # without importance weights every weight is a multiple of 1 / rounds
    rounds = (20 * signals / 0.5).round().clamp(1, 160)
    counts = targets.weights * rounds[targets.positions]
    torch.testing.assert_close(counts, counts.round(), atol=1e-3, rtol=0)
    assert targets.mass().sub(1).abs().max() < 1e-5
    whole = sampler.at(TOKENS, slice(0, 24)).signals(teacher_logits())
    torch.testing.assert_close(whole[4:20], signals, atol=1e-5, rtol=1e-4)


def test_rebuilt_from_a_checkpoint(student, tmp_path):
    student.save_pretrained(tmp_path)
    sampler = Adaptive(StudentSignal.load(NamedSignal(str(tmp_path))), 12, 0.5)
    named = from_parameters({"name": "adaptive", **sampler.parameters()})
    assert named.parameters() == sampler.parameters()
    with pytest.raises(InvalidArgumentError, match=r"not loaded.*call sampler\.ready"):
        named.at(TOKENS, slice(0, 24))
    again = named.ready()
    uniforms = window_uniforms(0, 0, 24, 1)
    drawn = [s.at(TOKENS, slice(0, 24))(teacher_logits(), uniforms) for s in (sampler, again)]
    assert torch.equal(drawn[0].weights, drawn[1].weights)
    with pytest.raises(IdentityMismatchError, match="have the fingerprint"):
        replace(named, signal=replace(named.signal, fingerprint="sha256:0")).ready()
    in_memory = Adaptive(StudentSignal.of(student), 12, 0.5).parameters()
    with pytest.raises(InvalidArgumentError, match="student in memory"):
        from_parameters({"name": "adaptive", **in_memory}).ready()


def test_the_student_must_have_read_the_positions(student):
    signal = StudentSignal.of(student, "distance")
    with pytest.raises(InvalidArgumentError, match=r"sampler\.at"):
        Adaptive(signal)(teacher_logits(), window_uniforms(0, 0, 24, 1))
    with pytest.raises(InvalidArgumentError, match="vocabulary has 96 ids"):
        Adaptive(StudentSignal.of(student))(torch.zeros(2, 97), window_uniforms(0, 0, 2, 1))
    with pytest.raises(InvalidArgumentError, match="vocabulary has 96 ids"):
        signal.at(TOKENS, slice(0, 2)).strength(torch.zeros(2, 97))
    with pytest.raises(InvalidArgumentError, match=r"reference signal .* is not set"):
        Adaptive(StudentSignal.of(student))(torch.zeros(2, 96), window_uniforms(0, 0, 2, 1))
    with pytest.raises(InvalidArgumentError, match="signal is 'dist'; expected distance or"):
        StudentSignal.of(student, "dist")


def test_a_student_that_equals_the_teacher_has_no_reference(student):
    sampler = Adaptive(StudentSignal.of(student, "distance"))
    here = sampler.signal.at(TOKENS, slice(0, 24))
    logits = here.engine.head(here.hidden).detach()
    pilot = Pilot([lambda: [PilotSlice(0, TOKENS, slice(0, 24), logits)]])
    with pytest.raises(InvalidArgumentError, match="signal is 0 at all positions"):
        sampler.fitted(pilot, None)
    for empty in (Pilot([]), Pilot.of_logits([logits[:0]])):
        with pytest.raises(InvalidArgumentError, match="no pilot positions"):
            Adaptive(StudentSignal.of(student)).fitted(empty, None)


def test_a_cache_drawn_with_a_student_in_memory(tmp_path, teacher_folder, text, tokenizer):
    """It is resumed with that student, verified, and trained from without any."""
    teacher = load_teacher(str(teacher_folder), tokenizer=tokenizer)
    pages = tmp_path / "pages.jsonl"
    pages.write_text("".join(line for line in text.open() if len(line) < 2500))
    packing = packing_for(tokenizer, window_length=32, separator_id=0)
    vocab_size = teacher.vocab_size
    corpus = pack(
        open_source(pages), tokenizer, packing, tmp_path / "corpus", vocab_size=vocab_size
    )
    how = {"tokenizer_hash": tokenizer_fingerprint(tokenizer), "windows_per_shard": 16}
    sampler = Adaptive(StudentSignal.of(tiny_llama(seed=1), "distance", path="/moved/away"))
    request = CacheRequest(tmp_path / "cache", sampler, budget=6)
    build_caches(teacher, corpus, [request], only=(0, 16), **how)
    report = build_caches(teacher, corpus, [request], **how)
    assert (report.windows_found, len(report.caches[0])) == (16, corpus.windows)
    recorded = report.caches[0].identity.sampler
    assert (recorded["student"], recorded["budget"]) == ("/moved/away", 6)
    assert 0 < recorded["reference"] < 1
    found = report.caches[0].statistics().entries_per_position
    assert found == pytest.approx(6, rel=0.1)
    other = Adaptive(StudentSignal.of(tiny_llama(seed=2), "distance", path="/moved/away"))
    with pytest.raises(IdentityMismatchError, match=r"sampler\.fingerprint"):
        build_caches(teacher, corpus, [replace(request, sampler=other)], **how)
    assert verify(Cache.open(tmp_path / "cache")).ok

    def trainer(**options: object) -> SparseKDTrainer:
        arguments = TrainingArguments(str(tmp_path / "run"), max_steps=2, report_to="none")
        dataset = CacheDataset(tmp_path / "cache")
        return SparseKDTrainer(tiny_llama(seed=3), arguments, train_dataset=dataset, **options)

    assert trainer().train().global_step == 2
    with pytest.raises(InvalidArgumentError, match="unbiased"):
        trainer(missing_mass="renormalise")
    with pytest.raises(InvalidArgumentError, match="rounds"):
        trainer(rounds=2)
