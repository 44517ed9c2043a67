"""Caches of padded windows: the teacher reads no padding, and padding has no target."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparselogits import CacheDataset
from sparselogits.caching import CacheRequest, build_caches, text_of_windows
from sparselogits.caching.pilot import check_teacher_on_text, pilot_windows
from sparselogits.caching.teacher_input import TeacherInput
from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
from sparselogits.corruption import Corruption
from sparselogits.data import TextDataset, collate
from sparselogits.errors import CacheError, InvalidArgumentError
from sparselogits.evaluate import evaluate
from sparselogits.identity import Identity
from sparselogits.lab.report import WindowViewer
from sparselogits.samplers import Systematic
from sparselogits.store import Cache, export, verify
from sparselogits.store.bounds import require_bounds
from sparselogits.teacher import TransformersTeacher
from sparselogits.train.objective import Objective, bind
from tests.caching.test_masked_objective import hashes, log_p
from tests.conftest import tiny_llama
from tests.masked_models import VOCABULARY, bert_tokenizer, tiny_bert, write_short_texts

LENGTH, SEED = 48, 3


@pytest.fixture(scope="module")
def tokenizer():
    return bert_tokenizer()


@pytest.fixture(scope="module")
def teacher():
    return tiny_bert(vocab_size=VOCABULARY, initializer_range=0.1).eval()


@pytest.fixture(scope="module")
def packed(text, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    short = write_short_texts(text, folder / "text.jsonl")
    sentences = [  # documents of one to a hundred words
        " ".join(json.loads(line)["text"].split()[: 1 + 7 * number % 100])
        for number, line in enumerate(short.open())
    ]
    short.write_text("".join(json.dumps({"text": words}) + "\n" for words in sentences))

    def run(name, length=LENGTH, **options):
        settings = {"window_length": length, "holdout": 0.2, "kind": "documents"} | options
        packing = packing_for(tokenizer, **settings)
        source = open_source(str(short))
        return pack(source, tokenizer, packing, folder / name, vocab_size=VOCABULARY)

    return run


@pytest.fixture(scope="module")
def corpus(packed):
    return packed("documents")


@pytest.fixture(scope="module")
def build(teacher, tokenizer, corpus):
    mask = torch.arange(VOCABULARY) < len(tokenizer)
    engine = TransformersTeacher(teacher, token_mask=mask, identity={"weights": "tiny"})
    corruption = Corruption.of_tokenizer(tokenizer, VOCABULARY, rate=0.3, seed=7)

    def run(folder, **changes):
        given = {"corpus": corpus, "engine": engine, "corruption": corruption, "batch": 4}
        given |= {"windows_per_shard": 8} | changes
        report = build_caches(
            given.pop("engine"),
            given.pop("corpus"),
            [CacheRequest(folder, Systematic(9), seed=SEED)],
            tokenizer_hash=tokenizer_fingerprint(tokenizer),
            **given,
        )
        return report.caches[0]

    return run


@pytest.fixture(scope="module")
def cache(build, tmp_path_factory):
    return build(tmp_path_factory.mktemp("documents") / "cache")


def test_targets_are_those_of_the_document_alone(cache, teacher, tokenizer, corpus):
    assert cache.identity.packing["kind"] == "documents"
    assert cache.identity.packing["padding_id"] == tokenizer.pad_token_id
    lengths, special = set(), set(tokenizer.all_special_ids)
    for i in range(len(cache)):
        record, window = cache.read(i), corpus.read(i, i + 1)[0]
        lengths.add(window.text_length)
        own = slice(0, window.text_length)
        assert np.array_equal(record.tokens, window.tokens)
        assert not special & set(record.tokens[record.mask].tolist())
        chosen = torch.from_numpy(record.mask)
        assert not chosen[window.text_length :].any()
        found = log_p(teacher, record.inputs[own], len(tokenizer))
        labels = torch.from_numpy(record.tokens.astype(np.int64))[own][chosen[own]]
        nll = -found[chosen[own]].gather(1, labels[:, None])
        expected = float(nll.mean()) if len(nll) else 0.0
        assert record.teacher_loss == pytest.approx(expected, abs=1e-5)
        assert (record.targets.entries_per_position > 0).tolist() == chosen.tolist()
    assert len(lengths) > 5
    assert max(lengths) == LENGTH
    assert verify(cache).ok


def test_an_interrupted_build_continues_to_the_same_bytes(build, cache, tmp_path):
    def stop(done, total):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", progress=stop)
    assert 0 < len(Cache.open(tmp_path / "c").finished()) < len(cache.finished())
    assert hashes(build(tmp_path / "c")) == hashes(cache)


def test_padding_costs_next_to_nothing_on_disk(build, packed, tokenizer, tmp_path):
    """Tokens that are equal are compressed; the mask takes one bit per position."""
    llama = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=512)
    engine = TransformersTeacher(llama, identity={"weights": "l"})
    sizes = []
    for length in (128, 512):
        corpus = packed(f"of-{length}", length)
        how = {"corpus": corpus, "engine": engine, "corruption": None, "windows_per_shard": 512}
        made = build(tmp_path / f"c{length}", **how)
        sizes.append(made.statistics().bytes_on_disk)
        assert made.statistics().tokens == corpus.windows * length
    more = corpus.windows * (512 - 128)
    assert sizes[1] - sizes[0] < more / 8


def test_items_have_an_attention_mask(cache, corpus):
    dataset = CacheDataset(cache.root)
    for i in range(8):
        item, window = dataset[i], corpus.read(i, i + 1)[0]
        assert item["attention_mask"].tolist() == [
            int(at < window.text_length) for at in range(LENGTH)
        ]
    batch = collate([dataset[i] for i in range(8)])
    assert batch["attention_mask"].shape == (8, LENGTH)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("method", ["sparse", "full"])
def test_the_loss_is_that_of_documents_alone(cache, teacher, corpus, method):
    dataset = CacheDataset(cache.root)
    student = tiny_bert(seed=1, vocab_size=VOCABULARY).eval()
    engine = TransformersTeacher(teacher, identity={"weights": "tiny"})
    batch = collate([dataset[i] for i in range(6)])
    if method == "full":
        mask = batch["attention_mask"]
        batch["teacher_hidden"] = engine.hidden(batch["input_ids"], attention_mask=mask)
        batch = {name: value for name, value in batch.items() if not name.startswith("target")}
    expected, entropy, count = torch.zeros(()), torch.zeros(()), 0
    for i in range(6):
        item, n = dataset[i], corpus.read(i, i + 1)[0].text_length
        tokens, labels = item["input_ids"][None, :n], item["labels"][:n]
        here = labels != -100
        q = student(input_ids=tokens).logits[0][here].log_softmax(-1)
        with torch.no_grad():
            p = teacher(input_ids=tokens).logits[0][here].softmax(-1)
        if method == "sparse":
            p = item["targets"][:n].dense()[here]
        else:
            entropy -= torch.special.xlogy(p, p).sum()
        expected, count = expected - (p * q).sum(), count + int(here.sum())
    bind(student, Objective(method, masked=True, teacher_head=engine.head))
    loss = float(student(**batch).loss.detach())
    assert loss == pytest.approx(float((expected - entropy) / count), rel=1e-4)


def test_evaluation_reads_no_padding(corpus, teacher, tokenizer):
    corruption = Corruption.of_tokenizer(tokenizer, VOCABULARY, rate=0.3, seed=7)
    windows = TextDataset(corpus, corruption=corruption)
    student = tiny_bert(seed=1, vocab_size=VOCABULARY).eval()
    engine = TransformersTeacher(teacher, identity={"weights": "tiny"})
    found = evaluate({"student": student}, windows, engine)["student"]
    loss, count = 0.0, 0
    for i in range(len(windows)):
        item, n = windows[i], corpus.read_holdout(i, i + 1)[0].text_length
        labels = item["labels"][:n]
        with torch.no_grad():
            q = student(input_ids=item["input_ids"][None, :n]).logits[0].log_softmax(-1)
        loss -= float(q[labels != -100].gather(1, labels[labels != -100][:, None]).sum())
        count += int((labels != -100).sum())
    assert found.positions == count
    assert found.loss == pytest.approx(loss / count, rel=1e-5)


def test_a_page_shows_the_text_and_says_how_much_padding_follows(cache, teacher, corpus):
    engine = TransformersTeacher(teacher, identity={"weights": "tiny"})
    viewer = WindowViewer(CacheDataset(cache.root), teacher=engine)
    window = next(w for w in corpus.read(0, corpus.windows) if w.text_length < LENGTH)
    view = viewer.view(window.index)
    assert len(view.tokens) == len(view.positions) == len(view.chosen) == window.text_length
    assert dict(view.facts)["padding, not shown"].startswith(str(LENGTH - window.text_length))


def test_a_causal_teacher_needs_no_mask(build, corpus, tokenizer, tmp_path):
    llama = tiny_llama(vocab_size=VOCABULARY)
    engine = TransformersTeacher(llama, identity={"weights": "l"})
    made = build(tmp_path / "c", engine=engine, corruption=None)
    window = next(w for w in corpus.read(0, corpus.windows) if w.text_length < LENGTH)
    record, n = made.read(window.index), window.text_length
    assert (record.targets.entries_per_position > 0).tolist() == window.mask.tolist()
    assert window.mask.tolist() == [True] * (n - 1) + [False] * (LENGTH - n + 1)
    tokens = torch.from_numpy(window.tokens.astype(np.int64))[None, :n]
    with torch.no_grad():
        found = llama(input_ids=tokens).logits[0].log_softmax(-1)
    nll = -found[:-1].gather(1, tokens[0, 1:, None]).mean()
    assert record.teacher_loss == pytest.approx(float(nll), abs=1e-5)
    assert verify(made).ok
    import pyarrow.parquet as pq

    (name, *_) = export(made, tmp_path / "out", "axolotl")
    row = pq.read_table(name).slice(window.index, 1).to_pylist()[0]
    assert row["attention_mask"] == [1] * n + [0] * (LENGTH - n)


def test_a_causal_teacher_that_never_predicts_padding_is_not_refused(packed):
    """Only labels within the text count in the check of the teacher's loss."""
    llama = tiny_llama(vocab_size=VOCABULARY, tie_word_embeddings=False)
    corpus = packed("checked")
    window = next(w for w in pilot_windows(corpus) if w.text_length < LENGTH)
    given = TeacherInput.of(window, None)
    n = window.text_length
    assert given.labels[: n - 1].tolist() == window.tokens[1:n].tolist()
    assert (given.labels[n - 1 :] == -100).all()
    engine = TransformersTeacher(llama, identity={"weights": "l"})
    with torch.no_grad():
        tokens = torch.from_numpy(window.tokens[:n].astype(np.int64))[None]
        found = llama(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    expected = -found.gather(1, tokens[0, 1:, None]).mean()
    loss = check_teacher_on_text(engine, [window], reset_attention=False, corruption=None)
    assert loss == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("kind", ["joined", "documents"])
def test_only_tokens_of_completions_are_chosen(build, tokenizer, tmp_path, kind):
    records = [
        {"prompt": "the statement in front ", "completion": f"of the loop {'again ' * number}"}
        for number in range(30)
    ]
    data = tmp_path / "chat.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    packing = packing_for(tokenizer, window_length=LENGTH, kind=kind)
    source = open_source(str(data), completion_only=True)
    corpus = pack(source, tokenizer, packing, tmp_path / "corpus", vocab_size=VOCABULARY)
    made = build(tmp_path / "c", corpus=corpus)
    chosen = learnt = 0
    for record, window in zip(
        (made.read(i) for i in range(len(made))), corpus.read(0, corpus.windows), strict=True
    ):
        assert not (record.mask & ~window.learnt).any()
        chosen, learnt = chosen + record.mask.sum(), learnt + window.learnt.sum()
    assert 0.2 * learnt < chosen < 0.4 * learnt
    assert verify(made).ok
    text_of = text_of_windows(tmp_path / "c")  # the text is elsewhere, so there is none to compare
    assert text_of((0, 1)) is None


def test_a_cache_that_claims_another_kind_is_refused(cache):
    told = cache.identity.to_json()
    for change in ({"kind": "lines"}, {"padding_id": VOCABULARY}):
        forged = told | {"packing": told["packing"] | change}
        with pytest.raises(CacheError, match=f"packing.{next(iter(change))}"):
            require_bounds(Identity.from_json(forged), "cache.json")


def test_a_target_in_the_padding_is_found(cache, tmp_path):
    other = Cache.create(tmp_path / "c", cache.identity)
    for start, stop in cache.finished()[:1]:
        records = [cache.read(i) for i in range(start, stop)]
        at, record = next((i, r) for i, r in enumerate(records) if r.mask.any())
        early = np.flatnonzero(record.mask)[:1].astype(np.int32)
        records[at] = replace(record, document_starts=np.append(0, early).astype(np.int32))
        other.commit(records, {})
    (damaged,) = verify(other).damaged
    assert "of the padding" in damaged.error


def test_padded_rows_of_ids_need_an_attention_mask(build, tokenizer, tmp_path):
    rows = [{"input_ids": [2, *range(20, 20 + n), 3]} for n in (5, 9, 30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("joined", "documents"):
        packing = packing_for(tokenizer, window_length=LENGTH, kind=kind)
        source = open_source(str(data), tokenized_by=tokenizer)
        corpus = pack(source, tokenizer, packing, tmp_path / kind, vocab_size=VOCABULARY)
        if kind == "joined":
            with pytest.raises(InvalidArgumentError, match="--packing documents"):
                build(tmp_path / "c", corpus=corpus)
            assert not (tmp_path / "c").exists()
        else:
            assert len(build(tmp_path / "c", corpus=corpus)) == 3
