"""Create, read and extend caches: folders with an identity and immutable shards of windows.

    CACHE/
      cache.json      the identity (canonical JSON) and its fingerprint
      README.md       a dataset card, for hubs to which the folder is pushed
      texts/          the texts from which the windows come (texts.py)
      shards/windows-000000000000-000000000512.parquet ...

CACHE is a local folder or a prefix of an object store (storage/location.py).

A cache has no index file: the list of shards is the listing of a folder, and an existing shard is
complete. Any number of processes may read a cache and, on storages that create files exclusively
(storage/objects.py names exceptions), write it concurrently. Whatever the size of the cache, a
reader has only a few shards open, with one row group of each in memory.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from sparselogits.errors import (
    CacheCorruptionError,
    CacheError,
    InvalidArgumentError,
    InvalidTargetsError,
    StorageError,
    reason_of,
)
from sparselogits.identity import Identity, canonical_json
from sparselogits.store.bounds import LARGEST_CACHE_JSON, require_bounds
from sparselogits.store.codec.target_codec import TargetCodec
from sparselogits.store.ranges import SHARDS, Range, listed_ranges, shard_name
from sparselogits.store.records import CacheStatistics, WindowRecord
from sparselogits.store.shard.reader import Shard, missing_columns
from sparselogits.store.shard.writer import encode_shard
from sparselogits.store.storage.interface import ReadableFiles, Storage
from sparselogits.store.storage.local_copy import LocalCopy
from sparselogits.store.storage.location import Location, inside, location_of, storage_at
from sparselogits.store.storage.memory import FilesInMemory
from sparselogits.store.texts import TextSpan
from sparselogits.store.tools.card import dataset_card
from sparselogits.targets import SparseTargets
from sparselogits.untrusted import parse_json

CACHE_JSON = "cache.json"
"""Name of the file with the identity."""

OPEN_SHARDS = 8
"""Largest number of shards that a `Cache` leaves open."""


class Cache:
    """An open cache, which `Cache.create` and `Cache.open` return.

    Forked and spawned processes may share a `Cache`; each thread needs a separate `Cache`.

    Attributes:
        storage: storage that contains the cache.
        identity: identity of the cache.
        root: folder of the cache as a Path, or URL as a string.

    Examples:
        >>> cache = Cache.open("my-cache")
        >>> record = cache.read(0)
        >>> len(record.tokens) == cache.identity.window_length
        True
    """

    def __init__(self, storage: Storage, identity: Identity) -> None:
        self.storage = storage
        self.identity = identity
        self.root = location_of(storage)
        self._ranges: list[Range] | None = None
        self._before: list[int] = []
        self._shards: OrderedDict[Range, Shard] = OrderedDict()
        self._process = os.getpid()

    @classmethod
    def create(cls, root: Location | Storage, identity: Identity) -> Cache:
        """Create a cache, or open an existing cache with the same identity.

        Args:
            root: folder, URL or storage.
            identity: identity of the cache.

        Raises:
            IdentityMismatchError: the existing cache has another identity.
            CacheError: a field of the identity is invalid, or the existing cache is damaged.
            StorageError: the folder or URL cannot be written.
            InvalidArgumentError: the URL is malformed or has no driver; see `storage_at`.
            MissingDependencyError: the driver of the URL is not installed.
        """
        require_bounds(identity, f"the new cache at {root}")
        storage = storage_at(root)
        storage.clean("")
        storage.clean(SHARDS)
        identity = identity.without_paths()
        content = {"fingerprint": identity.fingerprint, "identity": identity.to_json()}
        storage.create(CACHE_JSON, canonical_json(content) + b"\n")
        cache = cls.open(storage)
        there = f"the cache at {storage.location}"
        identity.require_equal(cache.identity, here="this build", there=there)
        storage.create("README.md", dataset_card(cache.identity).encode())
        return cache

    @classmethod
    def open(cls, root: Location | Storage) -> Cache:
        """Open an existing cache.

        Args:
            root: folder, URL or storage.

        Raises:
            CacheError: there is no cache, the format or codec version of the cache is unknown, or a
                field of the identity is missing, unknown or invalid.
            CacheCorruptionError: cache.json is damaged.
            StorageError: the folder or URL cannot be reached.
            InvalidArgumentError: the URL is malformed or has no driver; see `storage_at`.
            MissingDependencyError: the driver of the URL is not installed.
        """
        storage = storage_at(root)
        return cls(storage, read_identity(storage))

    @staticmethod
    def exists(root: Location | Storage) -> bool:
        """Return whether a folder, URL or storage contains a cache.

        Raises:
            StorageError: the folder or URL cannot be reached.
            InvalidArgumentError: the URL is malformed or has no driver; see `storage_at`.
            MissingDependencyError: the driver of the URL is not installed.
        """
        try:
            return storage_at(root).size(CACHE_JSON) > 0
        except (FileNotFoundError, NotADirectoryError):
            return False

    def holds(self, windows: Range) -> bool:
        """Return whether the shard of a range of windows exists, without listing the shards."""
        try:
            return self.storage.size(shard_name(*windows)) > 0
        except FileNotFoundError:
            return False

    def finished(self) -> list[Range]:
        """List the shards again, and return their sorted ranges (start, stop).

        Raises:
            CacheError: two shards overlap.
            StorageError: the cache cannot be reached.
        """
        self._ranges = listed_ranges(self.storage.names(SHARDS))
        self._before = list(accumulate((stop - start for start, stop in self._ranges), initial=0))
        return list(self._ranges)

    @property
    def ranges(self) -> list[Range]:
        """Sorted ranges (start, stop) of the shards at the time of the last listing."""
        return list(self._listed())

    def commit(self, records: Sequence[WindowRecord], provenance: Mapping[str, Any]) -> Location:
        """Write a shard atomically.

        Real-valued weights are rounded according to the codec (`TargetCodec.rounded`). An existing
        shard of the same range is not replaced.

        Args:
            records: records of consecutive windows, at least one.
            provenance: JSON values that describe how the windows were computed: fingerprint of the
                text, versions, device, threads, batch size.

        Returns:
            Path or URL of the shard.

        Raises:
            InvalidTargetsError: there are no records, or a record does not match the identity or
                the other records.
            StorageError: the shard cannot be written, for example because the disk is full.
            CacheCorruptionError: the shard does not decode to the records, or the bytes read back
                differ from the bytes written.
        """
        self._require_consecutive(records)
        codec, seed = TargetCodec.of(self.identity), self.identity.seed
        records = [
            replace(r, targets=codec.rounded(r.targets, seed, r.window_index)) for r in records
        ]
        name, data = encode_shard(self.identity, records, provenance)
        self._require_reads_back(name, data, records)
        self.storage.create(name, data)
        self._ranges = None
        return inside(self.root, name)

    def provenance(self, start: int) -> dict[str, Any]:
        """Return the provenance of the shard that contains the window with the index `start`.

        Raises:
            CacheError: no shard contains the window.
            CacheCorruptionError: the shard is damaged.
        """
        return dict(self._shard(self._range_of(start)).description["provenance"])

    def recorded_tokenizer(self) -> object:
        """Return the tokenizer's description in the first shard's provenance; None if absent."""
        return self.provenance(self.window_index(0)).get("tokenizer") if len(self) else None

    def __len__(self) -> int:
        """Return the number of windows at the time of the last listing."""
        self._listed()
        return self._before[-1]

    def window_index(self, i: int) -> int:
        """Return the corpus index of the i-th window of the cache.

        Raises:
            IndexError: the cache has fewer windows.
        """
        (start, _), row = self._locate(i)
        return start + row

    def read(self, i: int) -> WindowRecord:
        """Read the i-th window of the cache, in window order.

        Raises:
            IndexError: the cache has fewer windows.
            CacheCorruptionError: the shard is damaged; the message contains the file, and the
                damaged rows unless the footer is damaged.
            StorageError: the shard cannot be reached.
        """
        shard_range, row = self._locate(i)
        try:
            return self._shard(shard_range).read(row)
        except CacheCorruptionError:
            copies = self.storage if isinstance(self.storage, LocalCopy) else None
            if copies is None or not copies.forget(shard_name(*shard_range)):
                raise
            # the copy was damaged or outdated; read the cache itself
            self._shards.pop(shard_range, None)
            return self._shard(shard_range).read(row)

    def statistics(self) -> CacheStatistics:
        """Compute the statistics of the cache from the footers of its shards.

        Raises:
            CacheError: two shards overlap.
            CacheCorruptionError: a shard is damaged.
            StorageError: the cache cannot be reached.
        """
        return self.statistics_by_text([])[0]

    def statistics_by_text(
        self, texts: Sequence[TextSpan]
    ) -> tuple[CacheStatistics, list[CacheStatistics]]:
        """Return the statistics of the cache, and those of the shards of each given text.

        Each footer is read once.

        Raises:
            CacheError: two shards overlap.
            CacheCorruptionError: a shard is damaged.
            StorageError: the cache cannot be reached.
        """
        shards = {}
        for shard_range in self.finished():
            shard = self._open(shard_range)  # not kept open: each takes half a megabyte of memory
            shards[shard_range] = CacheStatistics(
                shards=1,
                windows=len(shard),
                tokens=len(shard) * self.identity.window_length,
                positions=shard.description["positions"],
                entries=shard.description["entries"],
                bytes_on_disk=shard.size,
                text_bytes=shard.text_bytes,
                mean_teacher_loss=shard.description["teacher_loss"],
                mean_teacher_entropy=shard.description["teacher_entropy"],
            )
        by_text = [
            CacheStatistics.total([own for windows, own in shards.items() if text.holds(windows)])
            for text in texts
        ]
        return CacheStatistics.total(list(shards.values())), by_text

    def entries_per_position(self) -> float:
        """Estimate the mean entries per position with a target, from the first four footers.

        The result is 0 if these shards contain no position with a target.
        """
        chosen = [self._shard(r).description for r in self.ranges[:4]]
        positions = sum(int(found["positions"]) for found in chosen)
        return sum(int(found["entries"]) for found in chosen) / positions if positions else 0.0

    def decode(self, row: Mapping[str, Any]) -> SparseTargets:
        """Decode the targets of a row that another tool has read; see `Shard.decode_row`.

        Raises:
            InvalidArgumentError: a column is missing.
            CacheError: no shard of this cache contains the window of the row.
            CacheCorruptionError: the row does not decode, or its checksum is wrong.
        """
        if "window_index" not in row:
            raise InvalidArgumentError(missing_columns(row))
        return self._shard(self._range_of(int(row["window_index"]))).decode_row(row)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without open shards, because a spawned process must open them itself."""
        return self.__dict__ | {"_shards": OrderedDict()}

    def _listed(self) -> list[Range]:
        """Return the sorted ranges of the shards; list them unless they are known."""
        return self.finished() if self._ranges is None else self._ranges

    def _locate(self, i: int) -> tuple[Range, int]:
        """Return the shard and the row of the i-th window."""
        ranges, count = self._listed(), len(self)
        if not -count <= i < count:
            raise IndexError(f"window {i} is out of range; give an index below {count}")
        i %= count
        index = bisect_right(self._before, i) - 1
        return ranges[index], i - self._before[index]

    def _range_of(self, window: int) -> Range:
        """Return the range of the shard that contains a window of the corpus."""
        ranges = self._listed()
        index = bisect_right(ranges, (window, float("inf"))) - 1
        if index < 0 or not ranges[index][0] <= window < ranges[index][1]:
            raise CacheError(
                f"no shard of {self.root} contains window {window}; build this window first with "
                "`sparselogits cache`"
            )
        return ranges[index]

    def _shard(self, shard_range: Range) -> Shard:
        """Return an open shard; close the least recently used one if too many are open."""
        if self._process != os.getpid():  # a forked process must not share open shards
            self._shards, self._process = OrderedDict(), os.getpid()
        shard = self._shards.pop(shard_range, None) or self._open(shard_range)
        self._shards[shard_range] = shard
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def _open(self, shard_range: Range) -> Shard:
        """Open the shard of a range, without adding it to the open shards."""
        return Shard(self.storage, shard_name(*shard_range), self.identity)

    def _require_consecutive(self, records: Sequence[WindowRecord]) -> None:
        """Validate records, whose windows must be consecutive."""
        if not records:
            raise InvalidTargetsError("found no records; pass at least one")
        masked = self.identity.objective is not None
        for index, record in enumerate(records, records[0].window_index):
            record.validate(self.identity.window_length, masked=masked)
            if record.window_index != index:
                raise InvalidTargetsError(
                    f"found window {record.window_index}, expected window {index}; pass the "
                    "windows of a shard in order and without gaps"
                )

    def _require_reads_back(self, name: str, data: bytes, records: Sequence[WindowRecord]) -> None:
        """Validate that an encoded shard decodes to its records."""
        shard = Shard(FilesInMemory({name: data}), name, self.identity)
        for row, record in enumerate(records):
            if not same_record(shard.read(row), record):
                raise CacheCorruptionError(
                    f"{self.root}/{name}, row {row} (window {record.window_index}) does not decode "
                    "to the record that was encoded, and no shard was written. This is a bug of "
                    "sparselogits or faulty memory; please report it"
                )


