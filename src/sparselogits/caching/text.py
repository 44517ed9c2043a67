"""Manage the packed texts of a cache: the first text, and appended ones.

    CACHE/corpus         the first text, packed
    CACHE/corpus-0001    the next text, and so on

Window indices continue from one text to the next. No window or shard has tokens of two texts, and
the last shard of a text may have fewer windows. Appending therefore does not change existing files,
and each text can be built, resumed and verified separately.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import NamedTuple

from sparselogits.corpus import PackedCorpus, Packing, Source, Window, fingerprint
from sparselogits.corpus.claims import is_abandoned
from sparselogits.corpus.packed import Paths, read_description
from sparselogits.errors import CacheError, CorpusError, IdentityMismatchError
from sparselogits.files import is_clutter
from sparselogits.identity import differing_fields
from sparselogits.objectives import Masked
from sparselogits.store import Cache
from sparselogits.store.ranges import Range
from sparselogits.store.storage.location import Location, is_url

_ALLOWED = re.compile(r"corpus(-\d+)?|shards|texts|damaged|tokenizer|README\.md|.*\.(tmp|partial)")
"""Pattern of the names, besides hidden ones, in a folder in which a cache can be created."""


class TextPlace(NamedTuple):
    """Folder of a packed text, and the index of the text's first window in the cache."""

    folder: Path
    first_window: int


def require_room(cache: Location) -> None:
    """Validate that a new cache can be created in a folder.

    The folder may be missing, empty, or contain packed text or parts of a cache. Raises CacheError
    for a file, or a folder that is unreadable or has other content; a URL is not validated.
    """
    if is_url(cache):
        return
    folder = Path(cache)
    try:
        names = sorted(path.name for path in folder.iterdir() if not is_clutter(path.name))
    except FileNotFoundError:
        return
    except OSError as error:
        raise CacheError(
            f"cannot create a cache in {folder}: {error.strerror or error}; choose another "
            "folder (--out)"
        ) from error
    other = [n for n in names if not (n.startswith(".") or _ALLOWED.fullmatch(n))]
    if other:
        raise CacheError(
            f"{folder} is not a cache and contains other files ({', '.join(other[:3])}"
            f"{', ...' if len(other) > 3 else ''}); choose an empty or a new folder (--out)"
        )


def place_of_text(cache: Path, source: Source, packing: Packing, *, append: bool) -> TextPlace:
    """Return the location at which a text is or will be packed in a cache.

    Args:
        cache: folder of the cache, which may be missing.
        source: the text.
        packing: packing of the text.
        append: whether to add the text to the existing ones. If the cache already has the text, its
            location is returned, so that an interrupted build can resume.

    Raises:
        CacheError: with `append`, the cache has no text, or a text that is damaged or not
            completely packed.
        CorpusError: a `corpus.json` is damaged.
        IdentityMismatchError: with `append`, an existing text has another packing; without it, the
            cache was begun with other text.
    """
    if not append:
        begun = _begun_with(cache / "corpus")
        is_other = begun not in (None, source.fingerprint)
        if is_other and not is_abandoned(Paths(cache / "corpus")):
            raise IdentityMismatchError(
                f"the cache at {cache} was begun with other text; give that text to continue, "
                "--append to add this text to the cache, or another output directory"
            )
        return TextPlace(cache / "corpus", 0)
    first = 0
    for number in count():
        folder = cache / (f"corpus-{number:04d}" if number else "corpus")
        begun = _begun_with(folder)
        free = number > 0 and (not begun or is_abandoned(Paths(folder)))
        if free or begun == source.fingerprint:
            return TextPlace(folder, first)
        try:
            before = PackedCorpus.open(folder)
            first += before.windows
        except CorpusError as error:
            raise CacheError(
                f"cannot append to {cache}: {error}. The existing texts must be packed first: run "
                "the command with which they were begun again, then append"
            ) from error
        found = differing_fields(packing.to_json(), before.packing.to_json())
        differing = [f"{name}: {here}, expected {there}" for name, here, there in found]
        if differing:
            raise IdentityMismatchError(
                f"cannot append to {cache}: its texts have another packing "
                f"({', '.join(differing)}). Use the same settings, or choose another output "
                "directory"
            )
    raise AssertionError("unreachable: the loop is infinite")


def _begun_with(folder: Path) -> str | None:
    """Return the fingerprint of the text whose packing was begun in a folder; None if none was.

    Raises CorpusError if `corpus.json` is damaged.
    """
    made_from = Paths(folder).made_from
    return str(read_description(made_from)["source"]["fingerprint"]) if made_from.exists() else None


def windows_of_texts(cache: Path) -> int | None:
    """Return the total number of windows in a cache's packed texts; None if one cannot be opened.

    Caches that were merged or downloaded may lack their packed texts.
    """
    try:
        return sum(PackedCorpus.open(folder).windows for folder in _folders(cache))
    except CorpusError:
        return None


def text_of_windows(cache: Path) -> Callable[[Range], str | None]:
    """Return a function that computes the fingerprint of a range of windows from the packed texts.

    The function returns None for windows whose text is missing (see `windows_of_texts`), and for
    ranges that contain windows of two texts.
    """
    texts = opened_texts(cache)
    masks = not isinstance(Cache.open(cache).identity.predicts, Masked)

    def text_of(windows: Range) -> str | None:
        for corpus, first_window in texts:
            start, stop = (window - first_window for window in windows)
            if start >= 0 and stop <= corpus.windows:
                return fingerprint(read_windows(corpus, first_window, *windows), masks=masks)
        return None

    return text_of


def opened_texts(cache: Path) -> list[tuple[PackedCorpus, int]]:
    """Return a cache's packed texts, each with the index of its first window in the cache.

    Texts after one that cannot be opened are omitted.
    """
    texts: list[tuple[PackedCorpus, int]] = []
    with suppress(CorpusError):  # window indices after a text that cannot be opened are unknown
        first = 0
        for folder in _folders(cache):
            texts.append((PackedCorpus.open(folder), first))
            first += texts[-1][0].windows
    return texts


def packed_texts(cache: Path) -> list[Path]:
    """Return the folders of a cache's completely packed texts, in order."""
    return [folder for folder in _folders(cache) if Paths(folder).index.exists()]


def names_of_texts(cache: Location) -> dict[str, str]:
    """Return the names of a cache's packed texts by fingerprint; an empty dict for a URL."""
    if is_url(cache):
        return {}
    corpora = [PackedCorpus.open(folder) for folder in packed_texts(Path(cache))]
    return {corpus.text_fingerprint: corpus.source_name for corpus in corpora}


def _folders(cache: Path) -> list[Path]:
    """Return the folders of a cache's texts, in order; the first may be missing."""
    return [cache / "corpus", *sorted(cache.glob("corpus-[0-9][0-9][0-9][0-9]"))]


def read_windows(corpus: PackedCorpus, first_window: int, start: int, stop: int) -> list[Window]:
    """Read the windows [start, stop) of a cache from the text that begins at `first_window`."""
    windows = corpus.read(start - first_window, stop - first_window)
    return [replace(window, index=first_window + window.index) for window in windows]
