"""The texts of a cache: the one it was begun with, and those appended later.

    CACHE/corpus         the first text, packed
    CACHE/corpus-0001    the next one, and so on

A text's windows are numbered from where those of the text before it end; each text drops its own
last partial window, and its own last shard may be short. So nothing that was written before is
touched, read again or numbered anew, and each text can be built, resumed and checked by itself.
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
from sparselogits.store.ranges import Range
from sparselogits.store.storage.location import Location, is_url

_OWN = re.compile(r"corpus(-\d+)?|shards|texts|damaged|tokenizer|README\.md|.*\.(tmp|partial)")
"""Names in a cache's folder that may be there before its cache.json."""


@dataclass(frozen=True)
class TextPlace:
    """Where a text is packed, and the number its first window has in the cache."""

    folder: Path
    first_window: int


def require_room(cache: Location) -> None:
    """Check that a new cache can be begun in a folder: it is empty, or holds packed text only.

    Raises:
        CacheError: a file stands at the path, or the folder holds something else.
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
    """Where a text belongs in a cache. A text takes its place when its packing begins.

    Args:
        cache: the cache's folder; need not exist.
        source: the text.
        packing: what it is to be packed with.
        append: it comes on top of the texts that are there. If it is the first, or one that was
            appended before, its own place is found again, so that an interrupted build goes on.

    Raises:
        CacheError: there is nothing to append to, or the text before is not packed to its end.
        IdentityMismatchError: the texts that are there were packed otherwise (names the fields);
            or, without `append`, the cache was begun with another text.
    """
    if not append:
        begun = _begun_with(cache / "corpus")
        foreign = begun not in (None, source.fingerprint)
        if foreign and not is_abandoned(Paths(cache / "corpus")):
            raise IdentityMismatchError(
                f"the cache at {cache} was begun with other text; give that text to go on with it, "
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
                f"cannot append to {cache}: {error}. Where the new windows begin is known once the "
                "texts before are packed: run the command that began them, then append"
            ) from error
        _require_equal(cache, before.packing, packing)
    raise AssertionError("the numbers do not end")


def _begun_with(folder: Path) -> str | None:
    """Fingerprint of the text whose packing has begun in a folder."""
    made_from = Paths(folder).made_from
    return read_corpus_json(made_from)["source"]["fingerprint"] if made_from.exists() else None


def _require_equal(cache: Path, before: Packing, packing: Packing) -> None:
    there, here = before.to_json(), packing.to_json()
    differing = [f"{k}: {here[k]} here, {there[k]} there" for k in here if here[k] != there[k]]
    if differing:
        raise IdentityMismatchError(
            f"cannot append to {cache}: its texts were packed otherwise ({', '.join(differing)}). "
            "Use the same settings, or choose another output directory"
        )


def windows_of_texts(cache: Path) -> int | None:
    """How many windows the texts of a cache have together; None where they are not (all) here.

    A cache that was merged, or fetched from elsewhere, comes without its packed texts.
    """
    try:
        return sum(PackedCorpus.open(folder).windows for folder in _folders(cache))
    except CorpusError:
        return None


def text_of_windows(cache: Path) -> Callable[[Range], str | None]:
    """Return a function that gives the fingerprint of a range of windows in a cache's packed text.

    It gives None for windows whose text is not packed here (see `windows_of_texts`), and for those
    that cross from one text to the next.
    """
    texts: list[tuple[PackedCorpus, int]] = []
    with suppress(CorpusError):  # the texts after one that cannot be opened have no known place
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
    """The folders of a cache's texts that are packed to their end, in order."""
    return [folder for folder in _folders(cache) if Paths(folder).index.exists()]


def _folders(cache: Path) -> list[Path]:
    return [cache / "corpus", *sorted(cache.glob("corpus-[0-9][0-9][0-9][0-9]"))]


def read_windows(corpus: PackedCorpus, first_window: int, start: int, stop: int) -> list[Window]:
    """Windows of a text by their numbers in the cache."""
    windows = corpus.read(start - first_window, stop - first_window)
    return [replace(window, index=first_window + window.index) for window in windows]
