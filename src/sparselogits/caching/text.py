"""Manage the texts of a cache: the first one, and those appended later.

    CACHE/corpus         the first text, packed
    CACHE/corpus-0001    the next text, and so on

A text's windows are numbered after those of the text before it; each text drops its own last
partial window, and its last shard may be short. So existing files are not changed, read again or
renumbered, and each text can be built, resumed and verified separately.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from sparselogits.corpus import PackedCorpus, Packing, Source, Window, fingerprint
from sparselogits.corpus.claims import is_abandoned
from sparselogits.corpus.packed import Paths, read_corpus_json
from sparselogits.errors import CacheError, CorpusError, IdentityMismatchError
from sparselogits.files import is_clutter
from sparselogits.identity import differing_fields
from sparselogits.store.ranges import Range
from sparselogits.store.storage.location import Location, is_url

_OWN = re.compile(r"corpus(-\d+)?|shards|texts|damaged|tokenizer|README\.md|.*\.(tmp|partial)")
"""Names that a cache's folder may hold before its cache.json."""


@dataclass(frozen=True)
class TextPlace:
    """The folder of a packed text, and the number of its first window in the cache."""

    folder: Path
    first_window: int


def require_room(cache: Location) -> None:
    """Validate that a new cache can be created in a folder: it is empty or holds only packed text.

    Raises:
        CacheError: the path is a file, or the folder holds something else.
    """
    if is_url(cache):
        return
    folder = Path(cache)
    try:
        there = sorted(path.name for path in folder.iterdir() if not is_clutter(path.name))
    except FileNotFoundError:
        return
    except OSError as error:
        raise CacheError(
            f"{folder} cannot hold a cache: {error.strerror or error}; choose another "
            "folder (--out)"
        ) from error
    other = [n for n in there if not (n.startswith(".") or _OWN.fullmatch(n))]
    if other:
        raise CacheError(
            f"{folder} holds no cache, but other files ({', '.join(other[:3])}"
            f"{', ...' if len(other) > 3 else ''}); choose an empty or a new folder (--out)"
        )


def place_of_text(cache: Path, source: Source, packing: Packing, *, append: bool) -> TextPlace:
    """Return where a text is packed in a cache; the folder is claimed when packing begins.

    Args:
        cache: folder of the cache, which may be missing.
        source: the text.
        packing: how the text is packed.
        append: whether to add the text to the existing ones. For a text that the cache already has
            the same place is returned, so that an interrupted build can continue.

    Raises:
        CacheError: there is nothing to append to, or the text before is not completely packed.
        IdentityMismatchError: the existing texts were packed with other settings (names the
            fields); or, without `append`, the cache was begun with another text.
    """
    if not append:
        begun = _begun_with(cache / "corpus")
        foreign = begun not in (None, source.fingerprint)
        if foreign and not is_abandoned(Paths(cache / "corpus")):
            raise IdentityMismatchError(
                f"the cache at {cache} was begun with other text; give that text to continue, "
                "--append to add this one to it, or another output directory"
            )
        return TextPlace(cache / "corpus", 0)
    first = 0
    for number in count():
        folder = cache / (f"corpus-{number:04d}" if number else "corpus")
        begun = _begun_with(folder)
        if begun == source.fingerprint or (number and not begun):
            return TextPlace(folder, first)
        if number and is_abandoned(Paths(folder)):
            return TextPlace(folder, first)
        try:
            before = PackedCorpus.open(folder)
            first += before.windows
        except CorpusError as error:
            raise CacheError(
                f"cannot append to {cache}: {error}. The number of the first new window is known "
                "once the texts before are packed: run the command that began them, then append"
            ) from error
        _require_equal(cache, before.packing, packing)
    raise AssertionError("the numbers do not end")


def _begun_with(folder: Path) -> str | None:
    """Return the fingerprint of the text whose packing has begun in a folder."""
    made_from = Paths(folder).made_from
    return read_corpus_json(made_from)["source"]["fingerprint"] if made_from.exists() else None


def _require_equal(cache: Path, before: Packing, packing: Packing) -> None:
    found = differing_fields(packing.to_json(), before.to_json())
    differing = [f"{name}: {here} here, {there} there" for name, here, there in found]
    if differing:
        raise IdentityMismatchError(
            f"cannot append to {cache}: its texts have another packing ({', '.join(differing)}). "
            "Use the same settings, or choose another output directory"
        )


def windows_of_texts(cache: Path) -> int | None:
    """Return how many windows the texts of a cache have together; None if a text is missing.

    A cache that was merged, or fetched from elsewhere, has no packed texts.
    """
    try:
        return sum(PackedCorpus.open(folder).windows for folder in _folders(cache))
    except CorpusError:
        return None


def text_of_windows(cache: Path) -> Callable[[Range], str | None]:
    """Return a function that maps a range of windows to the fingerprint of its packed text.

    The function returns None for windows whose text is missing (see `windows_of_texts`), and for
    ranges that cross from one text to the next.
    """
    texts: list[tuple[PackedCorpus, int]] = []
    with suppress(CorpusError):  # after a text that cannot be opened, window numbers are unknown
        first = 0
        for folder in _folders(cache):
            texts.append((PackedCorpus.open(folder), first))
            first += texts[-1][0].windows

    def text_of(windows: Range) -> str | None:
        for corpus, first_window in texts:
            start, stop = (window - first_window for window in windows)
            if start >= 0 and stop <= corpus.windows:
                return fingerprint(read_windows(corpus, first_window, *windows))
        return None

    return text_of


def packed_texts(cache: Path) -> list[Path]:
    """Return the folders of a cache's completely packed texts, in order."""
    return [folder for folder in _folders(cache) if Paths(folder).index.exists()]


def _folders(cache: Path) -> list[Path]:
    return [cache / "corpus", *sorted(cache.glob("corpus-[0-9][0-9][0-9][0-9]"))]


def read_windows(corpus: PackedCorpus, first_window: int, start: int, stop: int) -> list[Window]:
    """Return windows of a text by their numbers in the cache."""
    windows = corpus.read(start - first_window, stop - first_window)
    return [replace(window, index=first_window + window.index) for window in windows]
