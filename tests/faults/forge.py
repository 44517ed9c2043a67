"""Forge shards and caches with valid checksums and arbitrary contents.

This module follows docs/format.md and Parquet's specification; it writes Parquet by itself, because
Parquet libraries do not write false headers. A `Shard` is valid at first. Change its contents
(`columns`, `description`, `numbers`) or its encoding (`pages`, `footer`), and `bytes()` adds valid
checksums: CRC32C per row, page checksums, guard, footer.

    shard = Shard.of(identity("float32"), records("float32", 0, 8))
    shard.numbers["weights"][3][5] = 3e38
    shard.write(folder)
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped

from sparselogits.identity import Identity
from sparselogits.store import WindowRecord
from sparselogits.store.codec import TargetCodec, TargetWindow

# Thrift's compact protocol
BOOL, I32, I64, BINARY, LIST, STRUCT = 1, 5, 6, 8, 9, 12


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def zigzag(value: int) -> bytes:
    return varint(value << 1 ^ value >> 63 if value < 0 else value << 1)


def struct_of(*fields: tuple[int, int, bytes]) -> bytes:
    """Return a Thrift struct of fields (number, type, value) in ascending order."""
    out, last = b"", 0
    for number, kind, value in fields:
        step = number - last
        out += bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + zigzag(number)
        out, last = out + value, number
    return out + b"\0"


def i32(number: int, value: int) -> tuple[int, int, bytes]:
    return number, I32, zigzag(value)


def i64(number: int, value: int) -> tuple[int, int, bytes]:
    return number, I64, zigzag(value)


def list_of(kind: int, items: Iterable[bytes], claimed: int | None = None) -> bytes:
    """Return a Thrift list, whose header states `claimed` elements if given."""
    parts = list(items)
    count = len(parts) if claimed is None else claimed
    head = bytes([count << 4 | kind]) if count < 15 else bytes([0xF0 | kind]) + varint(count)
    return head + b"".join(parts)


def string(text: bytes) -> bytes:
    return varint(len(text)) + text


# Parquet
TYPES = {"bool": 0, "int32": 1, "int64": 2, "float": 4, "binary": 6}
PLAIN, DICTIONARY, RLE, DELTA, DELTA_BYTES, SPLIT = 0, 8, 3, 5, 7, 9
UNCOMPRESSED, SNAPPY, GZIP, ZSTD = 0, 1, 2, 6
REQUIRED, OPTIONAL, REPEATED = 0, 1, 2


@dataclass(frozen=True)
class Form:
    """Encoding of a column: its path in the schema, its type and its maximum levels."""

    path: tuple[str, ...]
    type: str
    definition: int = 0
    repetition: int = 0


def _list(name: str, kind: str, deepest: int) -> Form:
    return Form((name, "list", "element"), kind, deepest, 1)


FORMS = {
    "window_index": Form(("window_index",), "int64"),
    "tokens": _list("tokens", "int32", 1),
    "document_starts": _list("document_starts", "int32", 1),
    "mask": _list("mask", "bool", 2),
    "targets": Form(("targets",), "binary"),
    "crc32c": Form(("crc32c",), "int32"),
    "teacher_loss": Form(("teacher_loss",), "float"),
    "teacher_entropy": Form(("teacher_entropy",), "float"),
    # of version 2 alone
    "inputs": _list("inputs", "int32", 1),
    "rate": Form(("rate",), "float"),
}


_CAUSAL = [name for name in FORMS if name not in ("inputs", "rate")]


def runs(levels: Iterable[tuple[int, int]]) -> bytes:
    """Return levels as run lengths from pairs (value, times), preceded by their length."""
    out = b"".join(varint(times << 1) + bytes([value]) for value, times in levels)
    return struct.pack("<I", len(out)) + out


def _levels(form: Form, rows: Sequence[Any]) -> bytes:
    if not form.repetition:
        return b""
    repetition: list[int] = []
    definition: list[int] = []
    for row in rows:
        count = 0 if row is None else len(row)
        repetition += [0, *[1] * (count - 1)]
        empty = 0 if row is None or form.definition == 1 else 1
        definition += [form.definition] * count if count else [empty]
    return b"".join(
        runs((v, len(list(same))) for v, same in groupby(levels))
        for levels in (repetition, definition)
    )


def _plain(form: Form, rows: Sequence[Any]) -> tuple[bytes, int]:
    """Return values in Parquet's plain encoding, and their number including nulls."""
    flat: list[Any] = []
    count = len(rows)
    if form.repetition:
        flat = [v for row in rows if row is not None for v in np.asarray(row).tolist()]
        count = sum(max(1, 0 if row is None else len(row)) for row in rows)
    else:
        flat = list(rows)
    match form.type:
        case "binary":
            return b"".join(struct.pack("<I", len(v)) + v for v in flat), count
        case "bool":
            return np.packbits(np.array(flat, np.uint8), bitorder="little").tobytes(), count
        case "int32":
            return np.array(flat, np.int64).astype(np.uint32).tobytes(), count
        case "int64":
            return np.array(flat, np.int64).tobytes(), count
        case _:
            return np.array(flat, np.float32).tobytes(), count


