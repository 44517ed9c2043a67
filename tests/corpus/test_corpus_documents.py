"""Windows of one document each are those of the tokenizer with truncation and padding."""

import json

import numpy as np
import pytest
from tokenizers import processors
from trained_tokenizers import word_pieces
from transformers import PreTrainedTokenizerFast

from sparselogits.corpus import PackedCorpus, Packing, open_source, pack, packing_for
from sparselogits.errors import CorpusError, InvalidArgumentError

LENGTH, VOCAB = 24, 600


@pytest.fixture(scope="module")
def bert():
    backend = word_pieces()
    ends = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **marks)


@pytest.fixture
def texts(stories, bert):
    """Documents of 1 to many windows, and of every length around one and two full windows."""
    words = [word for word in " ".join(stories).split() if len(bert.tokenize(word)) == 1]
    lengths = [n * (LENGTH - 2) + more for n in (1, 2) for more in (-2, -1, 0, 1, 2)]
    return [*stories[:40], *(" ".join(words[:length]) for length in lengths), words[0]]


def write(texts, path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def packed(
    tokenizer, data, folder, *, part_bytes=1 << 20, tokenized=False, join_rows=False, **options
):
    packing = packing_for(
        tokenizer, **{"window_length": LENGTH, "kind": "documents", "holdout": 0.0} | options
    )
    by = tokenizer if tokenized else None
    source = open_source(str(data), tokenized_by=by, join_rows=join_rows)
    return pack(source, tokenizer, packing, folder, vocab_size=VOCAB, part_bytes=part_bytes)


def rows(windows):
    return [window.tokens.tolist() for window in windows]


@pytest.mark.parametrize("part_bytes", [3000, 1 << 20])
def test_windows_are_those_of_the_tokenizer(bert, texts, tmp_path, part_bytes):
    corpus = packed(bert, write(texts, tmp_path / "t.jsonl"), tmp_path / "p", part_bytes=part_bytes)
    assert (len(list((tmp_path / "p/training").iterdir())) > 1) == (part_bytes == 3000)
    expected = bert(
        texts,
        truncation=True,
        max_length=LENGTH,
        return_overflowing_tokens=True,
        padding="max_length",
    )
    windows = corpus.read(0, corpus.windows)
    assert rows(windows) == expected["input_ids"]
    before = -1
    for window, mask, document in zip(
        windows, expected["attention_mask"], expected["overflow_to_sample_mapping"], strict=True
    ):
        assert window.text_length == sum(mask)
        last = document != before
        before = document
        starts = ([0] if last else []) + ([sum(mask)] if sum(mask) < LENGTH else [])
        assert window.document_starts.tolist() == starts
        assert window.learnt is not None
        assert not window.learnt[sum(mask) :].any()
        assert window.learnt[1 : sum(mask) - 1].all()
        assert not window.learnt[0]
    assert corpus.summary.documents == len(texts)
    assert corpus.summary.tokens == corpus.windows * LENGTH


def test_a_document_that_spans_parts_loses_no_token(bert, stories, tmp_path):
    text = "\n".join(stories * 4)
    (tmp_path / "long.txt").write_text(text)
    corpus = packed(bert, tmp_path / "long.txt", tmp_path / "p", part_bytes=70_000, holdout=0.2)
    assert len(list((tmp_path / "p/training").iterdir())) > 1
    windows = corpus.read(0, corpus.windows) + corpus.read_holdout(0, corpus.holdout_windows)
    found = [i for window in windows for i in window.tokens[1 : window.text_length - 1].tolist()]
    whole = bert.encode(text, add_special_tokens=False)
    dropped = corpus.summary.dropped_tokens // LENGTH
    assert dropped == 1  # the gap between the two sides
    held = sum(w.text_length - 2 for w in windows[corpus.windows :])
    kept = len(found) - held
    assert found[:kept] == whole[:kept]
    assert found[kept:] == whole[-held:]
    for window in windows:
        assert window.tokens[0] == bert.cls_token_id
        assert window.tokens[window.text_length - 1] == bert.sep_token_id


def test_a_hold_out_has_whole_documents(bert, stories, tmp_path):
    data = write(stories, tmp_path / "t.jsonl")
    whole = packed(bert, data, tmp_path / "whole")
    divided = packed(bert, data, tmp_path / "divided", holdout=0.1, part_bytes=3000)
    assert divided.summary.holdout_rule == "documents"
    sides = divided.read(0, divided.windows) + divided.read_holdout(0, divided.holdout_windows)
    dropped = divided.summary.holdout_dropped_tokens // LENGTH
    assert len(sides) + dropped == whole.windows
    every = {tuple(row) for row in rows(whole.read(0, whole.windows))}
    assert {tuple(row) for row in rows(sides)} <= every


def test_the_separator_of_a_cut_document_has_no_target(tokenizer, tmp_path):
    """A causal model must not learn to end a text where a window ends."""
    ids = tokenizer.encode("one two three four five six seven eight")
    data = write(["one two three four five six seven eight"], tmp_path / "t.jsonl")
    length = len(ids) // 2 + 3
    corpus = packed(tokenizer, data, tmp_path / "p", window_length=length)
    end, room = tokenizer.eos_token_id, length - 1
    first, second = corpus.read(0, 2)
    assert first.tokens.tolist() == [*ids[:room], end]
    rest = len(ids) - room
    assert second.tokens.tolist() == [*ids[room:], *[end] * (length - rest)]  # no padding token
    assert first.mask.tolist() == [True] * (room - 1) + [False, False]
    assert second.mask.tolist() == [True] * rest + [False] * (length - rest)
    assert second.text_length == rest + 1


def test_rows_of_token_ids_are_padded_with_the_padding_token(bert, tmp_path):
    sizes = (3, LENGTH, 10)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [9] * n}) + "\n" for n in sizes))
    corpus = packed(bert, data, tmp_path / "p", tokenized=True)
    for window, size in zip(corpus.read(0, corpus.windows), sizes, strict=True):
        assert window.tokens.tolist() == [9] * size + [bert.pad_token_id] * (LENGTH - size)
        assert window.text_length == size
    with pytest.raises(InvalidArgumentError, match="joined rows are no documents"):
        packed(bert, data, tmp_path / "q", tokenized=True, join_rows=True)
    data.write_text(json.dumps({"input_ids": [9] * 6, "position_ids": [0, 1, 2, 0, 1, 2]}) + "\n")
    with pytest.raises(CorpusError, match="2 documents"):
        packed(bert, data, tmp_path / "r", tokenized=True)


