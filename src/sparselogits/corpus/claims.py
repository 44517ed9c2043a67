"""Reserve the folder of a packed corpus for one text, so that no other text is packed into it.

`corpus.json`, which describes the text, is created exclusively and then compared. While a process
packs, it holds a lock on the folder; other workers of the same build share the lock, and the kernel
releases it when a process dies. If no part is finished, another text may replace the claim, but
only while a process holds the lock exclusively: then all processes of the earlier claim have ended.
Without locks (see `locks`) a claim is never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sparselogits.corpus.packed import FORMAT_VERSIONS, Paths, read_description
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.files import TEMPORARY_PREFIX, is_clutter, write_whole
from sparselogits.identity import canonical_json, differing_fields
from sparselogits.locks import FileLock, Held


def is_abandoned(paths: Paths) -> bool:
    """Return whether no part in a folder is finished and no process is packing into the folder.

    Another text may then replace the claim. Without support for locks, the result is False. With
    locks, unless a part is finished, a missing folder and its lock file are created.

    Raises:
        StorageError: the lock file cannot be created.
    """
    if paths.begun:
        return False
    lock = FileLock(paths.lock)
    try:
        return lock.take(alone=True, wait=False) is Held.ALONE
    finally:
        lock.release()


@contextmanager
def claimed(paths: Paths, made_from: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Claim a folder for the text that `made_from`, the content of `corpus.json`, describes.

    If locks are supported, a shared lock is held during the block: other processes may claim the
    folder for the same text at the same time.

    Yields:
        A function that removes the packed files if locks are supported and no other process is
        packing into the folder.

    Raises:
        IdentityMismatchError: the folder belongs to another text; the message contains the
            differing fields.
        CorpusError: the folder contains other files, a damaged `corpus.json`, or parts of a corpus
            without `corpus.json`.
        StorageError: the folder cannot be written.
    """
    lock = FileLock(paths.lock)

    def abandon() -> None:
        if lock.take(alone=True, wait=False) is Held.ALONE:
            paths.remove()

    try:
        while not _try_to_claim(paths, made_from, lock):
            pass
        yield abandon
    finally:
        # The lock file is removed when the corpus is complete, or by the last worker. After
        # `abandon` it does not exist, and taking the lock would create the folder again.
        if paths.index.exists() or (
            paths.lock.exists() and lock.take(alone=True, wait=False) is Held.ALONE
        ):
            lock.remove()
        lock.release()


def _try_to_claim(paths: Paths, made_from: Mapping[str, Any], lock: FileLock) -> bool:
    """Try to claim a folder, with a shared lock if locks are supported; return False on failure.

    The attempt fails, and must be repeated, if another process removed its claim meanwhile.
    """
    _require_corpus_or_empty(paths)
    found = lock.take(alone=True, wait=False)
    exists = paths.made_from.exists()
    if found is Held.ALONE and exists and not paths.begun and _differences(paths, made_from):
        paths.clear()
        exists = False
    if found is not Held.TAKEN and not exists:
        write_whole(paths.made_from, canonical_json(made_from), replace=False)
    if found is not Held.UNSUPPORTED:
        lock.take(alone=False, wait=True)
    # the conversion to a shared lock is not atomic
    if not paths.made_from.exists():
        return False
    differences = _differences(paths, made_from)
    if differences:
        lines = "\n".join(f"  {name}: {a!r} there, {b!r} now" for name, a, b in differences)
        raise IdentityMismatchError(
            f"the packed corpus at {paths.folder} was packed from other text or settings:\n{lines}"
            "\nGive another folder; or, if no process is packing into this one, delete it."
        )
    return True


def _require_corpus_or_empty(paths: Paths) -> None:
    if paths.made_from.exists():
        return
    if any(paths.training.glob("part-*")):
        raise CorpusError(
            f"{paths.folder} contains parts of a packed corpus, but no {paths.made_from.name}, "
            "which describes their text; restore that file, or delete the folder to pack the text "
            "again"
        )
    entries = paths.folder.iterdir() if paths.folder.exists() else ()
    known = paths.names
    foreign = (p for p in entries if p.name not in known and not is_clutter(p.name))
    if any(not path.name.startswith(TEMPORARY_PREFIX) for path in foreign):
        raise CorpusError(
            f"{paths.folder} is not empty and contains no packed corpus; give an empty folder"
        )


def _differences(paths: Paths, made_from: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (field, stored value, given value) for each difference that prevents packing."""
    stored, ignored = read_description(paths.made_from), {"source.name"}
    if paths.index.exists():
        ignored.add("part_bytes")
        if stored.get("format") in FORMAT_VERSIONS:
            ignored.add("format")  # a finished corpus is read in either format
    if "chat_template" not in stored["source"]:
        ignored.add("source.chat_template")  # the packed text contains no conversation
    return [field for field in differing_fields(stored, made_from) if field[0] not in ignored]
