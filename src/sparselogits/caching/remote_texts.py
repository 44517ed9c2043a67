"""Synchronise the packed texts of a cache in an object store with a local folder.

Text is packed on this machine, because packing writes small pieces and the teacher reads windows at
random. Then the packed text is uploaded to the cache, so that the held-out windows are available
for evaluation and a build can continue on another machine without packing again. Objects are
created once: `corpus.json`, which describes the text, is the first, so that of two texts with one
name one is refused; `index.json` is the last, so that a text that has one is complete.
"""

from __future__ import annotations

import hashlib
import secrets
from itertools import count
from pathlib import Path
from typing import Any

from sparselogits.corpus.claims import claimed
from sparselogits.corpus.packed import Paths, public_source, read_corpus_json
from sparselogits.corpus.streams import is_part_name
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.files import user_cache, write_whole
from sparselogits.identity import canonical_json
from sparselogits.locks import Held, lock_file
from sparselogits.store.storage.interface import Storage
from sparselogits.store.storage.location import Location, is_url, storage_at
from sparselogits.store.tools.push import require_unlinked
from sparselogits.untrusted import parse_json

CORPUS = "corpus"


def fetch_texts(cache: Location, work: Path | None = None) -> Path:
    """Return the local folder that holds a cache's packed texts, each in a subfolder.

    For a URL, texts that are complete there and missing here are downloaded. A local text that
    differs from the one at the URL is removed.

    Args:
        cache: folder of the cache, which is returned unchanged, or URL.
        work: for a URL, the folder for the texts; None for one in the user's cache folder.

    Raises:
        StorageError: the object store cannot be reached.
        CorpusError: another process packs another text in the work folder.
    """
    if not is_url(cache):
        return Path(cache)
    name = hashlib.sha256(str(cache).rstrip("/").encode()).hexdigest()[:16]
    folder, storage = (work or user_cache() / "work") / name, storage_at(cache)
    for number in count():
        text = f"{CORPUS}-{number:04d}" if number else CORPUS
        paths = Paths(folder / text)
        there = _made_from(storage, text)
        if paths.index.exists() and (there is None or _is_of(paths, there)):
            continue
        files = [] if there is None else _files(storage, text)
        if not files:
            return folder
        assert there is not None
        _make_way(paths, there)
        with claimed(paths, there):
            for file in files:
                path = paths.folder / file
                if not path.exists():
                    write_whole(path, storage.read(f"{text}/{file}"), replace=False)
    raise AssertionError("the numbers do not end")


def publish_text(cache: Location, folder: Path) -> None:
    """Upload a packed text to its cache, if the cache is a URL.

    Only files of a packed text are uploaded, and no link is followed. The name of the text in
    `corpus.json` is uploaded without folders of this machine.

    Raises:
        IdentityMismatchError: the cache has another text of that name.
        InvalidArgumentError: a file is a link.
        StorageError: the object store cannot be reached.
    """
    if not is_url(cache):
        return
    paths, storage, text = Paths(folder), storage_at(cache), folder.name
    made_from = {**read_corpus_json(paths.made_from)}
    made_from["source"] = public_source(made_from["source"])
    files = _own_files(paths)
    name = f"{text}/{paths.made_from.name}"
    if not storage.create(name, canonical_json(made_from)):
        there = _made_from(storage, text)
        if there is None or _nameless(there) != _nameless(made_from):
            raise _other_text(storage, name)
    whole = "index.json" in storage.names(text)
    for path in [paths.index] if whole else [*files, paths.index]:
        name = f"{text}/{path.relative_to(folder).as_posix()}"
        data = path.read_bytes()
        if storage.create(name, data) or _same(storage, name, data):
            continue
        if whole:
            raise _other_text(storage, name)
        # a writer died here, in a store without atomic puts
        storage.move(name, f"damaged/{name.replace('/', '-')}-{secrets.token_hex(4)}")
        storage.create(name, data)


def _own_files(paths: Paths) -> list[Path]:
    """Return the files of a packed text without the first and the last one."""
    found = [paths.frequencies]
    for stream in (paths.training, paths.holdout):
        if stream.exists():
            require_unlinked(stream)
            found += sorted(path for path in stream.iterdir() if is_part_name(path.name))
    for path in (paths.folder, paths.made_from, paths.index, *found):
        require_unlinked(path)
    return found


def _made_from(storage: Storage, text: str) -> dict[str, Any] | None:
    """Return what an uploaded text was made from; None where no text has that name."""
    name = f"{text}/{Paths(Path(text)).made_from.name}"
    try:
        value: dict[str, Any] = parse_json(storage.read(name))
        value["source"] = public_source(value["source"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{storage.location}/{name} is damaged ({error}); delete it, then start the same "
            "command again"
        ) from error
    return value


def _is_of(paths: Paths, made_from: dict[str, Any]) -> bool:
    return _nameless(read_corpus_json(paths.made_from)) == _nameless(made_from)


def _nameless(made_from: dict[str, Any]) -> dict[str, Any]:
    return {**made_from, "source": {**made_from["source"], "name": ""}}


def _make_way(paths: Paths, made_from: dict[str, Any]) -> None:
    """Remove another text from a work folder, unless a process is packing it."""
    if not paths.made_from.exists() or _is_of(paths, made_from):
        return
    with lock_file(paths.lock) as lock:
        if lock.held is Held.TAKEN:
            raise CorpusError(
                f"another process is packing another text in {paths.folder}; wait for it to end, "
                "or name another work folder (--work)"
            )
        paths.remove()


def _other_text(storage: Storage, name: str) -> IdentityMismatchError:
    return IdentityMismatchError(
        f"{storage.location}/{name} belongs to another packed text; build from the same text and "
        "settings, or choose another URL"
    )


def _same(storage: Storage, name: str, data: bytes) -> bool:
    try:
        return storage.read(name) == data
    except FileNotFoundError:
        return False


def _files(storage: Storage, text: str) -> list[str]:
    """Return the files of a complete packed text, the index last; else an empty list."""
    files = storage.names(text)
    if "index.json" not in files:
        return []
    parts = [f"{s}/{n}" for s in ("training", "holdout") for n in storage.names(f"{text}/{s}")]
    if not parts:
        raise CorpusError(
            f"{storage.location}/{text} has an index.json but no parts; delete it and build again"
        )
    return [*(name for name in files if name != "index.json"), *parts, "index.json"]
