"""Define the interface of storages: the file operations that caches use.

Every file except the dataset card is written once and completely, and never changed afterwards, so
that readers need no locks. Names are paths relative to the cache, separated by `/`.
"""

from __future__ import annotations

from typing import Protocol


class ReadableFiles(Protocol):
    """Interface for reading files by name, which is sufficient for opening a shard.

    Every method may raise StorageError if the files cannot be reached.
    """

    @property
    def location(self) -> str:
        """Path or URL of the folder, for messages."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file, or fewer if the file ends before `stop`.

        `stop` is None for the end of the file.

        Raises:
            FileNotFoundError: the file does not exist.
        """

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return the size of a file in bytes, and its last `length` bytes (fewer if it is shorter).

        Raises:
            FileNotFoundError: the file does not exist.
        """


class Storage(ReadableFiles, Protocol):
    """Interface of a folder of write-once files, in which a cache is stored.

    Every method may raise StorageError if the folder cannot be reached or written.
    """

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of a folder's files, except temporary ones.

        The list is empty if there is no folder.
        """

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: the file does not exist.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file atomically; return False if the file already exists."""

    def replace(self, name: str, data: bytes) -> None:
        """Write a file atomically, replacing an existing one; used only for the dataset card."""

    def move(self, name: str, to: str) -> None:
        """Rename a file.

        Raises:
            FileNotFoundError: the file does not exist.
            CacheError: the new name already exists.
        """

    def clean(self, folder: str) -> list[str]:
        """Remove temporary files of dead writers from a folder; return their names."""
