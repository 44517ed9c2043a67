"""Test the commands on a cache in an object store: the same bytes as in a folder."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparselogits.caching import fetch_texts, publish_text
from sparselogits.cli import app
from sparselogits.corpus.streams import part_name
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.identity import canonical_json
from sparselogits.store import Cache
from sparselogits.store.storage.location import storage_at
from tests.conftest import files_of


def command(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def published(cache: Path) -> dict[str, bytes]:
    """Files of a cache in a folder that one in a bucket has too: all but the teacher's tokenizer.

    The tokenizer stays on the machine that the cache was made on, as `push` leaves it there.
    """
    there = files_of(cache)
    own = {name for name in there if name.startswith("tokenizer/")}
    assert own == {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    return {name: content for name, content in there.items() if name not in own}


@pytest.mark.slow
def test_the_whole_way_in_a_bucket(tmp_path, teacher_folder, short, s3, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    words = ("cache", "--teacher", teacher_folder, "--data", short, "--window", 32)
    words = (*words, "--holdout", 0.2, "--rounds", 20, "--windows-per-shard", 16)
    folder = tmp_path / "cache"
    command(*words, "--out", folder)

    command(*words, "--out", s3.url, "--windows", "0:32", "--work", tmp_path / "one")
    assert len(Cache.open(s3.url).finished()) == 2
    built = (*words, "--out", s3.url, "--work", tmp_path / "another machine's")
    told = CliRunner().invoke(app, [str(word) for word in built], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    assert f"--student-config tiny --tokenizer {teacher_folder} --out my-run" in told.stderr
    assert s3.objects() == published(folder)
    packed = [files_of(path) for path in tmp_path.glob("*/*/corpus")]
    assert packed == [files_of(folder / "corpus")] * 2

    assert json.loads(command("info", s3.url, "--json"))["path"] == s3.url
    assert "none of them damaged" in command("verify", s3.url)
    assert "nothing to repair" in command("repair", s3.url)
    command("merge", s3.url, "--out", f"{s3.url}-merged")
    assert Cache.open(f"{s3.url}-merged").finished() == Cache.open(folder).finished()
    command("export", s3.url, "--out", tmp_path / "lists")

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"cache: {s3.url}\nout: {tmp_path / 'run'}\n"
        "per_device_train_batch_size: 16\nlogging_steps: 1\n"
        f"student: {{hidden_size: 16, layers: 1, heads: 2}}\ntokenizer: {teacher_folder}\n"
    )
    train = ("train", recipe, "--device", "cpu", "--json")
    from_bucket = json.loads(command(*train))["curve"]
    local = ("--cache", folder, "--out", tmp_path / "local-run")
    assert from_bucket == json.loads(command(*train, *local))["curve"]
    found = json.loads(command("eval", tmp_path / "run", "--cache", s3.url, "--limit", 2, "--json"))
    assert found["student"]["loss"] > 0
    assert {p.name for p in (tmp_path / "home/sparselogits").iterdir()} == {"copy", "work"}


def pretend_corpus(folder: Path, content: bytes) -> None:
    for name in ("corpus.json", "frequencies.parquet", "index.json", f"training/{part_name(0)}"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "corpus.json":
            source = {"fingerprint": content.decode(), "name": "pages.jsonl"}
            path.write_bytes(canonical_json({"source": source}))
        else:
            path.write_bytes(name.encode() + content)


def test_packed_texts_are_put_once_and_fetched_whole(tmp_path, s3):
    folder = fetch_texts(s3.url, tmp_path / "a")
    assert not folder.exists()
    for text in ("corpus", "corpus-0001"):
        pretend_corpus(folder / text, b"1")
        publish_text(s3.url, folder / text)
    before = s3.objects()
    assert before == files_of(folder)
    publish_text(s3.url, folder / "corpus")
    assert s3.objects() == before
    assert files_of(fetch_texts(s3.url, tmp_path / "b")) == files_of(folder)
    shutil.rmtree(folder)
    pretend_corpus(folder / "corpus-0001", b"2")
    with pytest.raises(IdentityMismatchError, match=r"corpus-0001/corpus\.json"):
        publish_text(s3.url, folder / "corpus-0001")
    assert s3.objects() == before


def test_a_text_without_its_index_is_not_fetched(tmp_path, s3):
    folder = fetch_texts(s3.url, tmp_path / "a")
    pretend_corpus(folder / "corpus", b"1")
    publish_text(s3.url, folder / "corpus")
    storage_at(s3.url).move("corpus/index.json", "elsewhere")
    assert not fetch_texts(s3.url, tmp_path / "b").exists()
    publish_text(s3.url, folder / "corpus")
    assert files_of(fetch_texts(s3.url, tmp_path / "b")) == files_of(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", r"corpus\.json is damaged \(found {}\); expected .* in `source`\. Delete it"),
        (b"[]", r"corpus\.json is damaged \(found \[\]\); expected a JSON object"),
        (b'{"source": "x"}', r"is damaged .*; expected .* in `source`\. Delete it"),
        (b'{"source": {}}', r"is damaged .*; expected .* in `source`\. Delete it"),
        (b"{", r"corpus\.json is damaged .*\. Delete it, then start the same"),
    ],
)
def test_a_damaged_description_of_a_text_is_named(tmp_path, content, message):
    url = f"memory://{tmp_path.name}/damaged"
    storage_at(url).create("corpus/corpus.json", content)
    with pytest.raises(CorpusError, match=message):
        fetch_texts(url, tmp_path)


def test_a_damaged_description_is_not_uploaded(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/corpus.json").write_bytes(b"{}")
    with pytest.raises(CorpusError, match=r"corpus\.json is damaged .* pack the text again"):
        publish_text(f"memory://{tmp_path.name}/upload", tmp_path / "corpus")


@pytest.mark.slow
def test_text_is_appended_from_another_machine(tmp_path, teacher_folder, short, s3):
    lines = list(short.open())
    texts = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for path, share in zip(texts, (lines[::2], lines[1::2]), strict=True):
        path.write_text("".join(share))
    words = ("cache", "--teacher", teacher_folder, "--window", 32, "--rounds", 20)
    for place in (tmp_path / "cache", s3.url):
        command(*words, "--data", texts[0], "--out", place, "--work", tmp_path / "one")
        command(
            *(*words, "--data", texts[1], "--out", place, "--append"),
            *("--work", tmp_path / "another"),
        )
    assert s3.objects() == published(tmp_path / "cache")
    assert "corpus-0001/index.json" in s3.objects()
