"""Decompress files as a stream, in bounded memory, to the end and no further.

Files are concatenated, cut off and padded in practice. Several members (gzip), streams (bzip2, xz)
or frames (zstd) one after another are one text. A file that ends within one is refused: it was not
fetched whole. So is anything other than zero bytes after the last one.

At most `_BLOCK_BYTES` are decompressed at a time, whatever the ratio. A zstd frame needs the memory
of its window, up to 2 GiB (`zstd --long=31`), an xz stream that of its dictionary, up to
`_XZ_MEMORY`.
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
_ZSTD_INPUT = 2 << 10  # decompresses to 64 MiB at most: 4 bytes of input can be a block of 128 KiB
_ZSTD_WINDOW = 1 << 31
_XZ_MEMORY = 1 << 31


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
    """zstandard's decompressor with that interface; it decompresses all of its input at once."""

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


class Compression(NamedTuple):
    """How files of one suffix are decompressed."""

    magic: bytes
    """First bytes of every such file."""
    decompressor: Callable[[], Any]
    step: int = 1 << 16
    """Bytes of input per call of the decompressor."""


COMPRESSIONS = {
    ".gz": Compression(b"\x1f\x8b\x08", _Zlib),
    ".bz2": Compression(b"BZh91AY&SY", bz2.BZ2Decompressor),
    ".xz": Compression(b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)),
    ".zst": Compression(b"\x28\xb5\x2f\xfd", _Zstd, _ZSTD_INPUT),
}
"""Compressions by the suffix of the files."""


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, by its name."""
    return path.suffix.lower() in COMPRESSIONS


def content_suffix(path: Path) -> str:
    """Return the suffix that says what a file holds: the one before a suffix of compression."""
    return (path.with_suffix("") if is_compressed(path) else path).suffix.lower()


def open_decompressed(path: Path, name: str, raw: BinaryIO) -> io.BufferedReader:
    """Open a compressed file for reading its content.

    Args:
        path: path of the file; the suffix says how it is compressed.
        name: name of the file, for errors.
        raw: the open file.

    Returns:
        A reader that raises CorpusError for data that cannot be decompressed or end too early.
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
    _, make, step = COMPRESSIONS[suffix]
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
    reason = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in reason.lower():
        return CorpusError(
            f"decompressing {name} takes more memory than there is, or than 2 GiB ({reason}); "
            "compress it anew with a smaller window"
        )
    if members:
        return CorpusError(
            f"{name} holds something else after {members} complete part(s) of {suffix} data, "
            f"before byte {raw.tell()} ({reason}); fetch it anew, or cut it off there"
        )
    return CorpusError(
        f"{name} cannot be decompressed as {suffix} before byte {raw.tell()} ({reason}); fetch it "
        "anew, and check that its suffix is that of its compression"
    )
