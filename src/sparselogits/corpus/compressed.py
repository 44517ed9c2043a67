"""Read compressed files as a stream of lines, in bounded memory, to the end and no further.

Files are concatenated, cut off and padded in practice. Several members (gzip), streams (bzip2, xz)
or frames (zstd) one after another are one text. A file that ends within one is refused: it was not
fetched whole. So is anything else behind the last one, but for zero bytes.

What is unpacked at a time is bounded by `_BLOCK_BYTES`, whatever the ratio. A zstd frame needs the
memory of its window, up to 2 GiB (`zstd --long=31`), an xz stream that of its dictionary, up to
`_XZ_MEMORY`.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparselogits.errors import CorpusError

LONGEST_LINE = 1 << 30
"""Bytes of a line; a longer one is no record, but what a few bytes can unpack to."""
_BLOCK_BYTES = 1 << 20
_ZSTD_INPUT = 2 << 10  # unpacks to 64 MiB at most: 4 bytes of input can be a block of 128 KiB
_ZSTD_WINDOW = 1 << 31
_XZ_MEMORY = 1 << 31

Decode = Callable[[bytes], bytes]


class _Zlib:
    """zlib's decompressor with the interface of those of `bz2` and `lzma`."""

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._decompressor.unconsumed_tail

    def decompress(self, data: bytes, most: int) -> bytes:
        waiting = self._decompressor.unconsumed_tail + data
        return self._decompressor.decompress(waiting, most)


class _Zstd:
    """zstandard's, likewise; it unpacks all it is given, so it is given little."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._decompressor: Any = decompressor.decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._decompressor.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._decompressor.unused_data)

    def decompress(self, data: bytes, most: int) -> bytes:
        return bytes(self._decompressor.decompress(data))


COMPRESSION: dict[str, tuple[Callable[[], Any], int]] = {
    ".gz": (_Zlib, 1 << 16),
    ".bz2": (bz2.BZ2Decompressor, 1 << 16),
    ".xz": (lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), 1 << 16),
    ".zst": (_Zstd, _ZSTD_INPUT),
}
"""By suffix: what makes a decompressor, and the bytes that it is given at a time."""


def open_lines(path: Path, name: str, raw: BinaryIO) -> io.BufferedReader:
    """Open a compressed file for reading lines.

    Args:
        path: of the file; its suffix says how it is compressed.
        name: of the file, for errors.
        raw: the file, open.

    Reading raises CorpusError for data that cannot be unpacked, or that ends too early.
    """
    stream = _Blocks(_blocks(path.suffix.lower(), name, raw))
    return io.BufferedReader(stream, buffer_size=_BLOCK_BYTES)


class _Blocks(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _blocks(suffix: str, name: str, raw: BinaryIO) -> Iterator[bytes]:
    make, step = COMPRESSION[suffix]
    decompressor, data, members = None, b"", 0
    try:
        while True:
            if decompressor is None:
                data = (data or raw.read(step)).lstrip(b"\0")  # tapes and some tools pad with zeros
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
                        f"{name} ends in the middle of its compressed data: it was not fetched or "
                        "written whole. Fetch it anew"
                    )
            given, data = data[:step], data[step:]
            block = decompressor.decompress(given, _BLOCK_BYTES)
            if block:
                yield block
            if decompressor.eof:
                data = decompressor.unused_data + data
                decompressor, members = None, members + 1
    except (OSError, EOFError, lzma.LZMAError, zlib.error, MemoryError, ValueError) as error:
        raise _refused(suffix, name, raw, members, error) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # imported only where it is needed
            raise
        raise _refused(suffix, name, raw, members, error) from error


def _refused(suffix: str, name: str, raw: BinaryIO, members: int, error: Exception) -> CorpusError:
    said = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in said.lower():
        return CorpusError(
            f"{name} needs more memory to be unpacked than there is, or than 2 GiB ({said}); pack "
            "it anew with a smaller window"
        )
    if members:
        return CorpusError(
            f"{name} holds something else behind {members} whole part(s) of {suffix} data, before "
            f"byte {raw.tell()} ({said}); fetch it anew, or cut it off there"
        )
    return CorpusError(
        f"{name} cannot be decompressed as {suffix} before byte {raw.tell()} ({said}); fetch it "
        "anew, and check that its name says how it is compressed"
    )
