"""Read a cache with code written from docs/format.md alone, without code of the library.

The reader is slow, plain Python; it uses a Parquet reader and pcodec's decoder for single pages.
"""

import base64
import hashlib
import json
import struct
from decimal import Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow.parquet as pq
from pcodec import wrapped


@cache
def level_table() -> list[float]:
    """Return the levels of docs/format.md, each computed with 50 decimal digits."""
    with localcontext(prec=50):
        low = [Decimal(2) ** (Decimal(j) / 32) for j in range(-126 * 32, -32)]
        middle = [1 - Decimal(2) ** (Decimal(-j) / 32) for j in range(32, 16 * 32 + 1)]
        high = [Decimal(2) ** (Decimal(j) / 32) for j in range(97 * 32 + 1)]
        return [float(np.float32(float(v))) for v in (Decimal(0), *low, *middle, *high)]


def read_cache(root: Path) -> list[dict[str, Any]]:
    """Return the rows of a cache, with `targets` as [(position, id, weight, count)]."""
    content = json.loads((root / "cache.json").read_text())
    identity = content["identity"]
    teacher = {k: v for k, v in identity["teacher"].items() if k != "name"}
    compared = {**identity, "teacher": teacher}
    canonical = json.dumps(compared, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(canonical.encode()).hexdigest() == content["fingerprint"]
    windows = []
    for path in sorted((root / "shards").glob("windows-*.parquet")):
        check_guard(path.read_bytes())
        file = pq.ParquetFile(path, page_checksum_verification=True)
        about = json.loads(file.metadata.metadata[b"sparselogits"])
        assert about["fingerprint"] == content["fingerprint"]
        for number, row in enumerate(file.read().to_pylist()):
            assert row["window_index"] == about["start"] + number
            check_row(row)
            row["targets"] = read_block(row, number, about["tables"], identity)
            windows.append(row)
    return windows


def check_guard(data: bytes) -> None:
    footer = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    n, footer_crc, guard_crc, magic = struct.unpack("<III8s", data[footer - 20 : footer])
    assert magic == b"SLGUARD1"
    assert google_crc32c.value(data[footer:]) == footer_crc
    guard = footer - 20 - 20 * n
    assert google_crc32c.value(data[guard : footer - 12]) == guard_crc
    expected = 0
    for first, length, crc in struct.iter_unpack("<QQI", data[guard : footer - 20]):
        assert first == expected
        assert google_crc32c.value(data[first : first + length]) == crc
        expected = first + length
    assert expected == guard


def check_row(row: dict[str, Any]) -> None:
    def ints(values: list[int]) -> bytes:
        return struct.pack(f"<{len(values)}i", *values)

    mask = bytes(row["mask"] or [])
    data = struct.pack("<qI", row["window_index"], len(row["tokens"])) + ints(row["tokens"])
    data += struct.pack("<I", len(row["document_starts"])) + ints(row["document_starts"])
    data += struct.pack("<I", len(mask)) + mask
    data += struct.pack("<ff", row["teacher_loss"], row["teacher_entropy"])
    data += struct.pack("<I", len(row["targets"])) + row["targets"]
    if "inputs" in row:
        assert len(row["inputs"]) == sum(mask)
        data += struct.pack("<I", len(row["inputs"])) + ints(row["inputs"])
        data += struct.pack("<f", row["rate"])
    assert google_crc32c.value(data) == row["crc32c"]


def read_block(
    row: dict[str, Any], number: int, tables: dict[str, Any], identity: dict[str, Any]
) -> list[tuple[int, int, float, int | None]]:
    block, tokens, codec = row["targets"], row["tokens"], identity["codec"]
    file, _ = wrapped.FileDecompressor.new(b"\x04\x01")
    at = 4

    def page(name: str, length: int) -> list[Any]:
        nonlocal at
        if length == 0:
            return []
        table = [text for first, text in tables[name] if first <= number][-1]
        dtype = "f32" if name == "weights" else "u32"
        chunk, _ = file.chunk_decompressor(base64.b64decode(table), dtype)
        out = np.empty(length, {"f32": np.float32, "u32": np.uint32}[dtype])
        progress, used = chunk.read_page_into(block[at:], length, out)
        assert progress.finished
        at += used
        return out.tolist()

    mask = row["mask"] or [True] * len(tokens)
    place_to_position = sorted(
        (p for p in range(len(tokens)) if mask[p]), key=lambda p: (tokens[p], p)
    )
    pairs = set()
    hits = page("hits", len(place_to_position))
    hit_at = {p for p, hit in zip(place_to_position, hits, strict=True) if hit}
    labels = tokens if "objective" in identity else [*tokens[1:], None]
    pairs |= {(p, labels[p]) for p in hit_at}
    lists, previous = struct.unpack("<I", block[:4])[0], -1
    ids = []
    for gap in page("ids", lists):
        previous += gap + 1
        ids.append(previous)
    sizes = [size + 1 for size in page("sizes", lists)]
    for c in range(8):
        inside = [
            (i, s) for i, s in zip(ids, sizes, strict=True) if min(s.bit_length() - 1, 7) == c
        ]
        gaps = iter(page(f"places_{c}", sum(s for _, s in inside)))
        for i, size in inside:
            place = -1
            for _ in range(size):
                place += next(gaps) + 1
                assert (place_to_position[place], i) not in pairs
                pairs.add((place_to_position[place], i))
    entries = sorted(pairs)
    assert all(0 <= i < identity["vocab_size"] for _, i in entries)
    counts: list[int | None] = [None] * len(entries)
    if "rounds" in codec:
        counts = list(read_counts(entries, hit_at, labels, codec["rounds"], page))
    stored = lambda length: page("weights", length)  # noqa: E731
    if codec["version"] == 2:
        stored = lambda length: [level_table()[k] for k in page("levels", length)]  # noqa: E731
    if codec["weights"] == "counts":
        weights = [float(np.float32(c) / np.float32(codec["rounds"])) for c in counts]
    elif codec["weights"] == "threshold":
        heavy = page("heavy", len(entries))
        told = iter(stored(sum(heavy)))
        weights = [next(told) if h else float(np.float32(codec["tau"])) for h in heavy]
    else:
        weights = stored(len(entries))
    assert at == len(block)
    return [(p, i, w, c) for (p, i), w, c in zip(entries, weights, counts, strict=True)]


def read_counts(
    entries: list[tuple[int, int]], hit_at: set[int], labels: list[Any], rounds: int, page: Any
) -> list[int]:
    untold, seen = set(), set()
    for number, (position, i) in enumerate(entries):
        first = position not in seen
        seen.add(position)
        if (position in hit_at and i == labels[position]) or (first and position not in hit_at):
            untold.add(number)
    told = iter(page("counts", len(entries) - len(untold)))
    counts = [0 if number in untold else next(told) + 1 for number in range(len(entries))]
    for number in untold:
        position = entries[number][0]
        others = sum(c for c, (p, _) in zip(counts, entries, strict=True) if p == position)
        counts[number] = rounds - others
        assert counts[number] >= 1
    return counts
