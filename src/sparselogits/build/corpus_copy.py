"""The packed corpus of a cache that lives in an object store.

Text is packed on this machine, because packing writes piecemeal and the teacher reads windows at
random; what is packed is then put beside the shards, so that the held-out windows are there for
evaluation and a build goes on from another machine without packing again. Objects are created
once; `index.json` is the last, so a corpus that has one is complete.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sparselogits.corpus.packed import Paths
from sparselogits.corpus.streams import write_atomically
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.store.copy_folder import user_cache
from sparselogits.store.place import Place, is_url, storage_at
from sparselogits.store.storage import Storage

CORPUS = "corpus"


def corpus_folder(cache: Place, work: Path | None = None) -> Path:
    """Where the packed corpus of a cache lies on this machine.

    Args:
        cache: the cache's folder, which holds it, or URL.
        work: for a URL, a folder to keep it in; one in the user's cache folder when None.
    """
    if not is_url(cache):
        return Path(cache) / CORPUS
    name = hashlib.sha256(str(cache).rstrip("/").encode()).hexdigest()[:16]
    return (work or user_cache() / "work") / name / CORPUS


def fetch_corpus(cache: Place, work: Path | None = None) -> Path:
    """`corpus_folder`, filled from the object store where it is complete there and not here.

    Raises:
        StorageError: the object store cannot be reached.
    """
    folder = corpus_folder(cache, work)
    if not is_url(cache) or Paths(folder).index.exists():
        return folder
    storage = storage_at(cache)
    for name in _names(storage):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, storage.read(f"{CORPUS}/{name}"))
    return folder


def publish_corpus(cache: Place, work: Path | None = None) -> None:
    """Put a packed corpus beside the shards of its cache, where that is a URL.

    Raises:
        IdentityMismatchError: another corpus is there.
        StorageError: the object store cannot be reached.
    """
    if not is_url(cache):
        return
    folder, storage = corpus_folder(cache, work), storage_at(cache)
    paths = Paths(folder)
    if _same(storage, "index.json", paths.index.read_bytes()):
        return
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    files.sort(key=lambda path: (path == paths.index, path != paths.made_from))
    for path in files:
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        if not storage.create(f"{CORPUS}/{name}", data) and not _same(storage, name, data):
            raise IdentityMismatchError(
                f"{storage.location}/{CORPUS} holds another packed corpus than {folder} ({name} "
                "differs); build from the same text and settings, or choose another URL"
            )


def _same(storage: Storage, name: str, data: bytes) -> bool:
    try:
        return storage.read(f"{CORPUS}/{name}") == data
    except FileNotFoundError:
        return False


def _names(storage: Storage) -> list[str]:
    """Files of a complete corpus, the index last; none where it is not complete."""
    files = storage.names(CORPUS)
    if "index.json" not in files:
        return []
    parts = [f"{s}/{n}" for s in ("training", "holdout") for n in storage.names(f"{CORPUS}/{s}")]
    if not parts:
        raise CorpusError(f"{storage.location}/{CORPUS} has an index.json but no parts")
    return [*(name for name in files if name != "index.json"), *parts, "index.json"]
