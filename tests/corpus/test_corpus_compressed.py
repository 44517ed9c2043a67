"""Test compressed JSON lines: all kinds of tools, truncated, padded and hostile files."""

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from tests.conftest import run_python

from sparselogits.corpus import open_source
from sparselogits.errors import CorpusError

RNG = random.Random(3)
TEXTS = [f"{n} " + "".join(RNG.choices("abcdefgh \n", k=RNG.randint(1, 4000))) for n in range(300)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def zstd_long(data: bytes) -> bytes:
    """A frame with a window of 1 GiB and no size in its header, as of `zstd --long=30`."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    made = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return made.compress(data) + made.flush()


def skippable(data: bytes) -> bytes:
    """Frames that pzstd and seekable formats put between those of data."""
    frame = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"index"
    return frame + zstandard.compress(data) + frame


COMPRESS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": (".gz", gzip.compress),
    "bzip2": (".bz2", bz2.compress),
    "xz": (".xz", lzma.compress),
    "lzma, the old format": (".xz", lambda data: lzma.compress(data, lzma.FORMAT_ALONE)),
    "zstd": (".zst", zstandard.compress),
    "zstd --long": (".zst", zstd_long),
    "zstd with skippable frames": (".zst", skippable),
}


def read(path: Path) -> list[str]:
    return list(open_source(path).documents())


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("padding", [b"", b"\0" * 1000])
def test_what_tools_write_is_read(kind, members, padding, tmp_path):
    suffix, compress = COMPRESS[kind]
    if kind.startswith("lzma") and (members > 1 or padding):
        pytest.skip("one stream, unpadded")
    # members end anywhere, within a line as well
    cuts = [len(LINES) * n // members for n in range(members + 1)]
    parts = [compress(LINES[a:b]) + padding for a, b in pairwise(cuts)]
    path = tmp_path / f"pages.jsonl{suffix}"
    path.write_bytes(b"".join(parts))
    assert read(path) == TEXTS
    upper = path.rename(tmp_path / f"pages.jsonl{suffix.upper()}")
    assert read(upper) == TEXTS


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_file_that_was_cut_off_is_refused(kind, tmp_path):
    """At any byte: what decompressors read up to there is no whole text."""
    suffix, compress = COMPRESS[kind]
    whole = compress(LINES)
    path = tmp_path / f"pages.jsonl{suffix}"
    for cut in (3, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        if kind.endswith("skippable frames") and cut < 10:
            continue
        with pytest.raises(CorpusError, match=r"pages\.jsonl.*download it again"):
            read(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_what_is_no_compressed_data_is_named(suffix, tmp_path):
    compress = next(own for name, own in COMPRESS.values() if name == suffix)
    path = tmp_path / f"pages.jsonl{suffix}"
    path.write_bytes(LINES)
    with pytest.raises(CorpusError, match=rf"cannot be decompressed as \{suffix} before byte \d+"):
        read(path)
    path.write_bytes(compress(LINES) + b"trailing words of another tool")
    with pytest.raises(
        CorpusError, match=r"other data after 1 complete part\(s\).*remove the other"
    ):
        read(path)
    damaged = bytearray(compress(LINES))
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(CorpusError, match=r"pages\.jsonl"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(CorpusError, match="is empty"):
        read(path)


BOMB = """
import resource, sys
from sparselogits.corpus import open_source
bytes_now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (bytes_now + (200 << 20),) * 2)
for path in sys.argv[1:]:
    print(list(open_source(path).documents()))
"""


def test_memory_does_not_follow_what_is_unpacked(tmp_path, library_environment):
    """Hundreds of megabytes of blank lines in a few kilobytes, with 200 MB of address space."""
    line = b" " * ((1 << 20) - 1) + b"\n"
    openers: dict[str, Callable[[io.BufferedWriter], io.IOBase]] = {
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1),
        ".bz2": lambda raw: bz2.BZ2File(raw, "wb", compresslevel=1),
        ".xz": lambda raw: lzma.LZMAFile(raw, "wb", preset=0),  # noqa: SIM115
        ".zst": lambda raw: zstandard.ZstdCompressor(level=1).stream_writer(raw, closefd=False),
    }
    paths = []
    for suffix, opener in openers.items():
        paths.append(tmp_path / f"pages.jsonl{suffix}")
        with paths[-1].open("wb") as raw, opener(raw) as stream:
            for _ in range(250 if suffix in (".bz2", ".xz") else 900):
                stream.write(line)
            stream.write(b'{"text": "the end"}\n')
    done = run_python("-c", BOMB, *paths, env=library_environment)
    assert done.stdout == "['the end']\n" * len(paths), done.stderr
