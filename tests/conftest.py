"""Provide a tiny teacher, its tokenizer, a small text, a cache and S3 servers for all tests.

Run all tests with `make test`, or the tests of one folder with `pytest tests/FOLDER`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.store.s3 import S3, Proxy, S3Server

torch.set_num_threads(1)

VOCABULARY = 512
PADDED_VOCABULARY = 520  # includes rows of the head without a token, as in many models


def documents() -> list[str]:
    """Return real documents: pages of Python's language reference."""
    return [topics[name] for name in sorted(topics)[:24]]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the documents."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(documents(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """Return a Llama with random weights; `changes` are fields of its configuration."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": PADDED_VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.12,  # logits with some contrast
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: object) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": page}) + "\n" for page in documents()))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, text: Path) -> Path:
    """Build a small cache to train from: windows of 32 tokens, 12 systematic rounds."""
    folder = tmp_path_factory.mktemp("caches")
    short = folder / "short.jsonl"
    short.write_text("".join(line for line in text.open() if len(line) < 4000))
    subprocess.run(
        [
            *(sys.executable, "-m", "sparselogits", "cache", "--device", "cpu"),
            *("--teacher", str(teacher_folder), "--data", str(short)),
            *("--out", str(folder / "cache"), "--window", "32", "--rounds", "12"),
            *("--holdout", "0.2"),
        ],
        check=True,
    )
    return folder / "cache"


@pytest.fixture(scope="session")
def second_teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: object) -> Path:
    """A teacher with the same tokenizer whose head has other padding."""
    folder = tmp_path_factory.mktemp("second")
    tiny_llama(seed=1, vocab_size=PADDED_VOCABULARY + 8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def second_cache(cache: Path, second_teacher: Path, tokenizer: object) -> Path:
    """The text of the small cache, read by the second teacher: 15 systematic rounds."""
    from sparselogits.caching import CacheRequest, build_caches
    from sparselogits.corpus import PackedCorpus, tokenizer_fingerprint
    from sparselogits.samplers import Systematic
    from sparselogits.teacher import load_teacher

    folder = cache.parent / "second"
    build_caches(
        load_teacher(str(second_teacher), tokenizer=tokenizer),
        PackedCorpus.open(cache / "corpus"),
        [CacheRequest(folder, Systematic(15), seed=1)],
        tokenizer_hash=tokenizer_fingerprint(tokenizer),
        windows_per_shard=64,
    )
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3:
    return S3.reached(s3_server, monkeypatch.setenv)


@pytest.fixture
def shaky_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Provide a bucket behind a proxy that fails the requests that a test selects."""
    proxy = Proxy(s3_server.port)
    yield S3.reached(s3_server, monkeypatch.setenv, proxy)
    proxy.stop()


REPOSITORY = "https://github.com/someone/sparselogits"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation as `make docs` does in a clone of `REPOSITORY`."""
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("documentation")
    for name in ("docs", "src", "overrides"):
        shutil.copytree(root / name, folder / name)
    shutil.copy(root / "mkdocs.yml", folder)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"REPOSITORY_URL": REPOSITORY},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"
