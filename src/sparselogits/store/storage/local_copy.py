"""A storage with a bounded copy of what was read from it on this machine's disk.

What is kept is what readers of shards ask for: a file's tail, with its footer, and the row groups
that were read; so a cache far larger than the disk can be read in any order. Copies are found by
name and range alone, without a request. They are not trusted: where bytes fail their checksum, the
reader has them forgotten and asks again (`Cache.read`), so neither a damaged copy nor a shard that
was repaired meanwhile is ever taken for damage of the cache.
"""

from __future__ import annotations

import struct

from sparselogits.store.ranges import SHARDS
from sparselogits.store.storage.copy_folder import CopyFolder
from sparselogits.store.storage.local import Storage

_SIZE = struct.Struct("<Q")


class LocalCopy:
    """A `Storage` in front of another; writes pass through, ranges read are kept.

    Args:
        storage: where the files live.
        folder: where ranges are kept.
    """

    def __init__(self, storage: Storage, folder: CopyFolder) -> None:
        self.storage = storage
        self.folder = folder

    @property
    def location(self) -> str:
        """Where the files live."""
        return self.storage.location

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder, as they are now."""
        return self.storage.names(folder)

    def size(self, name: str) -> int:
        """Length of a file in bytes, as it is now."""
        return self.storage.size(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes start to stop of a file; ranges of shards are kept, other files never.

        A cache that was made anew under a URL has another cache.json there.
        """
        if stop is None or not name.startswith(f"{SHARDS}/"):
            return self.storage.read(name, start, stop)
        key = f"{name}@{start}-{stop}"
        held = self.folder.get(self.location, key)
        if held is not None:
            return held
        data = self.storage.read(name, start, stop)
        self.folder.put(self.location, key, data)
        return data

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """A file's length, and its last bytes; kept."""
        key = f"{name}@tail-{length}"
        held = self.folder.get(self.location, key)
        if held is not None and len(held) >= _SIZE.size:
            return _SIZE.unpack_from(held)[0], held[_SIZE.size :]
        size, data = self.storage.tail(name, length)
        self.folder.put(self.location, key, _SIZE.pack(size) + data)
        return size, data

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file where the files live."""
        return self.storage.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file where the files live."""
        self.storage.replace(name, data)
        self.forget(name)

    def move(self, name: str, to: str) -> None:
        """Rename a file where the files live."""
        self.storage.move(name, to)
        self.forget(name)

    def clean(self, folder: str) -> list[str]:
        """Remove what dead writers left where the files live."""
        return self.storage.clean(folder)

    def forget(self, name: str) -> bool:
        """Let go of what is kept of a file; whether anything was."""
        return self.folder.drop(self.location, f"{name}@")
