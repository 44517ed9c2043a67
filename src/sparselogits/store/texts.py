"""The texts of a cache: which text each run of windows was cut from.

    CACHE/texts/windows-000000000000.json    the text whose windows begin there

The identity of a cache leaves the text out, so that more can be appended. Without more, shards of
two texts would look like one cache. So a text is claimed before its first shard is written: its
file is created exclusively, under the number of its first window, and read back. Each shard stores
the same values in its provenance, and `verify` compares the two.
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
_LARGEST = 1 << 12


@dataclass(frozen=True)
class TextSpan:
    """A text, and the windows of a cache that are cut from it.

    Args:
        fingerprint: sha256, in hex, of the text and of how it was read.
        first_window: number of the first window in the cache.
        windows: number of windows; None if not known before the text is read to its end.
    """

    fingerprint: str
    first_window: int
    windows: int | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as written to `texts/` and to a shard's provenance."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> TextSpan:
        """Make a span from the values that `to_json` returned.

        Raises:
            ValueError: other values.
        """
        match value:
            case {"fingerprint": str(fingerprint), "first_window": int(first), "windows": windows}:
                sound = first >= 0 and len(fingerprint) == 64
                if sound and (windows is None or (type(windows) is int and windows > 0)):
                    return cls(fingerprint, first, windows)
        raise ValueError(f"{shown(value)} does not describe a text")

    def holds(self, windows: Range) -> bool:
        """Return whether the text contains a range of windows."""
        start, stop = windows
        return self.first_window <= start and (self.windows is None or stop <= self._stop)

    def overlaps(self, other: TextSpan) -> bool:
        """Return whether two texts claim a common window."""
        return self.first_window < other._stop and other.first_window < self._stop

    def __str__(self) -> str:
        end = "" if self.windows is None else str(self.first_window + self.windows)
        return f"text {self.fingerprint[:12]} (windows {self.first_window}:{end})"

    @property
    def _stop(self) -> float:
        return float("inf") if self.windows is None else self.first_window + self.windows


def named_texts(storage: Storage) -> list[TextSpan]:
    """Return the texts that a cache names, in order; older versions wrote none.

    Raises:
        CacheCorruptionError: a file of `texts/` is damaged.
        StorageError: the cache cannot be reached.
    """
    return [_read(storage, _file(name)) for name in storage.names(TEXTS) if name.endswith(".json")]


def claim_text(storage: Storage, text: TextSpan) -> None:
    """Name a text of a cache, unless it is named already.

    Raises:
        IdentityMismatchError: another text is named for the same windows.
        CacheCorruptionError: a file of `texts/` is damaged.
        StorageError: the cache cannot be reached or written.
    """
    storage.clean(TEXTS)
    for other in named_texts(storage):
        if other != text and other.overlaps(text):
            raise _mismatch(storage, other, text)
    name = _file(f"windows-{text.first_window:012d}.json")
    storage.create(name, canonical_json(text.to_json()) + b"\n")
    made = _read(storage, name)  # another process may have been first
    if made != text:
        raise _mismatch(storage, made, text)


class TextCheck:
    """Compares the texts that shards name with those of the cache, and with each other.

    Args:
        named: texts that the cache names; see `named_texts`.
    """

    def __init__(self, named: Iterable[TextSpan]) -> None:
        self._known = {text.first_window: text for text in named}
        self._closed = bool(self._known)

    @property
    def texts(self) -> list[TextSpan]:
        """The named texts, or without any those of the shards that were checked, in order."""
        return [self._known[first] for first in sorted(self._known)]

    def require(self, windows: Range, provenance: dict[str, Any]) -> None:
        """Validate the text that a shard names.

        Args:
            windows: range of the shard.
            provenance: provenance of the shard; older versions wrote no text to it.

        Raises:
            ValueError: the cache does not name the text, or the text does not contain the windows.
        """
        if "text" not in provenance:
            return
        text = TextSpan.from_json(provenance["text"])
        if not text.holds(windows):
            raise ValueError(f"its windows {windows[0]}:{windows[1]} are not in its {text}")
        if self._closed and text not in self._known.values():
            raise ValueError(f"it was made from {text}, which the cache does not name")
        self.add(text)

    def add(self, text: TextSpan) -> None:
        """Add a text.

        Raises:
            ValueError: another text claims some of its windows.
        """
        other = next((t for t in self._known.values() if t != text and t.overlaps(text)), None)
        if other is not None:
            raise ValueError(f"it was made from {text}, other shards from {other}")
        self._known[text.first_window] = text


def _file(name: str) -> str:
    return f"{TEXTS}/{name}"


def _read(storage: Storage, name: str) -> TextSpan:
    try:
        return TextSpan.from_json(parse_json(storage.read(name, 0, _LARGEST)))
    except FileNotFoundError as error:
        raise CacheCorruptionError(
            f"{storage.location}/{name} was removed while the cache was read; start again"
        ) from error
    except ValueError as error:
        raise CacheCorruptionError(
            f"{storage.location}/{name} is damaged ({error}); restore it from a copy, or delete "
            "it: the next build names the text again"
        ) from error


def _mismatch(storage: Storage, there: TextSpan, here: TextSpan) -> IdentityMismatchError:
    return IdentityMismatchError(
        f"the cache at {storage.location} was begun with other text: it names {there}, this "
        f"build has {here}. Give that text to go on, append this text to the cache, or choose "
        "another output directory"
    )