@dataclass
class Page:
    """Page and the claims of its header."""

    data: bytes
    values: int
    encoding: int = PLAIN
    uncompressed: int | None = None
    kind: int = 0
    codec: int = UNCOMPRESSED
    before: bytes = b""
    """Encoded page to write before this one, such as a dictionary."""
    claimed: dict[str, int] = field(default_factory=dict)
    """Claims of the footer about this page: `values`, `size`, `offset`, `codec`."""

    def written(self) -> bytes:
        crc = zlib.crc32(self.data)
        crc -= crc >> 31 << 32
        plain = len(self.data) if self.uncompressed is None else self.uncompressed
        inner = struct_of(i32(1, self.values), i32(2, self.encoding), i32(3, RLE), i32(4, RLE))
        header = struct_of(
            i32(1, self.kind),
            i32(2, plain),
            i32(3, len(self.data)),
            i32(4, crc),
            (5, STRUCT, inner),
        )
        return self.before + header + self.data


def honest_page(name: str, rows: Sequence[Any]) -> Page:
    form = FORMS[name]
    values, count = _plain(form, rows)
    if name not in ("tokens", "inputs"):
        return Page(_levels(form, rows) + values, count)
    split = np.frombuffer(values, np.uint8).reshape(-1, 4).T.tobytes()
    plain = _levels(form, rows) + split
    return compressed_tokens(plain, count)


def compressed_tokens(plain: bytes, count: int) -> Page:
    packed = pa.compress(plain, codec="zstd", asbytes=True)
    return Page(packed, count, SPLIT, len(plain), codec=ZSTD)


def dictionary_page(kind: str, value: bytes) -> bytes:
    """Return a dictionary of one value, followed by a page of indices."""
    data = struct.pack("<I", len(value)) + value if kind == "binary" else value
    inner = struct_of(i32(1, 1), i32(2, PLAIN))
    return struct_of(i32(1, 2), i32(2, len(data)), i32(3, len(data)), (7, STRUCT, inner)) + data


def repeated(name: str, rows: int, times: int, value: bytes) -> Page:
    """Return a column of `times` equal values in total, in a few dozen bytes."""
    form = FORMS[name]
    levels = b""
    if form.repetition:
        levels = runs([(0, 1), (1, times - rows), *[(0, 1)] * (rows - 1)])
        levels += runs([(form.definition, times)])
    indices = b"\0" + varint(times << 1)  # of no bits each
    return Page(levels + indices, times, DICTIONARY, before=dictionary_page(form.type, value))


