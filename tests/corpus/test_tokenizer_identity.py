"""Test that tokenizers are compared by what their ids mean.

A cache of an instruct model trains a student with the tokenizer of the base model; a student whose
ids mean other tokens is rejected.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from tests.conftest import documents
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sparselogits.corpus import require_tokenizer, tokenizer_fingerprint
from sparselogits.errors import IdentityMismatchError, SparseLogitsWarning

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(size: int = 400) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(documents()[:2], trainer)
    return backend


@cache
def trained_unigram() -> str:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(documents()[:2], trainer)
    return backend.to_str()


def unigram() -> Tokenizer:
    """Train once: the order of its pieces differs from one training to the next."""
    return Tokenizer.from_str(trained_unigram())


BACKENDS = {"byte level": byte_level, "unigram": unigram}


def wrapped(backend: Tokenizer, eos: str = "<|im_end|>", **roles: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **roles)


def with_post_processor(backend: Tokenizer) -> Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return backend


SAME: dict[str, Callable[[Callable[[], Tokenizer]], PreTrainedTokenizerFast]] = {
    "end of text": lambda make: wrapped(make(), "<|endoftext|>"),
    "padding": lambda make: wrapped(make(), pad_token="<|im_end|>"),
    "padding side": lambda make: wrapped(make(), padding_side="left"),
    "template": lambda make: wrapped(make(), chat_template="{{ messages }}"),
    "a token put before text": lambda make: wrapped(with_post_processor(make())),
    "beginning of text": lambda make: wrapped(make(), bos_token="<|im_start|>"),
}


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize("backend", BACKENDS)
def test_roles_template_and_padding_may_differ(backend, change):
    make = BACKENDS[backend]
    teacher, student = wrapped(make()), SAME[change](make)
    made = tokenizer_fingerprint(teacher)
    text = "Assignment statements are used to (re)bind names"
    plain = {"add_special_tokens": False}
    assert teacher.encode(text, **plain) == student.encode(text, **plain)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        require_tokenizer(student, str(made), made.record())
    told = [str(w.message) for w in said if issubclass(w.category, SparseLogitsWarning)]
    if teacher.special_tokens_map != student.special_tokens_map:
        assert len(told) == 1
        assert "differs in" in told[0]
    else:
        assert not told


def test_a_note_names_what_differs():
    made = tokenizer_fingerprint(wrapped(byte_level()))
    base = wrapped(byte_level(), "<|endoftext|>", pad_token="<|endoftext|>")
    said = r"eos is '<\|endoftext\|>' here and '<\|im_end\|>' in the cache, pad is .* and None in"
    with pytest.warns(SparseLogitsWarning, match=said):
        require_tokenizer(base, str(made), made.record())


def lower_case(backend: Tokenizer) -> Tokenizer:
    backend.normalizer = normalizers.Lowercase()
    return backend


def split_at_digits(backend: Tokenizer) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    return backend


def added(backend: Tokenizer, *tokens: str) -> Tokenizer:
    backend.add_tokens(list(tokens))
    return backend


OTHER: dict[str, Callable[[], Any]] = {
    "vocabulary": lambda: wrapped(byte_level(401)),
    "normaliser": lambda: wrapped(lower_case(byte_level())),
    "pre-tokenizer": lambda: wrapped(split_at_digits(byte_level())),
    "other added token": lambda: wrapped(added(byte_level(), "<other>")),
    "kind": lambda: wrapped(unigram()),
    "not compiled": ByT5Tokenizer,
}


@pytest.mark.parametrize("change", OTHER)
def test_ids_that_mean_other_tokens_are_refused(change):
    made = tokenizer_fingerprint(wrapped(added(byte_level(), "<tool>")))
    other = OTHER[change]()
    with pytest.raises(IdentityMismatchError, match="ids mean other tokens") as refused:
        require_tokenizer(other, str(made), made.record())
    assert "--allow other-tokenizer" in str(refused.value)
    with pytest.warns(SparseLogitsWarning, match="ids mean other tokens"):
        require_tokenizer(other, str(made), made.record(), allow=["other-tokenizer"])


def test_added_tokens_that_one_of_them_lacks_are_a_note():
    """A teacher that was fine-tuned with more tokens, and a student that was."""
    plain, more = wrapped(byte_level()), wrapped(added(byte_level(), "<tool>", "<call>"))
    for teacher, student, where in ((more, plain, "in the cache"), (plain, more, "here")):
        made = tokenizer_fingerprint(teacher)
        said = f"2 added tokens are only {where}, as '<tool>'"
        with pytest.warns(SparseLogitsWarning, match=said):
            require_tokenizer(student, str(made), made.record())


def test_thousands_of_added_tokens_are_recorded_as_a_hash():
    many = wrapped(added(byte_level(), *(f"<unused{i}>" for i in range(3000))))
    made = tokenizer_fingerprint(many)
    assert len(str(made.record())) < 500
    base = wrapped(many.backend_tokenizer, "<|endoftext|>")
    with pytest.warns(SparseLogitsWarning, match="eos is"):
        require_tokenizer(base, str(made), made.record())
    with pytest.raises(IdentityMismatchError, match="added tokens differ"):
        require_tokenizer(wrapped(byte_level()), str(made), made.record())


def test_a_cache_that_records_no_meaning_knows_its_own_tokenizer_only():
    made = tokenizer_fingerprint(wrapped(byte_level()))
    require_tokenizer(wrapped(byte_level()), str(made), None)
    for recorded in (None, {}, "forged", {"ids": 5, "roles": []}):
        with pytest.raises(IdentityMismatchError):
            require_tokenizer(wrapped(byte_level(), "<|endoftext|>"), str(made), recorded)


def test_a_fingerprint_is_a_plain_string_that_copies_and_pickles():
    made = tokenizer_fingerprint(wrapped(byte_level()))
    assert type(str(made)) is str
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert again == made
        assert again.record() == made.record()
