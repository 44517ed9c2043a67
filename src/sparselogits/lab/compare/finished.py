"""Finished work of a comparison: JSON values, kept by what determines them.

    OUT/finished/KIND/KEY.json    {"value": ...}, or {"failure": why} of the last attempt
    OUT/finished/KIND/KEY.lock    held while a process works on it

KIND is one of samplers, teacher, runs, gradients and tasks; KEY is the fingerprint of everything
that determines the value, so a value never changes and is read once per process. Recipes can grow
and any number of processes can share a directory: nothing is computed twice, and no old value is
taken for a new one.
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


def fingerprint(determined: object) -> str:
    """Return the sha256, in hex, of JSON values."""
    return hashlib.sha256(canonical_json(determined)).hexdigest()


class FinishedWork:
    """The finished work of one comparison.

    Args:
        out: directory of the comparison.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "finished"
        self._known: dict[Path, Any] = {}

    def value(self, kind: str, key: str) -> Any | None:
        """Return a value; None if there is none."""
        file = self._file(kind, key)
        if file not in self._known:
            content = self._read(file)
            if "value" not in content:
                return None
            self._known[file] = content["value"]
        return self._known[file]

    def failure(self, kind: str, key: str) -> str | None:
        """Return why the last attempt failed; None if there is a value, or was no attempt."""
        file = self._file(kind, key)
        return None if file in self._known else self._read(file).get("failure")

    def keep(self, kind: str, key: str, value: Any) -> None:
        """Keep a value."""
        write_whole(self._file(kind, key), json.dumps({"value": value}) + "\n")

    def fail(self, kind: str, key: str, why: str, **more: str) -> None:
        """Record why an attempt failed, unless another process has stored a result by now.

        Args:
            kind: kind of the work.
            key: fingerprint of the inputs that determine the work.
            why: reason of the failure.
            more: further details to record, such as a traceback.
        """
        if self.value(kind, key) is None:
            content = {"failure": why, **more}
            write_whole(self._file(kind, key), json.dumps(content) + "\n")

    @contextmanager
    def claimed(self, kind: str, key: str = "all", *, wait: bool = False) -> Iterator[bool]:
        """Claim work for this process until the block ends or the process dies.

        Args:
            kind: kind of the work.
            key: fingerprint of what determines it.
            wait: wait while another process works on it.

        Returns:
            Whether the claim succeeded. A file system without locks grants every claim.
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
