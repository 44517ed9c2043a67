"""A cache on disk: an identity and shards of windows, which never change once written.

    CACHE/
      cache.json      the identity (canonical JSON) and its fingerprint
      README.md       a dataset card, so that the folder can be pushed to a hub as it is
      shards/windows-000000000000-000000000512.parquet ...

CACHE is a folder of this machine or a prefix of an object store (storage/location.py).

There is no index and no consolidation: the list of shards is a listing of the folder, and a shard
that exists is complete. Any number of processes may write to a cache and read from it at once.
A reader keeps a few shards open and one row group of each in memory, whatever the size.
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
from sparselogits.store.tools.card import dataset_card
from sparselogits.targets import SparseTargets
from sparselogits.untrusted import parse_json

CACHE_JSON = "cache.json"
OPEN_SHARDS = 8


class Cache:
    """An open cache; `Cache.create` and `Cache.open` make one.

    Forked and spawned processes may read from one object; each thread needs its own.
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
        """Create a cache, or open the one that is there if its identity is the same.

        Args:
            root: folder or URL, or a storage.
            identity: identity of the cache.

        Raises:
            IdentityMismatchError: the cache that is there has another identity.
            CacheError: the folder cannot be written.
        """
        require_bounds(identity, f"the cache to be made at {root}")
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
        """Open the cache in a folder or at a URL.

        Raises:
            CacheError: there is no cache, or one of another format version.
            CacheCorruptionError: its cache.json is damaged.
            StorageError: the cache cannot be reached.
        """
        storage = storage_at(root)
        return cls(storage, read_identity(storage))

    @staticmethod
    def exists(root: Location | Storage) -> bool:
        """Return whether there is a cache. Raises StorageError."""
        try:
            return storage_at(root).size(CACHE_JSON) > 0
        except (FileNotFoundError, NotADirectoryError):
            return False

    def holds(self, windows: Range) -> bool:
        """Return whether the shard of a range exists now; one request, not a listing."""
        try:
            return self.storage.size(shard_name(*windows)) > 0
        except FileNotFoundError:
            return False

    def finished(self) -> list[Range]:
        """List the shards anew; return their ranges (start, stop), sorted."""
        self._ranges = listed_ranges(self.storage.names(SHARDS))
        self._before = list(accumulate((stop - start for start, stop in self._ranges), initial=0))
        return list(self._ranges)

    @property
    def ranges(self) -> list[Range]:
        """Sorted ranges (start, stop) of the shards, as of the last listing."""
        return list(self._listed())

    def commit(self, records: Sequence[WindowRecord], provenance: Mapping[str, Any]) -> Location:
        """Write one shard, whole or not at all.

        Real-valued weights are rounded as the codec says (`TargetCodec.rounded`).

        If another worker has written the same range before, its file stays: the two hold the same
        targets.

        Args:
            records: records of consecutive windows, at least one.
            provenance: JSON values that say how the windows were computed: fingerprint of the text,
                versions, device, threads, batch size.

        Returns:
            Path or URL of the shard.

        Raises:
            InvalidTargetsError: records that do not fit the identity or each other.
            CacheError: the disk is full or read-only, or the object store cannot be reached.
            CacheCorruptionError: the shard does not read back as it was written.
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
        """Return the provenance of the shard that holds window `start`."""
        return dict(self._shard(self._range_of(start)).description["provenance"])

    def recorded_tokenizer(self) -> object:
        """Return the tokenizer that the first shard records; None if it records none."""
        return self.provenance(self.window_index(0)).get("tokenizer") if len(self) else None

    def __len__(self) -> int:
        """Return the number of windows, as of the last listing."""
        self._listed()
        return self._before[-1]

    def window_index(self, i: int) -> int:
        """Return the index in the corpus of the i-th window of the cache."""
        (start, _), row = self._locate(i)
        return start + row

    def read(self, i: int) -> WindowRecord:
        """Read the i-th window of the cache, in window order.

        Raises:
            IndexError: the cache has fewer windows.
            CacheCorruptionError: names the file, the row and what is wrong.
        """
        shard_range, row = self._locate(i)
        try:
            return self._shard(shard_range).read(row)
        except CacheCorruptionError:
            copies = self.storage if isinstance(self.storage, LocalCopy) else None
            if copies is None or not copies.forget(shard_name(*shard_range)):
                raise
            # the local copy was damaged or old; read again from where the cache is stored
            self._shards.pop(shard_range, None)
            return self._shard(shard_range).read(row)

    def statistics(self) -> CacheStatistics:
        """Return the statistics of the cache, from the footers of its shards."""
        ranges = self.finished()
        totals = dict.fromkeys(("positions", "entries", "bytes", "text"), 0)
        sums = dict.fromkeys(("teacher_loss", "teacher_entropy"), 0.0)
        for found in ranges:
            shard = self._open(found)  # one at a time: a footer in memory takes half a megabyte
            for key in ("positions", "entries"):
                totals[key] += shard.description[key]
            for key in sums:
                sums[key] += len(shard) * shard.description[key]
            totals["bytes"] += shard.size
            totals["text"] += shard.text_bytes
        windows = sum(stop - start for start, stop in ranges)
        means = {key: whole / windows if windows else float("nan") for key, whole in sums.items()}
        return CacheStatistics(
            shards=len(ranges),
            windows=windows,
            tokens=windows * self.identity.window_length,
            positions=totals["positions"],
            entries=totals["entries"],
            bytes_on_disk=totals["bytes"],
            text_bytes=totals["text"],
            mean_teacher_loss=means["teacher_loss"],
            mean_teacher_entropy=means["teacher_entropy"],
        )

    def entries_per_position(self, shards: int = 4) -> float:
        """Return the mean entries per position that carries a target, from some shards' footers."""
        chosen = [self._shard(r).description for r in self.ranges[:shards]]
        positions = sum(int(told["positions"]) for told in chosen)
        return sum(int(told["entries"]) for told in chosen) / positions if positions else 0.0

    def decode(self, row: Mapping[str, Any]) -> SparseTargets:
        """Return the targets of a row that another tool read from one of the shards.

        Args:
            row: columns of the row by name; see `Shard.decode_row`.

        Raises:
            InvalidArgumentError: the row lacks columns.
            CacheError: no shard of this cache holds its window.
            CacheCorruptionError: the row differs from what was written.
        """
        if "window_index" not in row:
            raise InvalidArgumentError(missing_columns(row))
        return self._shard(self._range_of(int(row["window_index"]))).decode_row(row)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for spawned workers, which open their own files."""
        return self.__dict__ | {"_shards": OrderedDict()}

    def _listed(self) -> list[Range]:
        if self._ranges is None:
            self.finished()
        assert self._ranges is not None
        return self._ranges

    def _locate(self, i: int) -> tuple[Range, int]:
        ranges, count = self._listed(), len(self)
        if not -count <= i < count:
            raise IndexError(f"window {i} of a cache with {count} windows")
        i %= count
        place = bisect_right(self._before, i) - 1
        return ranges[place], i - self._before[place]

    def _range_of(self, window: int) -> Range:
        ranges = self._listed()
        place = bisect_right(ranges, (window, float("inf"))) - 1
        if place < 0 or not ranges[place][0] <= window < ranges[place][1]:
            raise CacheError(f"no shard of {self.root} holds window {window}; build it first")
        return ranges[place]

    def _shard(self, shard_range: Range) -> Shard:
        if self._process != os.getpid():  # a forked reader must not share open shards
            self._shards, self._process = OrderedDict(), os.getpid()
        shard = self._shards.pop(shard_range, None) or self._open(shard_range)
        self._shards[shard_range] = shard
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard

    def _open(self, shard_range: Range) -> Shard:
        return Shard(self.storage, shard_name(*shard_range), self.identity)

    def _require_consecutive(self, records: Sequence[WindowRecord]) -> None:
        if not records:
            raise InvalidTargetsError("there are no records; a shard holds at least one window")
        for place, record in enumerate(records):
            record.validate(self.identity.window_length)
            if record.window_index != records[0].window_index + place:
                raise InvalidTargetsError(
                    f"window {record.window_index} found, window "
                    f"{records[0].window_index + place} expected: the windows of a shard are "
                    "consecutive"
                )

    def _require_reads_back(self, name: str, data: bytes, records: Sequence[WindowRecord]) -> None:
        shard = Shard(FilesInMemory({name: data}), name, self.identity)
        for row, record in enumerate(records):
            if not same_record(shard.read(row), record):
                raise CacheCorruptionError(
                    f"{self.root}/{name}, row {row} (window {record.window_index}) does not decode "
                    "to what was encoded. Nothing was written; please report this"
                )


def read_identity(storage: ReadableFiles) -> Identity:
    """Read the identity from cache.json.

    Raises:
        CacheError: there is no cache.json.
        CacheCorruptionError: cache.json is damaged.
    """
    try:
        # bounded without a request for the size
        raw = storage.read(CACHE_JSON, 0, LARGEST_CACHE_JSON + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CacheError(
            f"there is no cache at {storage.location}: it has no {CACHE_JSON}. Check the path, or "
            "make a cache there with `sparselogits cache --out`"
        ) from error
    if len(raw) > LARGEST_CACHE_JSON:
        raise CacheCorruptionError(
            f"{storage.location}/{CACHE_JSON} has more than the {LARGEST_CACHE_JSON:,} bytes that "
            "are expected at most: this library did not write it; restore it from a copy"
        )
    try:
        content = parse_json(raw, largest=LARGEST_CACHE_JSON)
        identity = Identity.from_json(content["identity"])
        sound = content["fingerprint"] == identity.fingerprint
    except CacheError as error:
        raise CacheError(f"{storage.location}/{CACHE_JSON}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheCorruptionError(
            f"{storage.location}/{CACHE_JSON} is damaged ({reason_of(error)}); restore it from a "
            "copy"
        ) from error
    if not sound:
        raise CacheCorruptionError(
            f"{storage.location}/{CACHE_JSON}: the identity does not match its fingerprint, so it "
            "was edited or damaged; restore it from a copy"
        )
    require_bounds(identity, f"{storage.location}/{CACHE_JSON}")
    TargetCodec.of(identity)
    return identity


def same_record(a: WindowRecord, b: WindowRecord) -> bool:
    """Return whether two records are equal bit for bit (loss and entropy in float32)."""

    def figures(record: WindowRecord) -> list[Any]:
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
        ]

    return (
        (a.window_index, a.targets.rounds, a.targets.vocab_size, a.mask is None)
        == (b.window_index, b.targets.rounds, b.targets.vocab_size, b.mask is None)
    ) and all(np.array_equal(x, y) for x, y in zip(figures(a), figures(b), strict=True))
