"""Record the text from which each range of a cache's windows comes.

    CACHE/texts/windows-000000000000.json    the text whose first window has this index

The identity of a cache does not include the text, so that text can be appended. To prevent shards
of different texts for the same windows, a text is recorded before its first shard is written, by a
file that is created exclusively. The provenance of a shard contains the same values, except in
caches of old versions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparselogits.errors import CacheCorruptionError, IdentityMismatchError
from sparselogits.identity import canonical_json
from sparselogits.store.ranges import Range
from sparselogits.store.storage.interface import Storage
from sparselogits.untrusted import parse_json, shown

TEXTS = "texts"
"""Name of the folder with the files that record texts."""

_LARGEST = 1 << 12  # largest size of a file in `texts/`, in bytes


@dataclass(frozen=True)
class TextSpan:
    """A text and the range of windows that come from it."""

    fingerprint: str  # sha256, in hex, of the text and of the settings with which it was read
    first_window: int  # index of the first window in the cache
    windows: int | None  # number of windows; None if it is unknown until the text has been read

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values that are written to `texts/` and to a shard's provenance."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> TextSpan:
        """Create a span from the values that `to_json` returned.

        Raises:
            ValueError: the values do not describe a span.
        """
        match value:
            case {"fingerprint": str(fingerprint), "first_window": int(first), "windows": windows}:
                sound = first >= 0 and len(fingerprint) == 64
                if sound and (windows is None or (type(windows) is int and windows > 0)):
                    return cls(fingerprint, first, windows)
        raise ValueError(f"{shown(value)} does not describe a text")

    def holds(self, windows: Range) -> bool:
        """Return whether a range lies within the text's windows, as far as their end is known."""
        start, stop = windows
        return self.first_window <= start and (self.windows is None or stop <= self._stop)

    def overlaps(self, other: TextSpan) -> bool:
        """Return whether the ranges of two texts have a window in common."""
        return self.first_window < other._stop and other.first_window < self._stop

    def __str__(self) -> str:
        end = "" if self.windows is None else str(self.first_window + self.windows)
        return f"text {self.fingerprint[:12]} (windows {self.first_window}:{end})"

    @property
    def _stop(self) -> float:
        """Index of the window after the last one; infinite if unknown."""
        return float("inf") if self.windows is None else self.first_window + self.windows


def named_texts(storage: Storage) -> list[TextSpan]:
    """Return the texts that a cache records, in window order; caches of old versions record none.

    Raises:
        CacheCorruptionError: a file in `texts/` is damaged, or was removed during the call.
        StorageError: the cache cannot be reached.
    """
    names = (f"{TEXTS}/{name}" for name in storage.names(TEXTS) if name.endswith(".json"))
    return [_read(storage, name) for name in names]


def claim_text(storage: Storage, text: TextSpan) -> None:
    """Record a text in a cache, unless the cache records it already.

    Raises:
        IdentityMismatchError: the cache records another text with some of the same windows.
        CacheCorruptionError: a file in `texts/` is damaged, or was removed during the call.
        StorageError: the cache cannot be reached or written.
    """
    storage.clean(TEXTS)
    others = (other for other in named_texts(storage) if other != text and other.overlaps(text))
    other = next(others, text)
    if other == text:
        name = f"{TEXTS}/windows-{text.first_window:012d}.json"
        storage.create(name, canonical_json(text.to_json()) + b"\n")
        other = _read(storage, name)  # recorded by this process, or by another that was faster
    if other != text:
        raise IdentityMismatchError(
            f"the cache at {storage.location} was begun with other text: it records {other}, this "
            f"build has {text}. Continue with the recorded text, append this text to the cache, or "
            "choose another output directory"
        )


class TextCheck:
    """Comparison of the texts in shards' provenance with the texts that the cache records.

    If the cache records no texts, the texts of the shards are compared with each other.

    Args:
        named: texts that the cache records.
    """

    def __init__(self, named: Iterable[TextSpan]) -> None:
        self._known = {text.first_window: text for text in named}
        self._closed = bool(self._known)

    @property
    def texts(self) -> list[TextSpan]:
        """Texts given to the constructor or added since, sorted by their first windows."""
        return [self._known[first] for first in sorted(self._known)]

    def require(self, windows: Range, provenance: dict[str, Any]) -> None:
        """Validate the text in a shard's provenance; accept a shard of an old version without one.

        Raises:
            ValueError: the provenance does not describe a text, the windows do not come from the
                text, the cache does not record the text, or the text overlaps another one.
        """
        if "text" not in provenance:
            return
        text = TextSpan.from_json(provenance["text"])
        if not text.holds(windows):
            raise ValueError(f"windows {windows[0]}:{windows[1]} are not in the shard's {text}")
        if self._closed and text not in self._known.values():
            raise ValueError(f"the shard was built from {text}, which the cache does not record")
        self.add(text)

    def add(self, text: TextSpan) -> None:
        """Add a text to those from which shards may come.

        Raises:
            ValueError: the text overlaps another one.
        """
        other = next((t for t in self._known.values() if t != text and t.overlaps(text)), None)
        if other is not None:
            raise ValueError(f"the shard was built from {text}, but other shards from {other}")
        self._known[text.first_window] = text


def _read(storage: Storage, name: str) -> TextSpan:
    """Return the text that a file in `texts/` records."""
    try:
        return TextSpan.from_json(parse_json(storage.read(name, 0, _LARGEST)))
    except FileNotFoundError as error:
        raise CacheCorruptionError(
            f"{storage.location}/{name} was removed while the cache was read; start the same "
            "command again"
        ) from error
    except ValueError as error:
        raise CacheCorruptionError(
            f"{storage.location}/{name} is damaged ({error}); restore it from a copy, or delete "
            "it, and the next build records the text again"
        ) from error
