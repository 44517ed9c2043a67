"""Caches of a masked language model: inputs, targets and losses, resuming, refusals."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from sparselogits import CacheDataset
from sparselogits.caching import CacheRequest, build_caches
from sparselogits.caching.work import DrawSettings, compute_range
from sparselogits.corpus import (
    PackedCorpus,
    Window,
    open_source,
    pack,
    packing_for,
    tokenizer_fingerprint,
)
from sparselogits.corruption import Corruption
from sparselogits.data import TextDataset, collate
from sparselogits.errors import IdentityMismatchError, InvalidArgumentError
from sparselogits.language_model import Head
from sparselogits.samplers import Systematic, window_uniforms
from sparselogits.store import Cache, export, verify
from sparselogits.teacher import TransformersTeacher
from tests.conftest import tiny_llama
from tests.masked_models import VOCABULARY, bert_tokenizer, tiny_bert, write_short_texts

LENGTH, SEED = 32, 3
Build = Callable[..., Cache]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bert_tokenizer()


@pytest.fixture(scope="module")
def teacher() -> BertForMaskedLM:
    return tiny_bert(vocab_size=VOCABULARY, initializer_range=0.1).eval()


@pytest.fixture(scope="module")
def corpus(
    text: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> PackedCorpus:
    short = write_short_texts(text, tmp_path_factory.mktemp("short") / "text.jsonl")
    packing = packing_for(tokenizer, window_length=LENGTH, holdout=0.2)
    assert packing.separator_id == tokenizer.sep_token_id
    assert packing.bos_id == tokenizer.cls_token_id
    folder = tmp_path_factory.mktemp("corpus") / "packed"
    return pack(open_source(short), tokenizer, packing, folder, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def corruption(tokenizer: PreTrainedTokenizerFast) -> Corruption:
    return Corruption.of_tokenizer(tokenizer, VOCABULARY, rate=0.3, units="words", seed=7)


@pytest.fixture(scope="module")
def build(
    teacher: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: PackedCorpus,
    corruption: Corruption,
) -> Build:
    mask = torch.arange(VOCABULARY) < len(tokenizer)
    engine = TransformersTeacher(teacher, token_mask=mask, identity={"weights": "tiny"})

    def run(folder: Path, sampler: Any = None, **changes: Any) -> Cache:
        settings = {"corruption": corruption, "batch": 4, "windows_per_shard": 8, "engine": engine}
        settings |= changes
        report = build_caches(
            settings.pop("engine"),
            corpus,
            [CacheRequest(folder, sampler or Systematic(9), seed=SEED)],
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            **settings,
        )
        return report.caches[0]

    return run


@pytest.fixture(scope="module")
def cache(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return build(tmp_path_factory.mktemp("masked") / "cache")


def log_p(teacher: BertForMaskedLM, inputs: np.ndarray, tokens: int) -> torch.Tensor:
    """float32 [L, V] by transformers alone; ids that are no token are left out."""
    with torch.no_grad():
        logits = teacher(input_ids=torch.from_numpy(inputs.astype(np.int64))[None]).logits[0]
    logits[:, tokens:] = -torch.inf
    return logits.log_softmax(1)


def test_targets_are_the_teachers_at_the_chosen_positions_of_the_corrupted_input(
    cache: Cache,
    teacher: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: PackedCorpus,
    corruption: Corruption,
) -> None:
    assert cache.identity.format_version == 2
    assert len(cache) == corpus.windows > 12
    for i in range(len(cache)):
        record, window = cache.read(i), corpus.read(i, i + 1)[0]
        expected = corruption(window.tokens, i)
        assert np.array_equal(record.tokens, window.tokens)
        assert np.array_equal(record.inputs, expected.inputs)
        assert np.array_equal(record.mask, expected.chosen)
        found = log_p(teacher, record.inputs, len(tokenizer))
        chosen = torch.from_numpy(record.mask)
        labels = torch.from_numpy(record.tokens.astype(np.int64))
        nll = -found.gather(1, labels[:, None])[chosen]
        assert record.teacher_loss == pytest.approx(float(nll.mean()), abs=1e-5)
        uniforms = window_uniforms(SEED, i, LENGTH, Systematic(9).uniforms_per_position)
        drawn = Systematic(9)(found[chosen], uniforms[chosen])
        here = record.targets.entries_per_position[chosen]
        # the last bits of a logit may move a draw to a neighbouring id
        assert (here == drawn.entries_per_position).double().mean() > 0.95
        assert record.targets.entries == int(here.sum())
    assert verify(cache).ok


@pytest.mark.parametrize("text", [LENGTH, 20], ids=["full", "padded"])
def test_targets_are_unbiased(tokenizer: PreTrainedTokenizerFast, text: int) -> None:
    """The mean over draws is within five standard errors: a false alarm in 1.7 million, per id.

    Ids with fewer than ten expected rounds are pooled, so that the normal approximation holds.
    """
    teacher, rounds, count = tiny_bert(vocab_size=VOCABULARY).eval(), 4, 300
    engine = TransformersTeacher(teacher, identity={"weights": "tiny"})
    corruption = Corruption.of_tokenizer(tokenizer, VOCABULARY, rate=0.3)
    tokens = np.random.default_rng(0).integers(5, len(tokenizer), LENGTH).astype(np.int32)
    before = Window(1, tokens, np.array([0], np.int32), None)  # in the same batch
    tokens = np.where(np.arange(LENGTH) < text, tokens, tokenizer.pad_token_id).astype(np.int32)
    learnt = np.arange(LENGTH) < text
    window = Window(0, tokens, np.array([0], np.int32), None, learnt, text)
    draws = [DrawSettings(Systematic(rounds), seed, 1.0) for seed in range(count)]
    how = {"batch": 2, "reset_attention": False, "corruption": corruption}
    made = compute_range(engine, [before, window], draws, **how)
    record = made[0][1]
    assert not record.mask[text:].any()
    p = log_p(teacher, record.inputs[:text], VOCABULARY)[record.mask[:text]].exp().double()
    dense = torch.stack([own.targets.dense()[record.mask] for (_, own) in made]).double()
    frequent = p * rounds * count >= 10
    assert frequent.any(1).all()
    rare = [(values * ~frequent).sum(-1, keepdim=True) for values in (p, dense)]
    p = torch.cat([p * frequent, rare[0]], 1)
    found = torch.cat([dense * frequent, rare[1]], 2).mean(0)
    error = (p * (1 - p) / rounds / count).sqrt()  # of independent rounds, which is larger
    assert ((found - p).abs() <= 5 * error + 1e-6).all()


def hashes(cache: Cache) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (Path(cache.root) / "shards").iterdir()
    }


class AllPositions:
    """A teacher without `logits_at`, which therefore multiplies every position by the head."""

    def __init__(self, engine: TransformersTeacher) -> None:
        self.vocab_size, self.token_mask = engine.vocab_size, engine.token_mask
        self.identity, self.logits = engine.identity, engine.logits


def test_the_head_multiplies_chosen_positions_alone_and_the_cache_is_the_same(
    build: Build,
    cache: Cache,
    teacher: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = torch.arange(VOCABULARY) < len(tokenizer)
    engine = TransformersTeacher(teacher, token_mask=mask, identity={"weights": "tiny"})
    rows: list[int] = []
    multiply = Head.__call__

    def counted(self: Head, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return multiply(self, hidden)

    monkeypatch.setattr(Head, "__call__", counted)
    build(tmp_path / "chosen", engine=engine)
    chosen, rows[:] = sum(rows), []
    all_of_them = build(tmp_path / "all", engine=AllPositions(engine))
    assert 0 < chosen < 0.7 * sum(rows)
    for i in range(len(cache)):
        one, other = cache.read(i), all_of_them.read(i)
        assert np.array_equal(one.inputs, other.inputs)
        for name in ("ids", "weights", "offsets"):
            assert torch.equal(getattr(one.targets, name), getattr(other.targets, name))
        assert one.teacher_loss == pytest.approx(other.teacher_loss, rel=1e-6)


def test_a_build_that_is_interrupted_continues_to_the_same_bytes(
    build: Build, cache: Cache, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", progress=stop)
    assert 0 < len(Cache.open(tmp_path / "c").finished()) < len(cache.finished())
    assert hashes(build(tmp_path / "c")) == hashes(cache)


def test_items_have_the_corrupted_input_and_the_original_labels(cache: Cache) -> None:
    dataset = CacheDataset(cache.root)
    for i in (0, 5):
        item, record = dataset[i], cache.read(i)
        assert item["input_ids"].tolist() == record.inputs.tolist()
        labels = np.where(record.mask, record.tokens, -100)
        assert item["shift_labels"].tolist() == item["labels"].tolist() == labels.tolist()
        assert "loss_weight" not in item
    batch = collate([dataset[0], dataset[5]])
    assert torch.equal(batch["labels"], batch["shift_labels"])


def test_random_rates_weigh_windows_by_their_inverse(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    random = Corruption.of_tokenizer(tokenizer, VOCABULARY, rate=None, masked=1.0, random=0.0)
    cache = build(tmp_path / "c", corruption=random)
    dataset = CacheDataset(cache.root)
    rates = [cache.read(i).rate for i in range(len(cache))]
    assert len(set(rates)) == len(rates)
    weights = [float(dataset[i]["loss_weight"]) for i in range(len(cache))]
    assert weights == pytest.approx([1 / rate for rate in rates])
    assert dataset[0:3]["loss_weight"].shape == (3,)
    assert verify(cache).ok


def test_held_out_windows_are_corrupted_in_the_same_way_each_time(
    corpus: PackedCorpus, corruption: Corruption
) -> None:
    windows = TextDataset(corpus, corruption=corruption)
    assert torch.equal(windows[0]["input_ids"], windows[0]["input_ids"])
    chosen = windows[0]["shift_labels"] != -100
    expected = corruption(corpus.read_holdout(0, 1)[0].tokens, 0, held_out=True)
    assert chosen.tolist() == expected.chosen.tolist()
    assert windows[0]["input_ids"].tolist() == expected.inputs.tolist()


def test_an_export_has_the_inputs(cache: Cache, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    (name, *_) = export(cache, tmp_path / "out", "lists")
    row = pq.read_table(name).slice(0, 1).to_pylist()[0]
    assert row["inputs"] == cache.read(0).inputs.tolist()


def test_objectives_and_teachers_that_do_not_fit_are_refused(
    build: Build, cache: Cache, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"the teacher .* is a masked language model"):
        build(tmp_path / "c", corruption=None)
    causal = TransformersTeacher(tiny_llama(vocab_size=VOCABULARY), identity={"weights": "l"})
    with pytest.raises(InvalidArgumentError, match=r"the teacher .* is a causal language model"):
        build(tmp_path / "c", engine=causal)
    assert not (tmp_path / "c").exists()
    other = Corruption.of_tokenizer(tokenizer, VOCABULARY, rate=0.15, units="words", seed=7)
    with pytest.raises(IdentityMismatchError, match=r"objective\.rate: 0\.15 .* 0\.3"):
        build(Path(cache.root), corruption=other)


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = bert_tokenizer()
    plain.mask_token = None
    with pytest.raises(InvalidArgumentError, match="no mask token"):
        Corruption.of_tokenizer(plain, VOCABULARY)