def schema_elements(names: Collection[str]) -> list[bytes]:
    def element(name: str, repetition: int, kind: str | None = None, *more: Any) -> bytes:
        first = [] if kind is None else [i32(1, TYPES[kind])]
        return struct_of(*first, i32(3, repetition), (4, BINARY, string(name.encode())), *more)

    # an unsigned integer of 32 bits, by Parquet's logical type (field 10): INTEGER(32, false)
    integer = struct_of((1, 3, bytes([32])), (2, 2, b""))
    unsigned = struct_of((10, STRUCT, integer))
    out = [element("schema", REQUIRED, None, i32(5, len(names)))]
    for name in names:
        form = FORMS[name]
        if form.repetition:
            outer = OPTIONAL if form.definition == 2 else REQUIRED
            out.append(element(name, outer, None, i32(5, 1), i32(6, 3)))
            out.append(element("list", REPEATED, None, i32(5, 1)))
            out.append(element("element", REQUIRED, form.type))
        elif name == "crc32c":
            out.append(element(name, REQUIRED, form.type, i32(6, 13), (10, STRUCT, unsigned)))
        else:
            out.append(element(name, REQUIRED, form.type))
    return out


def pco(dtype: Any, windows: Sequence[np.ndarray]) -> tuple[bytes, list[bytes]]:
    """Return one coding table for all windows, and a page per window."""
    sizes = [len(w) for w in windows if len(w)]
    if not sizes:
        return b"", [b""] * len(windows)
    config = ChunkConfig(
        compression_level=8,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.exact_page_sizes(sizes),
    )
    whole = np.concatenate([np.asarray(w, dtype) for w in windows])
    chunk = wrapped.FileCompressor().chunk_compressor(whole, config)
    pages = iter(range(len(sizes)))
    return chunk.write_meta(), [chunk.write_page(next(pages)) if len(w) else b"" for w in windows]


