"""Open, parse and display files of unknown origin safely.

Only regular files are opened (`open_regular`): a pipe or a device could block a reader or never
end. JSON is parsed only after its size has been checked (`parse_json`). Text is displayed with
control characters escaped (`printable`): a terminal executes them, and bidirectional overrides make
a line read as another one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, NoReturn

LARGEST_JSON = 1 << 20
"""Bytes that a JSON document may have by default."""

MOST_VALUES = 1 << 16
"""Values that a JSON document may have by default; each takes up to about 100 bytes."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, save tab and line feed
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"  # bidirectional and invisible ones
    "\u2028\u2029\ufeff\ufff9-\ufffb"
    "\ud800-\udfff"  # surrogates, which no encoding writes
    "\U000e0000-\U000e007f"  # tags: text that is not seen
    "]"
)


class NotRegularError(OSError):
    """A path is a pipe, device, socket or folder; a regular file is expected."""


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Symbolic links are followed. Opening a pipe does not block.

    Raises:
        NotRegularError: the path is something else.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device without a driver
            raise _not_regular(path, "a socket or a device") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = next((name for test, name in _KINDS if test(mode)), "no regular file")
        raise _not_regular(path, what)
    return descriptor


def read_regular(path: str | Path, largest: int = LARGEST_JSON) -> bytes:
    """Read a regular file whole.

    Raises:
        NotRegularError: the path is a pipe, a device, a socket or a folder.
        ValueError: the file has more than `largest` bytes, which were not read.
        OSError: the file cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= largest:
            data = file.read(largest + 1)  # a file of /proc reports a size of 0
            size = max(size, len(data))
        if size > largest:
            raise ValueError(f"it has {size:,} bytes, more than the {largest:,} that are read")
        return data


def parse_json(data: bytes, *, largest: int = LARGEST_JSON, most: int = MOST_VALUES) -> Any:
    """Parse JSON in memory that is bounded before anything is parsed.

    Args:
        data: JSON in UTF-8.
        largest: number of bytes that it may have.
        most: number of values that it may have, keys included.

    Raises:
        ValueError: the data are larger, or no JSON; `NaN`, lone surrogates and nesting deeper than
            the parser recurses are refused too.
    """
    if len(data) > largest:
        raise ValueError(f"it has {len(data):,} bytes, more than the {largest:,} that are read")
    values = sum(map(data.count, (b",", b"[", b"{", b":")))  # those in strings too
    if values > most:
        raise ValueError(f"it has about {values:,} values, more than the {most:,} that are read")
    try:
        value = json.loads(data.decode(), parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if b"\\u" in data:  # an escape may name half a character
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: str | Path, *, largest: int = LARGEST_JSON, most: int = MOST_VALUES) -> Any:
    """Parse a JSON file in bounded memory.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: see `parse_json`.
    """
    return parse_json(read_regular(path, largest), largest=largest, most=most)


def printable(text: str, longest: int | None = None) -> str:
    """Return text that is safe to display: control characters are escaped, as `\\x1b`.

    Args:
        text: any text; tabs and line feeds stay.
        longest: number of characters to keep; the middle of a longer text is cut out.
    """
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters cut) ... {text[-half:]}"
    return _UNSAFE.sub(_escape, text)


def shown(value: object, longest: int = 120) -> str:
    """Return a value for an error message: like `repr`, but escaped and never long.

    Args:
        value: any value, however large or deeply nested.
        longest: number of characters of a single string or number in it.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 8, 8, 8
    short.maxstring = short.maxother = short.maxlong = longest
    try:
        return printable(short.repr(value), 8 * longest)
    except Exception as error:  # a `__repr__` that fails, or a number too long to print
        return f"<{type(value).__name__}, not shown: {type(error).__name__}>"


def json_text(value: object, *, indent: int | None = 2) -> str:
    """Return a value as ASCII JSON text, with null for NaN and infinity, which JSON lacks."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _not_regular(path: str | Path, what: str) -> NotRegularError:
    said = f"it is {what}, where a regular file is expected"
    return NotRegularError(errno.EINVAL, said, str(path))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
