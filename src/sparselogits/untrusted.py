"""Open, parse and display untrusted files safely.

`open_regular` opens only regular files, because a pipe or device may block a reader or never end.
`parse_json` checks the size of JSON before it parses. `printable` escapes control characters,
because a terminal executes them and bidirectional overrides change how a line is displayed.
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
"""Default maximum size of a JSON document, in bytes."""

MOST_VALUES = 1 << 16
"""Default maximum number of values in a JSON document.

Each value occupies up to about 100 bytes in addition to the characters of a string.
"""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and line feed
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"  # bidirectional and invisible ones
    "\u2028\u2029\ufeff\ufff9-\ufffb"
    "\ud800-\udfff"  # surrogates, which UTF-8 cannot encode
    "\U000e0000-\U000e007f"  # tag characters, which are invisible
    "]"
)


class NotRegularError(OSError):
    """Raised if a path is a pipe, device, socket or folder instead of a regular file."""


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller must close.

    Symbolic links are followed, and opening a pipe does not block.

    Raises:
        NotRegularError: the path is not a regular file.
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
        raise _not_regular(path, kind_of_file(mode))
    return descriptor


def leads_outside(path: Path, folder: Path) -> bool:
    """Return whether links lead from a path in a folder to a file outside of it.

    In the hub's cache the files of a snapshot are links to `blobs` of the same repository. These
    blobs are regarded as part of the folder, which may be a folder within a snapshot.
    """
    real, home = (Path(os.path.realpath(own)) for own in (path, folder))  # a loop is no error
    snapshots = next((own for own in home.parents if own.name == "snapshots"), None)
    in_hub = snapshots is not None and real.is_relative_to(snapshots.parent / "blobs")
    return not real.is_relative_to(home) and not in_hub


def kind_of_file(mode: int) -> str:
    """Return the kind of a file that is not regular, as in "a socket", from its mode."""
    return _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")


def read_regular(path: str | Path, largest: int = LARGEST_JSON) -> bytes:
    """Return the bytes of a regular file of at most `largest` bytes.

    Raises:
        NotRegularError: the path is a pipe, a device, a socket or a folder.
        ValueError: the file is larger than `largest` bytes.
        OSError: the file cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= largest:
            data = file.read(largest + 1)  # a file of /proc reports a size of 0
            size = max(size, len(data))
        if size > largest:
            raise ValueError(f"it has {size:,} bytes, more than the {largest:,} that are allowed")
        return data


def parse_json(data: bytes, *, largest: int = LARGEST_JSON, most: int = MOST_VALUES) -> Any:
    """Parse JSON in bounded memory: size and number of values are checked before parsing.

    Args:
        data: JSON in UTF-8.
        largest: maximum number of bytes.
        most: maximum number of values, including keys, estimated by the number of commas, colons
            and opening brackets, even those in strings.

    Raises:
        ValueError: the data exceed a limit, are not JSON, are nested too deep, or contain `NaN`,
            `Infinity` or lone surrogates.
    """
    if len(data) > largest:
        raise ValueError(f"it has {len(data):,} bytes, more than the {largest:,} that are allowed")
    # an upper bound, since the characters may also occur in strings
    values = sum(map(data.count, (b",", b"[", b"{", b":")))
    if values > most:
        raise ValueError(f"it has about {values:,} values, more than the {most:,} that are allowed")
    try:
        value = json.loads(data.decode(), parse_constant=_reject_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if b"\\u" in data:  # an escape may be a lone surrogate, which cannot be encoded
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: str | Path, *, largest: int = LARGEST_JSON, most: int = MOST_VALUES) -> Any:
    """Parse a JSON file in bounded memory; for limits see `parse_json`.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: see `parse_json`.
    """
    return parse_json(read_regular(path, largest), largest=largest, most=most)


def printable(text: str, longest: int | None = None) -> str:
    """Return text with control characters, except tab and line feed, escaped (as `\\x1b`).

    Bidirectional marks, several invisible characters and lone surrogates are escaped too. The
    middle of a text with more than `longest` characters is cut out.
    """
    if longest is not None and len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters cut) ... {text[-half:]}"
    return _UNSAFE.sub(_escape, text)


def shown(value: object, longest: int = 120) -> str:
    """Return a short `repr` of a value with control characters escaped, for error messages.

    `longest` is the maximum number of characters per string or number within the value.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 8, 8, 8
    short.maxstring = short.maxother = short.maxlong = longest
    try:
        return printable(short.repr(value), 8 * longest)
    except Exception as error:  # a `__repr__` that fails, or a number too long to print
        return f"<{type(value).__name__}, not shown: {type(error).__name__}>"


def json_text(value: object, *, indent: int | None = 2) -> str:
    """Return a value as ASCII JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    """Return nested JSON values with None in place of NaN and infinity."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def _not_regular(path: str | Path, what: str) -> NotRegularError:
    """Return the error for a path that is not a regular file."""
    message = f"it is {what}, where a regular file is expected"
    return NotRegularError(errno.EINVAL, message, str(path))


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _escape(match: re.Match[str]) -> str:
    """Return the escape sequence of a character, as in a Python string."""
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
