"""Tokenizers, and something to read."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from trained_tokenizers import END, FAMILIES, SAMPLE, train_byte_level
from transformers import PreTrainedTokenizerFast

import sparselogits


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2; id 0 ends a text."""
    return PreTrainedTokenizerFast(tokenizer_object=train_byte_level(), eos_token=END)


@pytest.fixture
def stories() -> list[str]:
    """Two hundred documents of a few hundred characters, some with odd characters in them."""
    rng = random.Random(7)
    lines = [line for line in SAMPLE.splitlines() if line.strip()]
    odd = ["naïve café", "日本語のテキスト", "emoji 🙂🙃 row", "tabs\tand  spaces", "x" * 90]
    return [
        "\n".join([*rng.sample(lines, rng.randint(1, 9)), rng.choice(odd)]) + f"\n{number}\n"
        for number in range(200)
    ]


@pytest.fixture
def library_environment() -> dict[str, str]:
    """For processes of our own, which must find the package that is under test."""
    source = str(Path(sparselogits.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session", params=FAMILIES)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer of each family."""
    return PreTrainedTokenizerFast(tokenizer_object=FAMILIES[request.param]())
