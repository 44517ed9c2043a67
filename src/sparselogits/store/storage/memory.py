"""Read files from memory, so that a shard can be verified before it is written."""

from __future__ import annotations


class FilesInMemory:
    """In-memory implementation of `ReadableFiles`, given the contents of files by name."""

    def __init__(self, files: dict[str, bytes], location: str = "memory") -> None:
        self.files = files
        self.location = location

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file."""
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name][start:stop]

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return the size of a file in bytes, and its last `length` bytes."""
        data = self.read(name)
        return len(data), data[max(0, len(data) - length) :]