@dataclass
class Shard:
    """Editable shard, whose parts may be replaced before `bytes()`.

    Args:
        identity: identity of the cache that the shard claims to belong to.
        start: number of the first window.
        columns: one list per column of the Parquet file, with one value per row. If absent,
            `targets` is encoded from `numbers`, and `crc32c` is computed from the other columns.
        numbers: uncoded numbers of each column of the codec, one array per row.
        lists: D, the first word of each block.
        description: JSON of the footer; if absent, `tables` is encoded from `numbers`.
        stop: number after the last window, as stated by the file name.
    """

    identity: Identity
    start: int
    columns: dict[str, list[Any]]
    numbers: dict[str, list[np.ndarray]]
    lists: list[int]
    description: dict[str, Any]
    stop: int
    dtypes: dict[str, Any]
    pages: Callable[[int, str, Page], Page] = lambda group, name, page: page
    """Function that replaces the page of a column in a row group."""
    footer: Callable[[dict[str, Any]], dict[str, Any]] = lambda parts: parts
    """Function that changes `schema`, `rows`, `groups`, `keys`, `more` (encoded) of a footer."""
    text: bytes | None = None
    """JSON text to write instead of `description`; None for `description`."""
    guard_groups: int | None = None
    """Number of row groups that the guard claims; additional ones are empty."""

    @classmethod
    def of(cls, identity: Identity, records: Sequence[WindowRecord]) -> Shard:
        codec = TargetCodec.of(identity)
        split = [codec._split(TargetWindow(r.targets, r.tokens, r.present())) for r in records]
        start = records[0].window_index
        corruption = {}
        if identity.objective is not None:
            corruption = {
                "inputs": [r.inputs[r.mask] for r in records],
                "rate": [r.rate for r in records],
            }
        shard = cls(
            identity,
            start,
            {
                "window_index": [r.window_index for r in records],
                "tokens": [r.tokens.copy() for r in records],
                "document_starts": [r.document_starts.copy() for r in records],
                "mask": [None if r.mask is None else r.mask.copy() for r in records],
                "teacher_loss": [r.teacher_loss for r in records],
                "teacher_entropy": [r.teacher_entropy for r in records],
                **corruption,
            },
            {name: [s[name].copy() for s in split] for name in codec.columns},
            [len(s["ids"]) for s in split],
            {
                "format_version": identity.format_version,
                "fingerprint": identity.fingerprint,
                "start": start,
                "stop": start + len(records),
                "positions": int(sum(r.present().sum() for r in records)),
                "entries": sum(r.targets.entries for r in records),
                "teacher_loss": float(np.mean([np.float32(r.teacher_loss) for r in records])),
                "teacher_entropy": float(np.mean([np.float32(r.teacher_entropy) for r in records])),
                "provenance": {},
            },
            start + len(records),
            dict(codec.columns),
        )
        shard.bind_text()
        return shard

    def bind_text(self) -> None:
        """Update the description after a change of columns: text, loss, entropy."""
        digest = hashlib.sha256()
        rows = zip(*(self.columns[n] for n in ("tokens", "document_starts", "mask")), strict=True)
        for tokens, starts, mask in rows:
            for array in (tokens, starts):
                digest.update(len(array).to_bytes(8, "little"))
                digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
            if "inputs" in self.columns:
                mask = None  # it is of the corruption, not of the text
            digest.update(b"\0" if mask is None else b"\1" + np.packbits(mask).tobytes())
        self.description["provenance"] |= {"corpus": digest.hexdigest()}
        for name in ("teacher_loss", "teacher_entropy"):
            with np.errstate(all="ignore"):
                self.description[name] = float(np.mean(np.array(self.columns[name], np.float32)))

    @property
    def names(self) -> list[str]:
        """Columns of the format version."""
        return [*_CAUSAL, *(name for name in ("inputs", "rate") if name in self.columns)]

    @property
    def name(self) -> str:
        return f"windows-{self.start:012d}-{self.stop:012d}.parquet"

    def bytes(self) -> bytes:
        """Return the bytes of the file, with valid checksums."""
        columns, description = self._coded()
        rows = len(columns["tokens"])
        out, groups, stops = b"PAR1", [], []
        for group, first in enumerate(range(0, rows, 8)):
            last = min(first + 8, rows)
            chunks = []
            for name in self.names:
                page = self.pages(group, name, honest_page(name, columns[name][first:last]))
                written = page.written()
                chunks.append(_chunk(FORMS[name], page, len(out), len(written)))
                out += written
            stops.append(len(out))
            size = len(out) - (stops[-2] if len(stops) > 1 else 4)
            groups.append(
                struct_of((1, LIST, list_of(STRUCT, chunks)), i64(2, size), i64(3, last - first))
            )
        text = json.dumps(description).encode() if self.text is None else self.text
        parts = self.footer(
            {
                "schema": schema_elements(self.names),
                "rows": rows,
                "groups": groups,
                "keys": [(b"sparselogits", text)],
                "more": [],
            }
        )
        return seal(out, stops, _footer(parts), self.guard_groups)

    def write(self, cache: Path) -> Path:
        """Write the file and the identity into the folder of a cache."""
        write_identity(cache, self.identity)
        path = cache / "shards" / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.bytes())
        return path

    def _coded(self) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        columns, description = dict(self.columns), dict(self.description)
        coded = {name: pco(self.dtypes[name], w) for name, w in self.numbers.items()}
        if "tables" not in description:
            description["tables"] = {
                name: [[0, base64.b64encode(table).decode()]] for name, (table, _) in coded.items()
            }
        if "targets" not in columns:
            columns["targets"] = [
                struct.pack("<I", lists) + b"".join(pages[row] for _, pages in coded.values())
                for row, lists in enumerate(self.lists)
            ]
        if "crc32c" not in columns:
            names = ["window_index", "tokens", "document_starts", "mask", "teacher_loss"]
            names += ["teacher_entropy", "targets", *self.names[len(_CAUSAL) :]]
            columns["crc32c"] = [
                row_checksum(*row) for row in zip(*(columns[n] for n in names), strict=True)
            ]
        return columns, description


