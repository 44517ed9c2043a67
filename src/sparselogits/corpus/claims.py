"""Claim the folder of a packed corpus for one text, whichever process packs it.

`corpus.json`, which says what is packed, is created exclusively and compared after it is created.
While a process packs, it holds a lock on the folder, shared with other workers of the same build
and released by the kernel when the process dies. A claim without a finished part may be renewed for
another text only by a process that holds that lock alone: then the process that made the claim is
dead, and so are all of its workers. Without locks (see `locks`) a claim is never renewed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sparselogits.corpus.packed import FORMAT_VERSIONS, Paths, read_corpus_json
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.files import TEMPORARY_PREFIX, is_clutter, write_whole
from sparselogits.identity import canonical_json, differing_fields
from sparselogits.locks import FileLock, Held


class Claim:
    """Hold the lock on a packed-corpus folder, shared by workers that pack the same text."""

    def __init__(self, paths: Paths, lock: FileLock) -> None:
        self._paths, self._lock = paths, lock

    def abandon(self) -> None:
        """Remove what was packed, unless another worker is packing the same text here."""
        if self._lock.take(alone=True, wait=False) is Held.ALONE:
            self._paths.remove()


def is_abandoned(paths: Paths) -> bool:
    """Return whether a claim may be renewed: no part is finished, and no process is packing."""
    if paths.begun:
        return False
    lock = FileLock(paths.lock)
    try:
        return lock.take(alone=True, wait=False) is Held.ALONE
    finally:
        lock.release()


@contextmanager
def claimed(paths: Paths, made_from: Mapping[str, Any]) -> Iterator[Claim]:
    """Lock a folder for one text while it is packed, together with processes that pack the same.

    Args:
        paths: paths of the folder, which is created where it is missing.
        made_from: content of `corpus.json`.

    Raises:
        IdentityMismatchError: the folder belongs to another text; names the fields.
        CorpusError: the folder holds something else.
        StorageError: the folder cannot be written.
    """
    lock = FileLock(paths.lock)
    try:
        while not _settled(paths, made_from, lock):
            pass
        yield Claim(paths, lock)
    finally:
        # a complete corpus needs no lock file; else the last worker removes it. Where the claim was
        # abandoned it is gone, and taking the lock would create the folder again
        if paths.index.exists() or (
            paths.lock.exists() and lock.take(alone=True, wait=False) is Held.ALONE
        ):
            lock.remove()
        lock.release()


def _settled(paths: Paths, made_from: Mapping[str, Any], lock: FileLock) -> bool:
    """Return whether the folder belongs to this text and is locked for it, where locks exist."""
    _require_own_folder(paths)
    found = lock.take(alone=True, wait=False)
    if found is not Held.TAKEN:
        _claim(paths, made_from, renew=found is Held.ALONE)
    if found is not Held.UNSUPPORTED:
        lock.take(alone=False, wait=True)
    # another process may have had the lock in between
    if not paths.made_from.exists():
        return False
    _require_same(paths, made_from)
    return True


def _claim(paths: Paths, made_from: Mapping[str, Any], *, renew: bool) -> None:
    if paths.made_from.exists():
        if paths.begun or not renew or not _differences(paths, made_from):
            return
        paths.clear()
    write_whole(paths.made_from, canonical_json(made_from), replace=False)


def _require_own_folder(paths: Paths) -> None:
    if paths.made_from.exists():
        return
    if any(paths.training.glob("part-*")):
        raise CorpusError(
            f"{paths.folder} holds parts of a packed corpus, but no {paths.made_from.name}, which "
            "says from which text; restore that file, or delete the folder to pack the text anew"
        )
    there = paths.folder.iterdir() if paths.folder.exists() else ()
    known = paths.names
    foreign = (p for p in there if p.name not in known and not is_clutter(p.name))
    if any(not path.name.startswith(TEMPORARY_PREFIX) for path in foreign):
        raise CorpusError(
            f"{paths.folder} is not empty and holds no packed corpus; choose an empty folder"
        )


def _require_same(paths: Paths, made_from: Mapping[str, Any]) -> None:
    found = _differences(paths, made_from)
    if found:
        lines = "\n".join(f"  {name}: {a!r} there, {b!r} now" for name, a, b in found)
        raise IdentityMismatchError(
            f"the packed corpus at {paths.folder} was made from something else:\n{lines}\n"
            "Choose another folder; or, if no process is packing into this one, delete it."
        )


def _differences(paths: Paths, made_from: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    there, ignored = read_corpus_json(paths.made_from), {"source.name"}
    if paths.index.exists():
        ignored.add("part_bytes")
        if there.get("format") in FORMAT_VERSIONS:
            ignored.add("format")  # a finished corpus is read in either format
    if "chat_template" not in there.get("source", {}):
        ignored.add("source.chat_template")  # the packed text holds no conversation
    return [field for field in differing_fields(there, made_from) if field[0] not in ignored]