def test_the_packing_uses_the_tokens_that_the_tokenizer_adds(bert, tokenizer):
    found = packing_for(bert, window_length=LENGTH, kind="documents")
    special = (bert.sep_token_id, bert.cls_token_id, bert.pad_token_id)
    assert (found.separator_id, found.bos_id, found.padding_id) == special
    # ModernBERT's tokenizer has a token named <|endoftext|>, which ends none of its texts
    with_end = PreTrainedTokenizerFast(tokenizer_object=bert.backend_tokenizer, sep_token="[SEP]")
    with_end.add_tokens(["<|endoftext|>"], special_tokens=True)
    for kind in ("joined", "documents"):
        packing = packing_for(with_end, window_length=LENGTH, kind=kind)
        assert packing.separator_id == bert.sep_token_id
    assert packing_for(tokenizer, window_length=LENGTH, kind="documents").padding_id == 0


def test_a_padding_token_without_a_row_in_the_model_is_refused(bert, tmp_path):
    data = write(["one two three"], tmp_path / "t.jsonl")
    added = PreTrainedTokenizerFast(tokenizer_object=bert.backend_tokenizer, sep_token="[SEP]")
    added.add_special_tokens({"pad_token": "<added>"})
    packing = packing_for(added, window_length=LENGTH, kind="documents")
    own = added.pad_token_id
    with pytest.raises(CorpusError, match=f"padding_id={own} .* remove the padding token"):
        pack(open_source(str(data)), added, packing, tmp_path / "p", vocab_size=own)
    added.pad_token = None
    packing = packing_for(added, window_length=LENGTH, kind="documents")
    corpus = pack(open_source(str(data)), added, packing, tmp_path / "p", vocab_size=own)
    assert corpus.packing.padding_id == bert.sep_token_id


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "lines"}, "packing kind 'lines'"),
        ({"kind": "documents"}, "padding_id=None"),
        ({"padding_id": 1}, "padding_id=1"),
        ({"kind": "documents", "padding_id": 1, "window_length": 2}, "at least 3"),
        ({"kind": "documents", "padding_id": 1, "reset_attention": True}, "reset_attention"),
        ({"kind": "documents", "padding_id": -1}, "padding_id is -1; expected .* at least 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings, said):
    with pytest.raises(InvalidArgumentError, match=said):
        Packing(**{"window_length": 8, "separator_id": 0, "bos_id": 5} | settings)


def test_identities_of_joined_windows_are_unchanged():
    assert set(Packing(8, 0, None).to_json()) == {
        *("window_length", "separator_id", "bos_id", "reset_attention", "holdout"),
    }


def test_a_packed_corpus_is_opened_again(bert, texts, tmp_path):
    data = write(texts, tmp_path / "t.jsonl")
    corpus = packed(bert, data, tmp_path / "p")
    again = PackedCorpus.open(tmp_path / "p")
    assert again.packing == corpus.packing
    assert np.array_equal(again.read(0, 1)[0].tokens, corpus.read(0, 1)[0].tokens)
