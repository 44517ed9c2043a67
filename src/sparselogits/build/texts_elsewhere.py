"""The packed texts of a cache that lives in an object store.

Text is packed on this machine, because packing writes piecemeal and the teacher reads windows at
random; what is packed is then put beside the shards, so that the held-out windows are there for
evaluation and a build goes on from another machine without packing again. Objects are created
once: `corpus.json`, which says what a text is, is the first, so of two texts that claim one place
one is refused; `index.json` is the last, so a text that has one is complete.
"""

from __future__ import annotations

import hashlib
from itertools import count
from pathlib import Path

from sparselogits.corpus.packed import Paths
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.files import user_cache, write_whole
from sparselogits.store.place import Place, is_url, storage_at
from sparselogits.store.storage import Storage

CORPUS = "corpus"


def fetch_texts(cache: Place, work: Path | None = None) -> Path:
    """The folder of this machine that holds a cache's packed texts, each in a folder of its own.

    For a URL it is filled with the texts that are complete there and not here.

    Args:
        cache: the cache's folder, which is returned itself, or URL.
        work: for a URL, a folder to keep them in; one in the user's cache folder when None.

    Raises:
        StorageError: the object store cannot be reached.
    """
    if not is_url(cache):
        return Path(cache)
    name = hashlib.sha256(str(cache).rstrip("/").encode()).hexdigest()[:16]
    folder, storage = (work or user_cache() / "work") / name, storage_at(cache)
    for number in count():
        text = f"{CORPUS}-{number:04d}" if number else CORPUS
        if Paths(folder / text).index.exists():
            continue
        files = _files(storage, text)
        if not files:
            return folder
        for file in files:
            path = folder / text / file
            if not path.exists():
                write_whole(path, storage.read(f"{text}/{file}"))
    raise AssertionError("the numbers do not end")


def publish_text(cache: Place, folder: Path) -> None:
    """Put a packed text beside the shards of its cache, under its own name; nothing for a folder.

    Raises:
        IdentityMismatchError: another text is there.
        StorageError: the object store cannot be reached.
    """
    if not is_url(cache):
        return
    paths, storage = Paths(folder), storage_at(cache)
    if _same(storage, f"{folder.name}/{paths.index.name}", paths.index.read_bytes()):
        return
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    files.sort(key=lambda path: (path == paths.index, path != paths.made_from))
    for path in files:
        name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
        data = path.read_bytes()
        if not storage.create(name, data) and not _same(storage, name, data):
            raise IdentityMismatchError(
                f"{storage.location}/{name} is not what {path} is: another packed text stands "
                "there; build from the same text and settings, or choose another URL"
            )


def _same(storage: Storage, name: str, data: bytes) -> bool:
    try:
        return storage.read(name) == data
    except FileNotFoundError:
        return False


def _files(storage: Storage, text: str) -> list[str]:
    """Files of a complete packed text, the index last; none where it is not complete."""
    files = storage.names(text)
    if "index.json" not in files:
        return []
    parts = [f"{s}/{n}" for s in ("training", "holdout") for n in storage.names(f"{text}/{s}")]
    if not parts:
        raise CorpusError(f"{storage.location}/{text} has an index.json but no parts")
    return [*(name for name in files if name != "index.json"), *parts, "index.json"]
