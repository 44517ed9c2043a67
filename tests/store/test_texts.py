"""Test that a cache has one text per window, and that only complete texts are published."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from sparselogits import files
from sparselogits.errors import (
    CacheCorruptionError,
    CacheError,
    IdentityMismatchError,
    InvalidArgumentError,
    StorageError,
)
from sparselogits.identity import label_of
from sparselogits.locks import lock_file
from sparselogits.store import Cache, merge, push, repair, verify
from sparselogits.store.shard.writer import encode_shard
from sparselogits.store.storage.local import LocalStorage
from sparselogits.store.texts import TextSpan, claim_text, named_texts
from tests.store.draws import identity, records

A, B = TextSpan("a" * 64, 0, 40), TextSpan("b" * 64, 0, 40)
MORE = TextSpan("c" * 64, 40, 20)


def build(root: Path, text: TextSpan | None, *starts: int, claim: bool = True) -> Cache:
    cache = Cache.create(root, identity())
    if text is not None and claim:
        claim_text(cache.storage, text)
    for start in starts:
        provenance = {} if text is None else {"corpus": text.fingerprint, "text": text.to_json()}
        # the rows' own fingerprint is another matter, and compared by verify where it is told
        provenance.pop("corpus", None)
        cache.commit(records("counts", start, start + 20), provenance)
    return cache


def test_a_text_is_claimed_once(tmp_path):
    storage = LocalStorage(tmp_path)
    claim_text(storage, A)
    claim_text(storage, A)
    claim_text(storage, MORE)
    for other in (B, TextSpan("d" * 64, 39, 5), TextSpan("d" * 64, 50, None)):
        with pytest.raises(IdentityMismatchError, match=r"begun with other text.*choose another"):
            claim_text(storage, other)
    assert named_texts(storage) == [A, MORE]


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"[1]", b'{"fingerprint":"x"}'])
def test_a_damaged_claim_is_named(tmp_path, content):
    storage = LocalStorage(tmp_path)
    storage.create("texts/windows-000000000000.json", content)
    with pytest.raises(CacheCorruptionError, match=r"windows-0+.json is damaged.*delete it"):
        claim_text(storage, A)


def test_a_mixture_does_not_verify(tmp_path):
    cache = build(tmp_path / "a", A, 0)
    other = build(tmp_path / "b", B, 20)
    [shard] = (tmp_path / "b/shards").iterdir()
    shutil.copy(shard, tmp_path / "a/shards")
    report = verify(cache)
    assert [found.windows for found in report.damaged] == [(20, 40)]
    assert "text bbbbbbbbbbbb (windows 0:40), which the cache does not record" in str(
        report.damaged[0].error
    )
    assert not verify(other, sample=0).damaged
    assert repair(cache).rebuild == ((20, 40),)
    assert verify(cache).ok


def test_a_mixture_without_names_does_not_verify(tmp_path):
    cache = build(tmp_path / "a", A, 0, claim=False)
    build(tmp_path / "b", B, 20)
    [shard] = (tmp_path / "b/shards").iterdir()
    shutil.copy(shard, tmp_path / "a/shards")
    [damaged] = verify(cache).damaged
    assert "other shards from text aaaaaaaaaaaa" in str(damaged.error)
    assert repair(cache).set_aside[0][0].endswith("windows-000000000020-000000000040.parquet")


def test_a_shard_outside_its_own_text(tmp_path):
    short = TextSpan("a" * 64, 0, 10)
    [damaged] = verify(build(tmp_path, short, 0)).damaged
    assert "are not in the shard's text" in str(damaged.error)


def test_the_packed_text_at_hand_is_compared(tmp_path):
    """Also in caches from before texts were named."""
    cache = Cache.create(tmp_path, identity())
    cache.commit(records("counts", 0, 20), {"corpus": "e" * 64})
    [damaged] = verify(cache, sample=1, text_of=lambda _: "f" * 64).damaged
    assert "other text than the packed text" in str(damaged.error)
    assert verify(cache, sample=1, text_of=lambda _: "e" * 64).ok
    assert verify(cache, sample=1, text_of=lambda _: None).ok


def test_caches_of_before_are_read_and_go_on(tmp_path):
    cache = build(tmp_path, None, 0)
    claim_text(cache.storage, A)
    build(tmp_path, A, 20)
    assert verify(cache).ok


def test_texts_apart_are_not_merged(tmp_path):
    one, two = build(tmp_path / "a", A, 0), build(tmp_path / "b", B, 20)
    for sources in ([one, two], [two, one]):
        with pytest.raises(IdentityMismatchError, match="different texts cannot be merged"):
            merge(sources, tmp_path / "m")
        assert not (tmp_path / "m").exists()
    merge([one], tmp_path / "m")
    with pytest.raises(IdentityMismatchError, match="begun with other text"):
        merge([two], tmp_path / "m")
    assert merge([build(tmp_path / "c", MORE, 40)], tmp_path / "m").copied == ((40, 60),)
    merged = Cache.open(tmp_path / "m")
    assert named_texts(merged.storage) == [A, MORE]
    assert verify(merged, stop=20).ok


def test_one_range_of_two_texts_is_not_merged(tmp_path):
    """Shards from before texts were named have the fingerprint of their own piece."""
    caches = []
    for name in "ab":
        cache = Cache.create(tmp_path / name, identity())
        cache.commit(records("counts", 0, 20), {"corpus": name * 64})
        caches.append(cache)
    with pytest.raises(IdentityMismatchError, match="different text"):
        merge(caches, tmp_path / "m")


class PlainFiles(LocalFileSystem):
    """A store without atomic puts: what is written appears as it is written."""

    protocol = "plain"
    cachable = False
    room = 1 << 40

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(path.removeprefix("plain://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        target = Path(self._strip_protocol(path))
        room, PlainFiles.room = PlainFiles.room, PlainFiles.room - len(value)
        target.write_bytes(value[: max(0, room)])
        if room < len(value):
            raise OSError(errno.EIO, "connection lost")


class WithoutRename(PlainFiles):
    protocol = "bare"
    mv = AbstractFileSystem.mv

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return LocalFileSystem._strip_protocol(path.removeprefix("bare://"))


@pytest.fixture(params=[PlainFiles, WithoutRename])
def plain(request, tmp_path) -> str:
    fsspec.register_implementation(request.param.protocol, request.param, clobber=True)
    PlainFiles.room = 1 << 40
    return f"{request.param.protocol}://{tmp_path}/pushed"


def test_a_put_that_breaks_off_leaves_nothing(tmp_path, plain):
    cache = build(tmp_path / "c", A, 0, 20)
    for room in (10, 3000, 9000, 20_000):
        PlainFiles.room = room
        with pytest.raises(StorageError, match="connection lost"):
            push(cache, plain)
        for path in (tmp_path / "pushed").rglob("*.parquet"):
            assert path.read_bytes() == (tmp_path / "c/shards" / path.name).read_bytes()
        shutil.rmtree(tmp_path / "pushed")
    PlainFiles.room = 1 << 40
    push(cache, plain)
    assert verify(Cache.open(tmp_path / "pushed"), stop=40).ok


@pytest.mark.parametrize("scheme", ["memory", "file", "plain"])
def test_half_a_shard_under_its_name_is_not_taken_for_one(tmp_path, scheme):
    fsspec.register_implementation("plain", PlainFiles, clobber=True)
    PlainFiles.room = 1 << 40
    url = f"{scheme}://{tmp_path}/pushed"
    cache = build(tmp_path / "c", A, 0, 20)
    push(cache, url)
    name = "shards/windows-000000000000-000000000020.parquet"
    there = Cache.open(url).storage
    whole = there.read(name)
    for bad in (whole[: len(whole) // 2], whole[:-1], whole[:999] + b"?" + whole[1000:], b""):
        if scheme == "memory":
            fsspec.filesystem("memory").pipe_file(f"{tmp_path}/pushed/{name}", bad)
        else:
            (tmp_path / "pushed" / name).write_bytes(bad)
        report = push(cache, url)
        if len(bad) == len(whole) and scheme != "file":  # pages are verified in local folders only
            assert repair(Cache.open(url)).set_aside
            report = push(cache, url)
        else:
            assert [before for before, _ in report.set_aside] == [name]
        assert report.copied == ((0, 20),)
        assert there.read(name) == whole


def test_a_shard_from_another_machine_stays(tmp_path):
    """It may differ in low bits; its targets are as good."""
    cache = build(tmp_path / "c", A, 0)
    other = Cache.create(tmp_path / "there", identity())
    name, data = encode_shard(
        identity(), records("counts", 0, 20), {"text": A.to_json(), "device": "another"}
    )
    other.storage.create(name, data)
    assert push(cache, f"file://{tmp_path}/there").kept == ((0, 20),)
    assert (tmp_path / "there" / name).read_bytes() == data


@pytest.mark.parametrize("what", ["cache.json", "shards", "shard", "texts", "text"])
def test_links_are_not_followed(tmp_path, what):
    cache = build(tmp_path / "c", A, 0)
    path = {
        "shard": "shards/windows-000000000000-000000000020.parquet",
        "text": "texts/windows-000000000000.json",
    }.get(what, what)
    (tmp_path / "c" / path).rename(tmp_path / "elsewhere")
    (tmp_path / "c" / path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgumentError, match=r"is a symbolic link.*cp -L"):
        push(cache, f"memory://{tmp_path.name}/x")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0a1b/", "org/name"),
        ("C:\\Users\\me\\model", "model"),
        ("~/secret/model.gguf", "model.gguf"),
        ("org/name:config", "org/name:config"),
        ("gpt2", "gpt2"),
        ("/", "unnamed"),
        ("..", "unnamed"),
    ],
)
def test_labels_have_no_folders(name, label):
    assert label_of(name) == label


def test_no_path_of_the_teacher_is_written(tmp_path):
    teacher = {"name": "/home/me/secret-project/teacher", "weights": "0" * 64}
    Cache.create(tmp_path, identity(teacher=teacher))
    for name in ("cache.json", "README.md"):
        assert "secret-project" not in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "cache.json").read_text())["identity"]["teacher"]["name"] == (
        "teacher"
    )


@pytest.fixture
def no_links(monkeypatch) -> None:
    """As exFAT and SMB answer."""

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.os, "link", link)


@pytest.mark.usefixtures("no_links")
def test_repair_without_hard_links(tmp_path):
    cache = build(tmp_path, TextSpan("a" * 64, 0, 60), 0, 20, 40)
    paths = sorted((tmp_path / "shards").iterdir())
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:-5])
    found = repair(cache)
    assert len(found.set_aside) == 2
    assert found.rebuild == ((0, 20), (20, 40))
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == [p.name for p in paths[:2]]
    assert not cache.storage.create(f"shards/{paths[2].name}", b"other")
    build(tmp_path, TextSpan("a" * 64, 0, 60), 0, 20)
    assert verify(cache).ok


@pytest.mark.parametrize("what", ["folder", "pipe", "link to nothing", "link to a folder"])
def test_repair_sets_anything_aside(tmp_path, what):
    cache = build(tmp_path / "c", A, 0, 20)
    path = tmp_path / "c/shards/windows-000000000000-000000000020.parquet"
    path.unlink()
    if what == "folder":
        path.mkdir()
        (path / "file").write_text("kept")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere" if what == "link to nothing" else tmp_path)
    assert len(repair(cache).set_aside) == 1
    assert not os.path.lexists(path)
    assert len(list((tmp_path / "c/damaged").iterdir())) == 1
    build(tmp_path / "c", A, 0)
    assert verify(cache).ok


def test_a_second_repair_is_told_so(tmp_path):
    cache = build(tmp_path, A, 0)
    with (
        lock_file(tmp_path / ".repair.lock"),
        pytest.raises(CacheError, match="another process is repairing"),
    ):
        repair(cache)
    assert repair(cache).set_aside == ()
    assert not (tmp_path / ".repair.lock").exists()


def test_what_was_rebuilt_meanwhile_stays(tmp_path):
    cache = build(tmp_path, A, 0)
    path = tmp_path / "shards/windows-000000000000-000000000020.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    report = verify(cache)
    path.write_bytes(whole)
    found = repair(cache, report)
    assert (found.set_aside, found.rebuild) == ((), ())
    assert path.exists()
