"""Provide tokenizers and text for the tests of the corpus."""

import os
import random
from pathlib import Path

import pytest
from trained_tokenizers import END, FAMILIES, SAMPLE, train_byte_level
from transformers import PreTrainedTokenizerFast

import sparselogits


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Provide a byte-level BPE tokenizer like GPT-2's, with id 0 as the end of a text."""
    return PreTrainedTokenizerFast(tokenizer_object=train_byte_level(), eos_token=END)


@pytest.fixture
def stories() -> list[str]:
    """Provide 200 documents of a few hundred characters, some with unusual characters."""
    rng = random.Random(7)
    lines = [line for line in SAMPLE.splitlines() if line.strip()]
    odd = ["naïve café", "日本語のテキスト", "emoji 🙂🙃 row", "tabs\tand  spaces", "x" * 90]
    return [
        "\n".join([*rng.sample(lines, rng.randint(1, 9)), rng.choice(odd)]) + f"\n{number}\n"
        for number in range(200)
    ]


@pytest.fixture
def library_environment() -> dict[str, str]:
    """Provide the environment of child processes, which must import the package under test."""
    source = str(Path(sparselogits.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session", params=FAMILIES)
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    """Provide a tokenizer of each family."""
    return PreTrainedTokenizerFast(tokenizer_object=FAMILIES[request.param]())
