"""Files held in memory: what a shard is checked in before it is written, and tests run on."""

from __future__ import annotations


class MemoryStorage:
    """A `Storage` without a disk.

    Args:
        files: contents by name; names use `/`.
        location: where they come from, for messages.
    """

    def __init__(self, files: dict[str, bytes] | None = None, location: str = "memory") -> None:
        self.files = {} if files is None else files
        self.location = location

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder."""
        inside = f"{folder}/" if folder else ""
        names = (n.removeprefix(inside) for n in self.files if n.startswith(inside))
        return sorted(name for name in names if "/" not in name)

    def size(self, name: str) -> int:
        """Length of a file in bytes."""
        return len(self._file(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start to stop of a file."""
        return self._file(name)[start:stop]

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Length of a file in bytes, and its last `length` bytes."""
        data = self._file(name)
        return len(data), data[max(0, len(data) - length) :]

    def create(self, name: str, data: bytes) -> bool:
        """Hold a file whose name is free."""
        if name in self.files:
            return False
        self.files[name] = data
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Hold a file, in the place of what is there."""
        self.files[name] = data

    def move(self, name: str, to: str) -> None:
        """Give a file another name."""
        self.files[to] = self.files.pop(name)

    def clean(self, folder: str) -> list[str]:
        """Nothing to remove."""
        return []

    def forget(self, name: str) -> bool:
        """Nothing is held."""
        return False

    def _file(self, name: str) -> bytes:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name]