def read_identity(storage: ReadableFiles) -> Identity:
    """Read and validate the identity in cache.json.

    Raises:
        CacheError: cache.json is missing, the format or codec version is unknown, or a field of the
            identity is missing, unknown or invalid.
        CacheCorruptionError: cache.json is damaged.
        StorageError: the storage cannot be reached.
    """
    where = f"{storage.location}/{CACHE_JSON}"
    try:
        # reads a bounded number of bytes, without a request for the size
        raw = storage.read(CACHE_JSON, 0, LARGEST_CACHE_JSON + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(
            f"there is no cache at {storage.location}: it has no {CACHE_JSON}. Check the path, or "
            "build a cache there with `sparselogits cache --out`"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot read {where}: {error.strerror or error}; check the disk, then try again"
        ) from error
    try:
        content = parse_json(raw, largest=LARGEST_CACHE_JSON)
        identity = Identity.from_json(content["identity"])
        sound = content["fingerprint"] == identity.fingerprint
    except CacheError as error:  # the message lacks the location
        raise CacheError(f"{where}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheCorruptionError(
            f"{where} is damaged ({reason_of(error)}); restore it from a copy"
        ) from error
    if not sound:
        raise CacheCorruptionError(
            f"{where} was edited or damaged: the identity does not match its fingerprint. Restore "
            "the file from a copy"
        )
    require_bounds(identity, where)
    TargetCodec.of(identity)
    return identity


def same_record(a: WindowRecord, b: WindowRecord) -> bool:
    """Return whether two records are bitwise equal; loss, entropy and rate compare as float32."""

    def arrays(record: WindowRecord) -> list[Any]:
        targets = record.targets
        return [
            record.tokens,
            record.document_starts,
            targets.ids.numpy(),
            targets.weights.numpy().view(np.int32),
            targets.offsets.numpy(),
            np.array([record.teacher_loss, record.teacher_entropy], np.float32).view(np.int32),
            np.zeros(0) if targets.counts is None else targets.counts.numpy(),
            np.zeros(0) if record.mask is None else record.mask,
            np.zeros(0) if record.inputs is None else record.inputs,
            np.array(0 if record.rate is None else record.rate, np.float32),
        ]

    return (
        (a.window_index, a.targets.rounds, a.targets.vocab_size, a.mask is None)
        == (b.window_index, b.targets.rounds, b.targets.vocab_size, b.mask is None)
    ) and all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))
