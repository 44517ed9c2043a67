"""Know the document formats: those of this package, and those that other packages declare.

A format is a subclass of `Format`. Another package declares one by an entry point, in its
pyproject.toml, so that it is known in every process that reads text (commands, packing workers):

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
_OWN: tuple[Format, ...] = (
    *(Text(), JsonLines(), Parquet(), Arrow()),
    *(Datatrove(), TokenShard(), Megatron()),
)


@cache
def known_formats() -> tuple[Format, ...]:
    """Return every known format."""
    found = list(_OWN)
    for own in load_declared(GROUP, "document format", partial(_checked, known=found)):
        found.append(own)
    return tuple(found)


def _checked(name: str, kind: object, *, known: list[Format]) -> Format:
    """Return a format of a class that an entry point names.

    Raises:
        InvalidArgumentError: the class is no format, or its name or a suffix is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, Format)):
        raise InvalidArgumentError(f"{kind!r} is no subclass of sparselogits.corpus.Format")
    added = kind()
    if getattr(added, "name", None) != name or any(own.name == name for own in known):
        raise InvalidArgumentError(
            f"the format {kind.__name__} has the name {getattr(added, 'name', None)!r}; expected "
            f"that of the entry point, {name!r}, and none of {', '.join(o.name for o in known)}"
        )
    taken = {*COMPRESSIONS, *(suffix for own in known for suffix in own.all_suffixes)}
    for suffix in added.all_suffixes:
        if suffix in taken or not suffix.startswith(".") or suffix != suffix.lower():
            raise InvalidArgumentError(
                f"the format {name!r} has the suffix {suffix!r}; a suffix begins with a dot, is in "
                f"lower case and is none of {', '.join(sorted(taken))}"
            )
    return added


def format_in_folder(path: Path) -> Format | None:
    """Return the format that a file in a folder has by its name; None if the name tells none."""
    suffix = content_suffix(path)
    if is_compressed(path):
        named = (own for own in known_formats() if own.compressible and suffix in own.all_suffixes)
        return next(named, None)
    return next((own for own in known_formats() if suffix in own.suffixes), None)


def format_with_weak_suffix(path: Path) -> Format | None:
    """Return the format that has a file's suffix among its weak ones; None if there is none."""
    suffix = path.suffix.lower()
    return next((own for own in known_formats() if suffix in own.weak_suffixes), None)


def format_of_named_file(path: Path) -> Format | None:
    """Return the format of a file that the user names explicitly; None for compressed text.

    A file whose suffix belongs to no format is read as text.
    """
    found = format_in_folder(path)
    if found is None and not is_compressed(path):
        suffix = path.suffix.lower()
        return next((own for own in known_formats() if suffix in own.all_suffixes), Text())
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
