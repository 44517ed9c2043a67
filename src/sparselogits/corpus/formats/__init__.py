"""List the document formats of this package and of other packages, and select one for a file.

A format is a subclass of `Format`. Another package declares a format by an entry point in its
pyproject.toml, so that every process that reads text (commands, packing workers) can load it:

    [project.entry-points."sparselogits.formats"]
    tsv = "my_package:TabSeparated"
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from sparselogits.corpus.formats.compression import COMPRESSIONS, content_suffix, is_compressed
from sparselogits.corpus.formats.format import Format, SourceFile, Span, read_errors
from sparselogits.corpus.formats.lines import JsonLines, LineFormat
from sparselogits.corpus.formats.tables import Arrow, Parquet
from sparselogits.corpus.formats.text import Text
from sparselogits.corpus.formats.tokens import Datatrove, Megatron, TokenShard
from sparselogits.entry_points import load_declared
from sparselogits.errors import InvalidArgumentError

GROUP = "sparselogits.formats"
"""Name of the entry-point group in which packages declare document formats."""

_BUILT_IN: tuple[Format, ...] = (
    *(Text(), JsonLines(), Parquet(), Arrow()),
    *(Datatrove(), TokenShard(), Megatron()),
)


@cache
def known_formats() -> tuple[Format, ...]:
    """Return the formats of this package and the valid ones that other packages declare."""
    found = list(_BUILT_IN)
    for declared in load_declared(GROUP, "document format", partial(_validated, known=found)):
        found.append(declared)
    return tuple(found)


def _validated(name: str, kind: object, *, known: list[Format]) -> Format:
    """Return an instance of the format class that an entry point declares, after validating it."""
    if not (isinstance(kind, type) and issubclass(kind, Format)):
        raise InvalidArgumentError(
            f"the entry point {name!r} names {kind!r}; declare a subclass of "
            "sparselogits.corpus.Format"
        )
    added = kind()
    if getattr(added, "name", None) != name or any(other.name == name for other in known):
        raise InvalidArgumentError(
            f"the format {kind.__name__} of the entry point {name!r} has the name "
            f"{getattr(added, 'name', None)!r}; give the class and the entry point the same name, "
            f"other than {', '.join(other.name for other in known)}"
        )
    taken = {*COMPRESSIONS, *(suffix for other in known for suffix in other.all_suffixes)}
    for suffix in added.all_suffixes:
        if suffix in taken or not suffix.startswith(".") or suffix != suffix.lower():
            raise InvalidArgumentError(
                f"the format {name!r} has the suffix {suffix!r}; declare a suffix in lower case "
                f"that begins with a dot and is none of {', '.join(sorted(taken))}"
            )
    return added


def format_in_folder(path: Path) -> Format | None:
    """Return the format whose `suffixes` contain the suffix of a file; None if there is none.

    For a compressed file, the format must be `compressible`, and may have the suffix among its
    `weak_suffixes` or `named_suffixes` instead.
    """
    suffix = content_suffix(path)
    if is_compressed(path):
        matching = (f for f in known_formats() if f.compressible and suffix in f.all_suffixes)
        return next(matching, None)
    return next((f for f in known_formats() if suffix in f.suffixes), None)


def format_with_weak_suffix(path: Path) -> Format | None:
    """Return the format whose `weak_suffixes` contain a file's suffix; None if there is none."""
    if path.name.endswith(".bos.idx"):  # positions of documents, next to NeMo AutoModel's .bin
        return None
    suffix = path.suffix.lower()
    return next((f for f in known_formats() if suffix in f.weak_suffixes), None)


def format_of_named_file(path: Path) -> Format | None:
    """Return the format of a named file; None for a compressed file of no compressible format.

    A file with an unknown suffix that is not compressed is read as text.
    """
    found = format_in_folder(path)
    if found is None and not is_compressed(path):
        suffix = path.suffix.lower()
        return next((f for f in known_formats() if suffix in f.all_suffixes), Text())
    return found


__all__ = [
    "COMPRESSIONS",
    "GROUP",
    "Arrow",
    "Format",
    "JsonLines",
    "LineFormat",
    "Parquet",
    "SourceFile",
    "Span",
    "Text",
    "content_suffix",
    "format_in_folder",
    "format_of_named_file",
    "format_with_weak_suffix",
    "is_compressed",
    "known_formats",
    "read_errors",
]
