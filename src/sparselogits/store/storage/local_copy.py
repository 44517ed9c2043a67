"""Store local copies of the ranges read from a remote storage, in a folder of bounded size.

Only parts of shards are copied: row groups, and the end of the file with its footer. A cache can
therefore be much larger than the disk and be read in any order. Copies are found by name and range,
without a request. If bytes fail their checksum, `Cache.read` drops the copies of that file and
reads the storage again, so it does not report a damaged copy, or the copy of a shard that has been
repaired since, as damage to the cache.
"""

from __future__ import annotations

import struct

from sparselogits.store.ranges import SHARDS
from sparselogits.store.storage.copy_folder import CopyFolder
from sparselogits.store.storage.interface import Storage

_SIZE = struct.Struct("<Q")


class LocalCopy:
    """Storage that reads another storage through local copies.

    Files are created, replaced and renamed in the other storage.
    """

    def __init__(self, storage: Storage, folder: CopyFolder) -> None:
        self.storage = storage
        self.folder = folder
        self._bypassed: set[str] = set()  # files whose copies must not be used but remain

    @property
    def location(self) -> str:
        """Path or URL of the files."""
        return self.storage.location

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of a folder's files, requested from the storage each time."""
        return self.storage.names(folder)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes, requested from the storage each time."""
        return self.storage.size(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file, from a copy if one exists.

        Only ranges of shards are copied, so that a new cache at the same URL is detected by its
        cache.json.
        """
        if stop is None or not name.startswith(f"{SHARDS}/") or name in self._bypassed:
            return self.storage.read(name, start, stop)
        key = f"{name}@{start}-{stop}"
        data = self.folder.get(self.location, key)
        if data is None:
            data = self.storage.read(name, start, stop)
            self.folder.put(self.location, key, data)
        return data

    def tail(self, name: str, length: int) -> tuple[int, bytes]:
        """Return a file's size in bytes and its last `length` bytes, from a copy if one exists."""
        if name in self._bypassed:
            return self.storage.tail(name, length)
        key = f"{name}@tail-{length}"
        copy = self.folder.get(self.location, key)
        if copy is not None and len(copy) >= _SIZE.size:
            return _SIZE.unpack_from(copy)[0], copy[_SIZE.size :]
        size, data = self.storage.tail(name, length)
        self.folder.put(self.location, key, _SIZE.pack(size) + data)
        return size, data

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file to the storage; return False if the file already exists."""
        return self.storage.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file to the storage, replacing an existing one, and drop its copies."""
        self.storage.replace(name, data)
        self.forget(name)

    def move(self, name: str, to: str) -> None:
        """Rename a file of the storage, and drop its copies."""
        self.storage.move(name, to)
        self.forget(name)

    def clean(self, folder: str) -> list[str]:
        """Remove temporary files of dead writers from the storage; return their names."""
        return self.storage.clean(folder)

    def forget(self, name: str) -> bool:
        """Drop all copies of a file, or bypass them if the folder is read-only.

        Returns:
            Whether there were copies of the file.
        """
        try:
            return self.folder.drop(self.location, f"{name}@")
        except OSError:
            self._bypassed.add(name)
            return True
