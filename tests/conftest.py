"""Provide a tiny teacher, its tokenizer, a small text, a cache and S3 servers for all tests.

Run all tests with `make test`, or the tests of one folder with `pytest tests/FOLDER`.
"""

import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.store.s3 import S3, Proxy, S3Server

torch.set_num_threads(1)

# a busy machine is not a failure: no limit of time per example, and none for making its input
settings.register_profile(
    "sparselogits", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("sparselogits")

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


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """Write rows as JSON lines, and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files_of(root: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder by relative path, temporary ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def write_package(
    folder: Path, module: str, code: str, group: str, points: Mapping[str, str]
) -> None:
    """Write a module and its entry points as pip installs them; `points` are classes by name."""
    facts = folder / f"{module}-1.0.dist-info"
    facts.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {module}:{kind}" for name, kind in points.items())]
    (facts / "entry_points.txt").write_text("\n".join(lines))


def run_python(
    *words: object, env: Mapping[str, str] | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run this Python in a process of one thread; `env` adds variables to those of this process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    done = subprocess.run([sys.executable, *map(str, words)], env=env, **options)
    assert not (check and done.returncode), f"{done.stdout}\n{done.stderr}"
    return done


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
def teacher_folder(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": page}) + "\n" for page in documents()))
    return path


@pytest.fixture(scope="session")
def short(text) -> Path:
    """Provide the documents of the small text that have fewer than 4 000 characters."""
    path = text.with_name("short.jsonl")
    path.write_text("".join(line for line in text.open() if len(line) < 4000))
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory, teacher_folder, short) -> Path:
    """Build a small cache to train from: windows of 32 tokens, 12 systematic rounds."""
    folder = tmp_path_factory.mktemp("caches")
    options = shlex.split("--device cpu --window 32 --rounds 12 --holdout 0.2")
    words = ["--teacher", teacher_folder, "--data", short, "--out", folder / "cache", *options]
    run_python("-m", "sparselogits", "cache", *words, check=True)
    return folder / "cache"


@pytest.fixture(scope="session")
def second_teacher(tmp_path_factory, tokenizer) -> Path:
    """A teacher with the same tokenizer whose head has other padding."""
    folder = tmp_path_factory.mktemp("second")
    tiny_llama(seed=1, vocab_size=PADDED_VOCABULARY + 8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def packed_text(tmp_path_factory, tokenizer, text) -> Callable[..., Any]:
    """Provide a function that packs the small text, once for equal settings."""
    from sparselogits.corpus import open_source, pack, packing_for

    @functools.cache
    def packed(window_length: int, **options: Any) -> Any:
        packing = packing_for(tokenizer, window_length=window_length, **options)
        folder = tmp_path_factory.mktemp("packed")
        return pack(open_source(text), tokenizer, packing, folder, vocab_size=PADDED_VOCABULARY)

    return packed


def build_cache(
    teacher: Any, corpus: Any, root: Path, sampler: Any, tokenizer: Any, **options: Any
) -> Path:
    """Build a cache in this process from a teacher or its folder; return the root of the cache."""
    from sparselogits.caching import CacheRequest, build_caches
    from sparselogits.corpus import tokenizer_fingerprint
    from sparselogits.teacher import load_teacher

    if isinstance(teacher, Path):
        teacher = load_teacher(str(teacher), tokenizer=tokenizer)
    requests = [CacheRequest(root, sampler, seed=options.pop("seed", 0))]
    fingerprint = tokenizer_fingerprint(tokenizer)
    build_caches(teacher, corpus, requests, tokenizer_hash=fingerprint, **options)
    return root


@pytest.fixture(scope="session")
def second_cache(cache, second_teacher, tokenizer) -> Path:
    """The text of the small cache, read by the second teacher: 15 systematic rounds."""
    from sparselogits.corpus import PackedCorpus
    from sparselogits.samplers import Systematic

    corpus, root = PackedCorpus.open(cache / "corpus"), cache.parent / "second"
    options = {"seed": 1, "windows_per_shard": 64}
    return build_cache(second_teacher, corpus, root, Systematic(15), tokenizer, **options)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Mount a file system of 64 KiB, which needs root."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> S3:
    return S3.reached(s3_server, monkeypatch.setenv)


@pytest.fixture
def shaky_s3(s3_server, monkeypatch) -> Iterator[S3]:
    """Provide a bucket behind a proxy that fails the requests that a test selects."""
    proxy = Proxy(s3_server.port)
    yield S3.reached(s3_server, monkeypatch.setenv, proxy)
    proxy.stop()


class Ended(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def line(capsys, monkeypatch) -> Callable[..., Ended]:
    """Provide the command line `sparselogits`, run in this process."""
    from sparselogits.cli import main

    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["sparselogits", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return Ended(int(stop.value.code or 0), said.out, said.err)

    return run


REPOSITORY = "https://github.com/someone/sparselogits"


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """Build the documentation as `make docs` does in a clone of `REPOSITORY`."""
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("documentation")
    for name in ("docs", "src", "overrides"):
        shutil.copytree(root / name, folder / name)
    shutil.copy(root / "mkdocs.yml", folder)
    built = run_python(
        "-m",
        "zensical",
        "build",
        "--clean",
        "--strict",
        cwd=folder,
        env={"REPOSITORY_URL": REPOSITORY},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"
