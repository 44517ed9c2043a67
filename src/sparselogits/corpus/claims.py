"""Claims: the folder of a packed corpus belongs to one text, whoever packs it.

`corpus.json`, which says what is packed, is created exclusively and compared after it is made.
While a process packs, it holds a lock on the folder, shared with other workers of the same build
and released by the kernel when it dies. A claim of which no part is finished may be renewed for
another text only by a process that holds that lock alone: its maker is dead then, and so are all
its workers. Without locks (see `locks`) a claim is never renewed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sparselogits.corpus.packed import FORMATS, Paths, read_json
from sparselogits.errors import CorpusError, IdentityMismatchError
from sparselogits.files import TEMPORARY_PREFIX, is_clutter, write_whole
from sparselogits.identity import canonical_json
from sparselogits.locks import FileLock, Held


class Claim:
    """A folder that is held for one text; see `claimed`."""

    def __init__(self, paths: Paths, lock: FileLock) -> None:
        self._paths, self._lock = paths, lock

    def abandon(self) -> None:
        """Remove what was packed, unless another worker is packing the same text here."""
        if self._lock.take(alone=True, wait=False) is Held.ALONE:
            self._paths.remove()


def is_abandoned(paths: Paths) -> bool:
    """Whether a claim may be renewed: no part is finished, and no process is packing there."""
    if paths.index.exists() or any(paths.training.glob("part-*")):
        return False
    lock = FileLock(paths.lock)
    try:
        return lock.take(alone=True, wait=False) is Held.ALONE
    finally:
        lock.release()


@contextmanager
def claimed(paths: Paths, made_from: Mapping[str, Any]) -> Iterator[Claim]:
    """Hold a folder for one text while it is packed, together with others that pack the same.

    Args:
        paths: of the folder; made where it is missing.
        made_from: what `corpus.json` says.

    Raises:
        IdentityMismatchError: the folder is another text's; names the fields.
        CorpusError: the folder holds something else.
        StorageError: it cannot be written.
    """
    lock = FileLock(paths.lock)
    try:
        while not _settled(paths, made_from, lock):
            pass
        yield Claim(paths, lock)
    finally:
        # what is complete is not claimed anew; else the last worker removes the lock file, which
        # is gone where the claim was abandoned (to take the lock would make the folder again)
        if paths.index.exists() or (
            paths.lock.exists() and lock.take(alone=True, wait=False) is Held.ALONE
        ):
            lock.remove()
        lock.release()


def _settled(paths: Paths, made_from: Mapping[str, Any], lock: FileLock) -> bool:
    """Whether the folder is this text's and, where there are locks, held so."""
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
        begun = paths.index.exists() or any(paths.training.glob("part-*"))
        if begun or not renew or not _differences(paths, made_from):
            return
        paths.clear()
    write_whole(paths.made_from, canonical_json(made_from), replace=False)


def _require_own_folder(paths: Paths) -> None:
    if paths.made_from.exists():
        return
    if any(paths.training.glob("part-*")):
        raise CorpusError(
            f"{paths.folder} holds parts of a packed corpus, but no {paths.made_from.name}, which "
            "says of which text: restore that file, or delete the folder to pack the text anew"
        )
    there = paths.folder.iterdir() if paths.folder.exists() else ()
    known = paths.names
    foreign = (p for p in there if p.name not in known and not is_clutter(p.name))
    if any(not path.name.startswith(TEMPORARY_PREFIX) for path in foreign):
        raise CorpusError(
            f"{paths.folder} is not empty and holds no packed corpus; choose a folder of its own"
        )


def _require_same(paths: Paths, made_from: Mapping[str, Any]) -> None:
    found = _differences(paths, made_from)
    if found:
        lines = "\n".join(f"  {name}: {a!r} there, {b!r} asked for" for name, a, b in found)
        raise IdentityMismatchError(
            f"the packed corpus at {paths.folder} was made from something else:\n{lines}\n"
            "Choose another folder; or, if no other process is packing there, delete this one."
        )


def _differences(paths: Paths, made_from: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    there, ignored = read_json(paths.made_from), {"source.name"}
    if paths.index.exists():
        ignored.add("part_bytes")
        if there.get("format") in FORMATS:
            ignored.add("format")  # a finished corpus is read whichever rule it was made by
    if "chat_template" not in there.get("source", {}):
        ignored.add("source.chat_template")  # what is there holds no conversation
    return [field for field in _differing("", there, made_from) if field[0] not in ignored]


def _differing(
    prefix: str, there: Mapping[str, Any], asked: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(set(there) | set(asked)):
        a, b = there.get(key), asked.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differing(f"{prefix}{key}.", a, b)
        elif a != b:
            yield f"{prefix}{key}", a, b
