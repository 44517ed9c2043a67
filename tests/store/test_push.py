"""Test that a cache is pushed and loaded by name, as `hf://` and on other file systems.

The hub is a stand-in on this machine (tests/store/hub.py); its client is the real one.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from sparselogits import CacheDataset
from sparselogits.errors import (
    CacheCorruptionError,
    CacheError,
    IdentityMismatchError,
    InvalidArgumentError,
)
from sparselogits.store import Cache, CopyFolder, push
from tests.conftest import files_of, run_python
from tests.store.hub import Hub

NAME = "hf://datasets/org/name"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub("org/name")
    yield server
    server.stop()


@pytest.fixture
def url(tmp_path) -> Iterator[str]:
    """A place in memory, of this test alone."""
    place = f"memory://{tmp_path.name}/pushed"
    yield place
    files, root = fsspec.url_to_fs(place)
    if files.exists(root):
        files.rm(root, recursive=True)


def as_on_the_hub(hub: Hub, tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`python -m sparselogits ...`, or other Python, where the stand-in is the hub."""
    home = {"XDG_CACHE_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
    return run_python(*words, env={**hub.environment, **home, "COLUMNS": "200"})


LOAD = """
import sys
import torch
from sparselogits import CacheDataset
there, here = CacheDataset("hf://datasets/org/name"), CacheDataset(sys.argv[1])
assert there.identity == here.identity
assert len(there) == len(here)
for i in (0, len(here) - 1):
    assert torch.equal(there[i]["input_ids"], here[i]["input_ids"])
    assert torch.equal(there[i]["targets"].ids, here[i]["targets"].ids)
    assert torch.equal(there[i]["targets"].weights, here[i]["targets"].weights)
print("read by name")

from sparselogits.errors import StorageError
from sparselogits.store import Cache, push
try:
    push(Cache.open(sys.argv[1]), "hf://datasets/org/other")
except StorageError as error:
    print("repository does not exist" in str(error))
"""


def test_pushed_to_a_hub_and_loaded_back_by_name(tmp_path, cache, hub):
    pushed = as_on_the_hub(hub, tmp_path, "-m", "sparselogits", "push", cache, NAME)
    assert pushed.returncode == 0, pushed.stderr
    assert f'CacheDataset("{NAME}")' in pushed.stdout
    there, here = hub.files, files_of(cache)
    here = {n: d for n, d in here.items() if not n.startswith("tokenizer/")}  # it stays here
    assert there.keys() == here.keys()
    assert {n for n in there if there[n] != here[n]} == {"README.md"}
    statistics = Cache.open(cache).statistics()
    assert f"{statistics.entries_per_position:.2f}" in there["README.md"].decode()
    assert hub.commits == len(here) + 1  # a file a commit, the card twice

    loaded = as_on_the_hub(hub, tmp_path, "-c", LOAD, cache)
    assert loaded.stdout == "read by name\nTrue\n", loaded.stderr


def test_goes_on_where_it_stopped(tmp_path, cache, url):
    begun = tmp_path / "begun"
    shutil.copytree(cache, begun)
    shards = sorted((begun / "shards").iterdir())
    kept = shards[0].read_bytes()
    (begun / "shards" / "windows-000000009000-000000009512.parquet").write_bytes(b"")
    with pytest.raises(CacheCorruptionError):
        push(Cache.open(begun), url)  # as if stopped there: the first is over, nothing lost
    shards = sorted((cache / "shards").iterdir())
    report = push(Cache.open(cache), url)
    assert len(report.kept) == len(shards)
    assert not report.copied
    there = CacheDataset(url, copy=CopyFolder(tmp_path / "copy", 1 << 20))
    assert torch.equal(there[5]["targets"].ids, CacheDataset(cache)[5]["targets"].ids)
    assert fsspec.open(f"{url}/shards/{shards[0].name}").open().read() == kept


def test_what_is_refused(tmp_path, cache, url):
    with pytest.raises(InvalidArgumentError, match="is not a URL"):
        push(Cache.open(cache), str(tmp_path / "folder"))
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(cache / "cache.json", empty)
    with pytest.raises(CacheError, match="no finished shard"):
        push(Cache.open(empty), url)
    push(Cache.open(cache), url)
    other = tmp_path / "other"
    identity = Cache.open(cache).identity
    changed = json.loads(json.dumps(identity.to_json())) | {"seed": identity.seed + 1}
    stranger = Cache.create(other, type(identity).from_json(changed))
    shutil.copytree(cache / "shards", other / "shards")
    with pytest.raises(IdentityMismatchError, match="seed"):
        push(Cache.open(stranger.storage), url)
