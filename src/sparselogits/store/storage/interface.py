"""The operations that a cache needs of the files it is stored in: all that store/ asks of a disk.

Every file is written once, whole, and never changed afterwards, so there is nothing to lock and
nothing to merge. Names are relative to the cache and use `/`.
"""

from __future__ import annotations

from typing import Protocol


class ReadableFiles(Protocol):
    """Files that can be read by name: what a shard is read from."""

    @property
    def location(self) -> str:
        """Path or URL of the folder, for messages."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes start to stop of a file, fewer if the file ends before `stop`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return the size of a file in bytes, and the last `length` bytes of its content.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...


class Storage(ReadableFiles, Protocol):
    """A folder of write-once files: what a cache is stored in."""

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files in a folder; none if there is no such folder."""
        ...

    def size(self, name: str) -> int:
        """Return the length of a file in bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, whole or not at all; return False if the name is taken already."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a file whole whether or not the name is taken; used for the card alone."""
        ...

    def move(self, name: str, to: str) -> None:
        """Rename a file to a name that is free."""
        ...

    def clean(self, folder: str) -> list[str]:
        """Remove what dead writers left in a folder; return the names."""
        ...
