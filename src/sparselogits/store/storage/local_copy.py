"""A storage with copies of what was read from it on this machine's disk, bounded in size.

Copies are kept of what readers of shards read: the tail of a file, with its footer, and row groups.
So a cache far larger than the disk can be read in any order. A copy is found by name and range,
without a request. Copies are not trusted: if bytes fail their checksum, the reader drops the copies
of that file and reads again (`Cache.read`), so neither a damaged copy nor a shard that was repaired
meanwhile is taken for damage of the cache.
"""

from __future__ import annotations

import struct

from sparselogits.store.ranges import SHARDS
from sparselogits.store.storage.copy_folder import CopyFolder
from sparselogits.store.storage.interface import Storage

_SIZE = struct.Struct("<Q")


class LocalCopy:
    """A `Storage` in front of another: writes pass through, ranges that are read are kept.

    Args:
        storage: storage of the files.
        folder: folder of the copies.
    """

    def __init__(self, storage: Storage, folder: CopyFolder) -> None:
        self.storage = storage
        self.folder = folder

    @property
    def location(self) -> str:
        """Path or URL of the files."""
        return self.storage.location

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files in a folder, as they are now."""
        return self.storage.names(folder)

    def size(self, name: str) -> int:
        """Return the length of a file in bytes, as it is now."""
        return self.storage.size(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes start to stop of a file; ranges of shards are kept, other files are not.

        So a new cache under the same URL is recognised by its cache.json.
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
        """Return the size of a file and its last `length` bytes; both are kept in the folder."""
        key = f"{name}@tail-{length}"
        held = self.folder.get(self.location, key)
        if held is not None and len(held) >= _SIZE.size:
            return _SIZE.unpack_from(held)[0], held[_SIZE.size :]
        size, data = self.storage.tail(name, length)
        self.folder.put(self.location, key, _SIZE.pack(size) + data)
        return size, data

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file to the storage."""
        return self.storage.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file to the storage."""
        self.storage.replace(name, data)
        self.forget(name)

    def move(self, name: str, to: str) -> None:
        """Rename a file of the storage."""
        self.storage.move(name, to)
        self.forget(name)

    def clean(self, folder: str) -> list[str]:
        """Remove what dead writers left in the storage."""
        return self.storage.clean(folder)

    def forget(self, name: str) -> bool:
        """Drop the copies of a file; return whether there were any."""
        return self.folder.drop(self.location, f"{name}@")
