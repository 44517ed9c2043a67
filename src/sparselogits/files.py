"""Small files of text that are whole or absent, and the folder for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, its folder included.

    Processes may write the same file at the same time: each has a partial file of its own, and the
    last one to finish wins. Nothing is synced to the disk; what must outlive a power cut goes
    through `store/`.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def user_cache() -> Path:
    """The folder of this user for what can be made or fetched again."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sparselogits"
