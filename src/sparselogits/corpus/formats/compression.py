"""Decompress files as a stream, in bounded memory.

Files in practice are concatenated, truncated or padded. Consecutive members (gzip), streams (bzip2,
xz) or frames (zstd) are read as one text. A file that ends inside one of these parts is rejected,
and so is a file with data other than zero bytes after the last part.

At most `_BLOCK_BYTES` (64 MiB for zstd) are decompressed at a time, whatever the compression ratio.
A zstd frame also needs memory for its window, up to 2 GiB (`zstd --long=31`), and an xz stream for
its dictionary, up to `_XZ_MEMORY`.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sparselogits.errors import CorpusError

_BLOCK_BYTES = 1 << 20
_ZSTD_INPUT = 2 << 10  # bytes, decompressed to at most 64 MiB: a block of 4 bytes may give 128 KiB
_ZSTD_WINDOW = 1 << 31
_XZ_MEMORY = 1 << 31


class _Decompressor:
    """Adapter that gives decompressors of zlib and zstandard the interface of `BZ2Decompressor`.

    Args:
        inner: decompressor object of zlib or zstandard.
        limited: whether `inner` can limit its output. If not (zstandard), `decompress` returns the
            output of all its input, whatever `most` is, so inputs have to be small.
    """

    def __init__(self, inner: Any, *, limited: bool) -> None:
        self._inner, self._limited = inner, limited

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, most: int) -> bytes:
        limit = (most,) if self._limited else ()
        return bytes(self._inner.decompress(self._inner.unconsumed_tail + data, *limit))


def _zstd() -> _Decompressor:
    import zstandard  # needed only for .zst files

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    return _Decompressor(decompressor.decompressobj(), limited=False)


def _gzip() -> _Decompressor:
    return _Decompressor(zlib.decompressobj(wbits=31), limited=True)


class Compression(NamedTuple):
    """Compression format of the files with one suffix."""

    magic: bytes
    """First bytes of most files in this format."""
    decompressor: Callable[[], Any]
    """Function that returns a new decompressor with the interface of `bz2.BZ2Decompressor`."""
    step: int = 1 << 16
    """Maximum number of input bytes per call of the decompressor."""


COMPRESSIONS = {
    ".gz": Compression(b"\x1f\x8b\x08", _gzip),
    ".bz2": Compression(b"BZh91AY&SY", bz2.BZ2Decompressor),
    ".xz": Compression(b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)),
    ".zst": Compression(b"\x28\xb5\x2f\xfd", _zstd, _ZSTD_INPUT),
}
"""Compression formats by suffix."""


def is_compressed(path: Path) -> bool:
    """Return whether the suffix of a file is that of a compression format."""
    return path.suffix.lower() in COMPRESSIONS


def content_suffix(path: Path) -> str:
    """Return the suffix of a file in lower case, ignoring a suffix of compression."""
    return (path.with_suffix("") if is_compressed(path) else path).suffix.lower()


def open_decompressed(path: Path, name: str, raw: BinaryIO) -> io.BufferedReader:
    """Return a reader of the decompressed content of an open file.

    The suffix of `path` determines the compression format, and `name` is used in errors. The reader
    raises CorpusError if the data cannot be decompressed or are incomplete.
    """
    stream = _Blocks(_blocks(path.suffix.lower(), name, raw))
    return io.BufferedReader(stream, buffer_size=_BLOCK_BYTES)


class _Blocks(io.RawIOBase):
    """File-like reader of blocks of bytes as one continuous file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _blocks(suffix: str, name: str, raw: BinaryIO) -> Iterator[bytes]:
    _, make, step = COMPRESSIONS[suffix]
    decompressor, data, members = None, b"", 0
    try:
        while True:
            if decompressor is None:
                data = (data or raw.read(step)).lstrip(b"\0")  # some tools pad files with zeros
                if not data:
                    if not (following := raw.read(step)):
                        return
                    data = following
                    continue
                decompressor = make()
            elif decompressor.needs_input:
                data = data or raw.read(step)
                if not data:
                    raise CorpusError(
                        f"{name} ends in the middle of its compressed data, so it is incomplete; "
                        "download it again"
                    )
            given, data = data[:step], data[step:]
            block = decompressor.decompress(given, _BLOCK_BYTES)
            if block:
                yield block
            if decompressor.eof:
                data = decompressor.unused_data + data
                decompressor, members = None, members + 1
    except Exception as error:
        known = (OSError, EOFError, lzma.LZMAError, zlib.error, MemoryError, ValueError)
        # zstandard, which may not be imported here, has its own exception
        if not isinstance(error, known) and type(error).__name__ != "ZstdError":
            raise
        raise _decompression_error(suffix, name, raw, members, error) from error


def _decompression_error(
    suffix: str, name: str, raw: BinaryIO, members: int, error: Exception
) -> CorpusError:
    reason = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in reason.lower():
        return CorpusError(
            f"decompressing {name} takes more than the available memory or 2 GiB ({reason}); "
            "compress it again with a smaller window"
        )
    if members:
        return CorpusError(
            f"{name} contains other data after {members} complete part(s) of {suffix} data, before "
            f"byte {raw.tell()} ({reason}); download it again, or remove the other data"
        )
    return CorpusError(
        f"{name} cannot be decompressed as {suffix} before byte {raw.tell()} ({reason}); download "
        "it again, and check that its suffix is that of its compression"
    )
