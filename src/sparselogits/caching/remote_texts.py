"""Synchronise the packed texts of a cache in an object store with a local folder.

Text is packed locally, because packing writes small pieces, and windows are read in any order.
The packed text is then uploaded, for evaluation and for builds that resume on other machines.
`corpus.json` describes the text; it is uploaded first and atomically, so that a name cannot be used
for two texts. `index.json` is uploaded last and marks a complete text.
"""

from __future__ import annotations

import hashlib
import secrets
from itertools import count
from pathlib import Path
from typing import Any

from sparselogits.corpus.claims import claimed
from sparselogits.corpus.packed import Paths, parse_description, public_source, read_description
from sparselogits.corpus.streams import is_part_name
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.files import user_cache, write_whole
from sparselogits.identity import canonical_json
from sparselogits.locks import Held, lock_file
from sparselogits.store.storage.interface import Storage
from sparselogits.store.storage.location import Location, is_url, storage_at
from sparselogits.store.tools.push import require_unlinked

CORPUS = "corpus"
"""Name of the first text's folder, and prefix of the names of the other texts' folders."""


def fetch_texts(cache: Location, work: Path | None = None) -> Path:
    """Return the local folder with the packed texts of a cache, each in a subfolder.

    For a URL, complete texts are downloaded if they are missing locally. A local text that differs
    from a complete text at the URL is replaced.

    Args:
        cache: URL of the cache, or its folder, which is returned unchanged.
        work: parent of the local folders for URLs; None for a folder in the user's cache folder.

    Raises:
        StorageError: the object store cannot be reached.
        CorpusError: a text is damaged, or another process is packing another text in the local
            folder.
    """
    if not is_url(cache):
        return Path(cache)
    name = hashlib.sha256(str(cache).rstrip("/").encode()).hexdigest()[:16]
    folder, storage = (work or user_cache() / "work") / name, storage_at(cache)
    for number in count():
        text = f"{CORPUS}-{number:04d}" if number else CORPUS
        paths = Paths(folder / text)
        remote = _remote_description(storage, text)
        if paths.index.exists() and (remote is None or _has_text(paths, remote)):
            continue
        files = [] if remote is None else _remote_files(storage, text)
        if not files:
            return folder
        assert remote is not None
        _remove_other_text(paths, remote)
        with claimed(paths, remote):
            for file in files:
                path = paths.folder / file
                if not path.exists():
                    write_whole(path, storage.read(f"{text}/{file}"), replace=False)
    raise AssertionError("unreachable: the loop is infinite")


def publish_text(cache: Location, folder: Path) -> None:
    """Upload a packed text to its cache; do nothing if the cache is not a URL.

    Only the files of a packed text are uploaded, `corpus.json` without local paths.

    Args:
        cache: folder or URL of the cache.
        folder: folder of the packed text; its name is also the name of the text in the cache.

    Raises:
        IdentityMismatchError: the cache has another text of that name.
        InvalidArgumentError: a file is a link.
        CorpusError: `corpus.json` is damaged.
        StorageError: the object store cannot be reached.
    """
    if not is_url(cache):
        return
    paths, storage, text = Paths(folder), storage_at(cache), folder.name
    description = _local_description(paths)
    files = _local_files(paths)
    name = f"{text}/{paths.made_from.name}"
    if not storage.create(name, canonical_json(description)):
        remote = _remote_description(storage, text)
        if remote is None or _without_name(remote) != _without_name(description):
            raise _other_text(storage, name)
    is_complete = "index.json" in storage.names(text)
    for path in [paths.index] if is_complete else [*files, paths.index]:
        name = f"{text}/{path.relative_to(folder).as_posix()}"
        data = path.read_bytes()
        if storage.create(name, data) or _has_content(storage, name, data):
            continue
        if is_complete:
            raise _other_text(storage, name)
        # a partial object of a dead writer, in a store without atomic puts
        storage.move(name, f"damaged/{name.replace('/', '-')}-{secrets.token_hex(4)}")
        storage.create(name, data)


def _local_files(paths: Paths) -> list[Path]:
    """Return the files of a packed text except `corpus.json` and `index.json`; reject links."""
    found = [paths.frequencies]
    for stream in (paths.training, paths.holdout):
        if stream.exists():
            require_unlinked(stream)
            found += sorted(path for path in stream.iterdir() if is_part_name(path.name))
    for path in (paths.folder, paths.made_from, paths.index, *found):
        require_unlinked(path)
    return found


def _remote_description(storage: Storage, text: str) -> dict[str, Any] | None:
    """Return the content of an uploaded text's `corpus.json`; None if there is no such file."""
    name = f"{text}/{Paths(Path(text)).made_from.name}"
    where, again = f"{storage.location}/{name}", "Delete it, then start the same command again"
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return None
    return _public(parse_description(data, where, again))


def _public(description: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a `corpus.json` without local paths."""
    return {**description, "source": public_source(description["source"])}


def _local_description(paths: Paths) -> dict[str, Any]:
    """Return the content of the local `corpus.json` without local paths."""
    return _public(read_description(paths.made_from))


def _has_text(paths: Paths, description: dict[str, Any]) -> bool:
    """Return whether the local text matches a description."""
    return _without_name(_local_description(paths)) == _without_name(description)


def _without_name(description: dict[str, Any]) -> dict[str, Any]:
    """Return a description without the text's name, because that depends on local paths."""
    return {**description, "source": {**description["source"], "name": ""}}


def _remove_other_text(paths: Paths, description: dict[str, Any]) -> None:
    """Remove the local text if it does not match a description.

    Raises CorpusError if another process is packing text in the folder.
    """
    if not paths.made_from.exists() or _has_text(paths, description):
        return
    with lock_file(paths.lock) as lock:
        if lock.held is Held.TAKEN:
            raise CorpusError(
                f"another process is packing another text in {paths.folder}; wait until that "
                "process has finished, or give another work folder (--work)"
            )
        paths.remove()


def _other_text(storage: Storage, name: str) -> IdentityMismatchError:
    """Return the error for an object that belongs to another text."""
    return IdentityMismatchError(
        f"{storage.location}/{name} belongs to another packed text; build from the same text and "
        "settings, or choose another URL"
    )


def _has_content(storage: Storage, name: str, data: bytes) -> bool:
    """Return whether an object exists and has exactly the given content."""
    try:
        return storage.read(name) == data
    except FileNotFoundError:
        return False


def _remote_files(storage: Storage, text: str) -> list[str]:
    """Return the names of an uploaded text's objects, index.json last; [] without index.json."""
    files = storage.names(text)
    if "index.json" not in files:
        return []
    parts = [f"{s}/{n}" for s in ("training", "holdout") for n in storage.names(f"{text}/{s}")]
    if not parts:
        raise CorpusError(
            f"{storage.location}/{text} has an index.json but no parts; delete these objects, then "
            "start the same command again"
        )
    return [*(name for name in files if name != "index.json"), *parts, "index.json"]