def row_checksum(
    index: int,
    tokens: Any,
    starts: Any,
    mask: Any,
    loss: float,
    entropy: float,
    block: bytes,
    inputs: Any = None,
    rate: float = 0.0,
) -> int:
    def ints(values: Any) -> bytes:
        return struct.pack("<I", len(values)) + np.asarray(values, "<i4").tobytes()

    flags = b"" if mask is None else bytes(np.asarray(mask, np.uint8))
    data = struct.pack("<q", index) + ints(tokens) + ints(starts)
    data += struct.pack("<I", len(flags)) + flags
    data += struct.pack("<ffI", loss, entropy, len(block)) + block
    if inputs is not None:
        data += ints(inputs) + struct.pack("<f", rate)
    return google_crc32c.value(data)


def _chunk(form: Form, page: Page, offset: int, size: int) -> bytes:
    claimed = {"values": page.values, "size": size, "offset": offset, "codec": page.codec}
    claimed |= page.claimed
    dictionary = [i64(11, offset)] if page.before else []
    data = claimed["offset"] + len(page.before)
    meta = struct_of(
        i32(1, TYPES[form.type]),
        (2, LIST, list_of(I32, [zigzag(RLE), zigzag(page.encoding)])),
        (3, LIST, list_of(BINARY, [string(part.encode()) for part in form.path])),
        i32(4, claimed["codec"]),
        i64(5, claimed["values"]),
        i64(6, claimed["size"]),
        i64(7, claimed["size"]),
        i64(9, data),
        *dictionary,
    )
    return struct_of(i64(2, 0), (3, STRUCT, meta))


def _footer(parts: dict[str, Any]) -> bytes:
    keys = [struct_of((1, BINARY, string(k)), (2, BINARY, string(v))) for k, v in parts["keys"]]
    return struct_of(
        i32(1, 2),
        (2, LIST, list_of(STRUCT, parts["schema"])),
        i64(3, parts["rows"]),
        (4, LIST, list_of(STRUCT, parts["groups"], parts.get("claimed_groups"))),
        (5, LIST, list_of(STRUCT, keys)),
        *parts["more"],
    )


def seal(
    pages: bytes, stops: Sequence[int], footer: bytes, claimed_groups: int | None = None
) -> bytes:
    """Return the bytes of a file of pages and a footer, with a valid guard."""
    closing = footer + struct.pack("<I", len(footer)) + b"PAR1"
    guard, first = b"", 0
    ends = [*stops[:-1], len(pages)]
    ends += [len(pages)] * ((claimed_groups or len(ends)) - len(ends))
    for stop in ends:
        guard += struct.pack("<QQI", first, stop - first, google_crc32c.value(pages[first:stop]))
        first = stop
    guard += struct.pack("<II", len(ends), google_crc32c.value(closing))
    guard += struct.pack("<I8s", google_crc32c.value(guard), b"SLGUARD1")
    return pages + guard + closing


def write_identity(cache: Path, identity: Identity, **changes: Any) -> None:
    """Write a cache.json with a valid fingerprint, whatever the contents."""
    content = identity.to_json() | changes
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "cache.json").write_text(identity_json(content))


def identity_json(content: dict[str, Any]) -> str:
    return json.dumps({"fingerprint": fingerprint_of(content), "identity": content})


def fingerprint_of(content: dict[str, Any]) -> str:
    teacher = content["teacher"]
    if isinstance(teacher, dict):
        teacher = {k: v for k, v in teacher.items() if k != "name"}
    compared = json.dumps(
        content | {"teacher": teacher}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return hashlib.sha256(compared.encode("utf-8", "surrogatepass")).hexdigest()
