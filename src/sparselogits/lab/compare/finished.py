"""Store the finished work of a comparison as JSON values, each by the fingerprint of its inputs.

    OUT/finished/KIND/KEY.json    {"value": ...}, or {"failure": reason} after a failed attempt
    OUT/finished/runs/KEY.lock    locked while a process trains the run or scores its student

KIND is one of samplers, teacher, runs, gradients and tasks. KEY is the fingerprint of the inputs
that determine the value, so a stored value does not change, and a process reads it once. If a
recipe is extended, the values that the new recipe shares with the old one are not computed again.
The preparation of a comparison and all of its gradients have one lock each, `prepare/all.lock` and
`gradients/all.lock`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparselogits.files import write_whole
from sparselogits.identity import canonical_json
from sparselogits.locks import Held, lock_file


def fingerprint(inputs: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form, as hexadecimal text."""
    return hashlib.sha256(canonical_json(inputs)).hexdigest()


class FinishedWork:
    """Finished work of the comparison in the directory `out`."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "finished"
        self._known: dict[Path, Any] = {}

    def value(self, kind: str, key: str) -> Any | None:
        """Load a value; None if none is stored."""
        file = self._file(kind, key)
        if file not in self._known:
            content = self._read(file)
            if "value" not in content:
                return None
            self._known[file] = content["value"]
        return self._known[file]

    def failure(self, kind: str, key: str) -> str | None:
        """Load the reason why the last attempt failed; None if it succeeded or none was made."""
        file = self._file(kind, key)
        return None if file in self._known else self._read(file).get("failure")

    def store(self, kind: str, key: str, value: Any) -> None:
        """Store a JSON value under the fingerprint of the inputs that determine it."""
        write_whole(self._file(kind, key), json.dumps({"value": value}) + "\n")

    def fail(self, kind: str, key: str, why: str, **more: str) -> None:
        """Store why an attempt failed, and details such as a traceback, unless a value exists."""
        if self.value(kind, key) is None:
            content = {"failure": why, **more}
            write_whole(self._file(kind, key), json.dumps(content) + "\n")

    @contextmanager
    def claimed(self, kind: str, key: str = "all", *, wait: bool = False) -> Iterator[bool]:
        """Claim work for this process until the `with` block ends or the process dies.

        Yield whether the claim succeeded. If another process has claimed the work, the claim fails
        or, with `wait`, waits for that process. Every claim is granted if the file system or the
        platform does not support locks.
        """
        with lock_file(self._file(kind, key).with_suffix(".lock"), wait=wait) as lock:
            yield lock.held is not Held.TAKEN

    def _file(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.json"

    @staticmethod
    def _read(file: Path) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        return found
