"""Test separators, beginning-of-text tokens, and the fingerprint of a tokenizer."""

import pickle

import pytest
from tokenizers import AddedToken, Regex, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from trained_tokenizers import END, train_byte_level
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sparselogits.corpus import packing_for, tokenizer_fingerprint, tokenizing
from sparselogits.corpus.pieces import Piece
from sparselogits.corpus.tokenizing import Encoder
from sparselogits.errors import CorpusError, InvalidArgumentError


def adds(template: str) -> PreTrainedTokenizerFast:
    backend = train_byte_level(300)
    for name in ("<s>", "<sop>", "</s>"):
        backend.add_special_tokens([AddedToken(name, special=True)])
    ids = [(name, backend.token_to_id(name)) for name in ("<s>", "<sop>", "</s>")]
    backend.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("template", "adds_bos"),
    [("$A", False), ("<s> $A", True), ("<s> $A </s>", True), ("$A </s>", False)],
)
def test_a_bos_only_where_the_tokenizer_adds_one(template, adds_bos):
    tokenizer = adds(template)
    packing = packing_for(tokenizer, window_length=8)
    assert packing.bos_id == (tokenizer.bos_token_id if adds_bos else None)


def test_two_leading_tokens_are_refused():
    with pytest.raises(CorpusError, match=r"adds 2 tokens before text.*of a Packing"):
        packing_for(adds("<s> <sop> $A"), window_length=8)


def chat_tokenizer(names: list[str], eos: str | None) -> PreTrainedTokenizerFast:
    backend = train_byte_level(300)
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        ("<|im_end|>", END),  # a chat model ends turns with its eos
        ("</s>", "</s>"),  # an eos that is an end of text by name
        (END, END),
        (None, END),
    ],
)
def test_the_separator(eos, expected):
    tokenizer = chat_tokenizer(["<|im_end|>", "</s>"], eos)
    packing = packing_for(tokenizer, window_length=8)
    assert packing.separator_id == tokenizer.convert_tokens_to_ids(expected)
    assert packing_for(tokenizer, window_length=8, separator_id=5).separator_id == 5


def test_no_separator_to_be_found(any_tokenizer):
    names = set(map(str, any_tokenizer.added_tokens_decoder.values()))
    if names & {END, "</s>"}:
        assert packing_for(any_tokenizer, window_length=8).separator_id is not None
    else:
        with pytest.raises(CorpusError, match="pass separator_id"):
            packing_for(any_tokenizer, window_length=8)


@pytest.mark.parametrize("options", [{"window_length": 1}, {"holdout": 1.0}, {"separator_id": -1}])
def test_impossible_packings(tokenizer, options):
    with pytest.raises(InvalidArgumentError):
        packing_for(tokenizer, **{"window_length": 8} | options)


def test_the_fingerprint_survives_saving_and_use(tokenizer, tmp_path):
    name = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == name
    loaded.pad_token = loaded.eos_token
    loaded("some text", truncation=True, max_length=2, padding="max_length")
    loaded.pad_token = None
    assert tokenizer_fingerprint(loaded) == name


def test_the_fingerprint_tells_tokenizers_apart(tokenizer):
    others = [
        chat_tokenizer([], END),
        chat_tokenizer(["<|im_end|>"], END),
        chat_tokenizer(["<|im_end|>"], "<|im_end|>"),
        PreTrainedTokenizerFast(tokenizer_object=train_byte_level(601), eos_token=END),
    ]
    assert len({tokenizer_fingerprint(each) for each in [tokenizer, *others]}) == 5


def test_an_encoder_pickles_and_ignores_the_state_of_the_last_call(tokenizer):
    tokenizer("some text", truncation=True, max_length=2)
    text = "some text that is longer than two tokens"
    piece = Piece(text, 0, len(text), 1, True, True, True, 0)
    encoder = Encoder(tokenizer)
    [(ids, _)] = encoder.encode([piece])
    assert tokenizer.decode(ids) == text
    [(again, _)] = pickle.loads(pickle.dumps(encoder)).encode([piece])
    assert ids.tolist() == again.tolist()


def test_special_tokens_in_text(tokenizer):
    text = f"a {END} b"
    piece = Piece(text, 0, len(text), 1, True, True, True, 0)
    assert 0 in Encoder(tokenizer).encode([piece])[0].ids
    tokenizer.split_special_tokens = True
    try:
        assert 0 not in Encoder(tokenizer).encode([piece])[0].ids
    finally:
        tokenizer.split_special_tokens = False


def test_a_tokenizer_that_is_not_compiled(tmp_path):
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    packing = packing_for(slow, window_length=8)
    assert (packing.bos_id, packing.separator_id) == (None, slow.eos_token_id)
    piece = Piece("before own after", 7, 10, 1, True, True, True, 0)
    assert slow.decode(Encoder(slow).encode([piece])[0].ids) == "own"
    slow.save_pretrained(tmp_path)
    loaded = ByT5Tokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(slow)
    assert tokenizer_fingerprint(ByT5Tokenizer(extra_ids=5)) != tokenizer_fingerprint(slow)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", r"failed .* on a batch of 1 texts.*'aaaaaa"),
        ("aaaaaaaaaaaaaaaaaaaa! " * 120, "did not finish within 1 s"),
    ],
    ids=["panics", "takes long"],
)
def test_an_expression_that_backtracks(monkeypatch, text, said):
    """A tokenizer is a stranger's file; its expressions run in compiled code."""
    monkeypatch.setattr(tokenizing, "BATCH_SECONDS", 1)
    backend = train_byte_level()
    splits = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([splits, backend.pre_tokenizer])
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    pieces = [Piece(t, 0, len(t), 1, True, True, True, 0) for t in ("fine", text)]
    with pytest.raises(CorpusError, match=said):
        encoder.encode(pieces)
    assert len(encoder.encode(pieces[:1])[0].ids)
