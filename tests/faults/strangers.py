"""Run every command on forged caches, under limits of memory and time.

    python -m tests.faults.strangers [--only NAME ...] [--commands info ...]
    python -m tests.faults.run --only strangers              all of them; results/strangers.json

Each mutation turns a copy of a valid cache into a hostile one with valid checksums (forge.py). Each
command runs on it in a forked child of one process that has imported all modules, because imports
take seconds. Its address space is limited to what the parent has mapped plus `MEMORY_MIB`. A
command passes if it exits within `SECONDS` with code 0 or 2, and

- prints no control characters, no traceback and no "bug";
- names the file, and the windows if they are the cause, in an error;
- does not exit with 0 if the mutation must be rejected (`refused`).
"""

from __future__ import annotations

import os

os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # an arena reserves 64 MiB of address space

import argparse
import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np

from sparselogits.store import Cache, WindowRecord
from tests.faults import forge
from tests.faults.forge import Page, Shard, struct_of, zigzag

MEMORY_MIB = 320
SECONDS = 60
WINDOW = 32
SHARD = 16
FIRST = "windows-000000000000-000000000016.parquet"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202e[/x]"


@dataclass(frozen=True)
class Ground:
    """Teacher, student and valid cache before any forgery."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def model(self) -> Path:
        return self.folder / "teacher"

    def shard(self, cache: Path) -> Shard:
        """Return the first shard of the cache, to be edited."""
        opened = Cache.open(cache)
        records: list[WindowRecord] = [opened.read(i) for i in range(SHARD)]
        return Shard.of(opened.identity, records)


def make_ground(folder: Path) -> Ground:
    """Build the valid cache in this process."""
    from sparselogits.caching import CacheRequest, build_caches
    from sparselogits.corpus import open_source, pack, packing_for, tokenizer_fingerprint
    from sparselogits.samplers import Systematic
    from sparselogits.teacher import load_teacher
    from tests.conftest import documents, tiny_llama, tokenizer

    ground = Ground(folder)
    words = tokenizer.__wrapped__()
    tiny_llama().save_pretrained(ground.model)
    words.save_pretrained(ground.model)
    text = folder / "text.jsonl"
    pages = [page[:900] for page in documents()[:14]]
    text.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    teacher = load_teacher(str(ground.model), tokenizer=words)
    packing = packing_for(words, window_length=WINDOW, separator_id=0, holdout=0.3)
    corpus = pack(open_source(str(text)), words, packing, ground.cache / "corpus", vocab_size=520)
    build_caches(
        teacher,
        corpus,
        [CacheRequest(ground.cache, Systematic(12))],
        tokenizer_hash=tokenizer_fingerprint(words),
        windows_per_shard=SHARD,
    )
    return ground


# mutations: each changes a copy of the cache


@dataclass(frozen=True)
class Mutation:
    """Modification that makes a cache hostile.

    Args:
        apply: function that modifies the folder of a cache.
        named: text that an error must contain; None if any file of the cache is enough.
        refused: commands that must not succeed.
    """

    apply: Callable[[Ground, Path], None]
    named: str | None = None
    refused: tuple[str, ...] = ()


DECODING = ("verify", "view", "train", "export")
READING = ("info", "card", *DECODING)
OPENING = (*READING, "repair", "merge", "push")


def on_shard(change: Callable[[Shard], None]) -> Callable[[Ground, Path], None]:
    def apply(ground: Ground, cache: Path) -> None:
        shard = ground.shard(cache)
        change(shard)
        for old in (cache / "shards").glob("windows-000000000000-*"):
            old.unlink()
        path = cache / "shards" / shard.name
        path.write_bytes(shard.bytes())

    return apply


def replaced(name: str, make: Callable[[int, Page], Page]) -> Callable[[Ground, Path], None]:
    """Return the mutation that replaces the page of a column in both row groups."""

    def change(shard: Shard) -> None:
        def pages(group: int, column: str, page: Page) -> Page:
            return make(8, page) if column == name else page

        shard.pages = pages

    return on_shard(change)


def value(column: str, row: int, new: Any) -> Callable[[Ground, Path], None]:
    def change(shard: Shard) -> None:
        shard.columns[column][row] = new
        shard.bind_text()

    return on_shard(change)


def number(column: str, new: float) -> Callable[[Ground, Path], None]:
    return on_shard(lambda shard: shard.numbers[column][3].__setitem__(0, new))


def footer(**changes: Any) -> Callable[[Ground, Path], None]:
    return on_shard(lambda shard: shard.description.update(changes))


def parts(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Ground, Path], None]:
    return on_shard(lambda shard: setattr(shard, "footer", change))


def identity(**changes: Any) -> Callable[[Ground, Path], None]:
    """Return the mutation that changes the identity, also in the shards."""

    def apply(ground: Ground, cache: Path) -> None:
        shard = ground.shard(cache)
        content = shard.identity.to_json()
        for key, new in changes.items():
            merged = isinstance(new, dict) and isinstance(content.get(key), dict)
            content[key] = {**content[key], **new} if merged else new
        (cache / "cache.json").write_text(forge.identity_json(content))
        shard.description["fingerprint"] = forge.fingerprint_of(content)
        shutil.rmtree(cache / "shards")
        (cache / "shards").mkdir()
        (cache / "shards" / shard.name).write_bytes(shard.bytes())

    return apply


def file(
    name: str, content: bytes | str | Callable[[Path], None]
) -> Callable[[Ground, Path], None]:
    """Return the mutation that replaces a file of the cache."""

    def apply(ground: Ground, cache: Path) -> None:
        path = cache / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Ground, Path], None]:
    """Return the mutation that changes values in a JSON file of the cache."""

    def apply(ground: Ground, cache: Path) -> None:
        content = json.loads((cache / name).read_text())
        (cache / name).write_text(json.dumps(change(content)))

    return apply


def sparse(size: int) -> Callable[[Path], None]:
    """Return a function that writes a sparse file of zeros, which takes no space on disk."""

    def make(path: Path) -> None:
        with path.open("wb") as handle:
            handle.truncate(size)

    return make


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket(path: Path) -> None:
    os.mknod(path, 0o140600)


def zeros_compressed(size: int) -> bytes:
    import pyarrow as pa

    return pa.compress(bytes(size), codec="zstd", asbytes=True)


def long_windows(ground: Ground, cache: Path) -> None:
    """Write windows of 2^20 equal tokens, which are valid and of the maximum length."""
    _constant(cache, length=1 << 20, ids=1, kind="float32")


def many_entries(ground: Ground, cache: Path) -> None:
    """Write windows with 100 000 ids at every position, in a few bytes."""
    _constant(cache, length=1 << 6, ids=100_000, kind="float32")


def many_free_entries(ground: Ground, cache: Path) -> None:
    """Write windows with nearly 2^20 entries, which a block of any size may have."""
    _constant(cache, length=1 << 6, ids=(1 << 14) - 1, kind="float32")


def _constant(cache: Path, *, length: int, ids: int, kind: str) -> None:
    """Write windows with the same token, ids and weights at all positions, in a few bytes."""
    opened = Cache.open(cache)
    identity_ = changed(
        opened.identity,
        vocab_size=1 << 20,
        window_length=length,
        sampler={"name": "topk", "k": ids},
        codec={"name": "inverted-lists", "version": 1, "weights": kind},
        packing={**opened.identity.packing, "window_length": length},
    )
    shard = Shard.of(opened.identity, [opened.read(0), opened.read(1)])
    shard.identity = identity_
    rows = range(2)
    for name, values in (
        ("tokens", np.full(length, 1 << 19, np.int32)),
        ("document_starts", np.zeros(0, np.int32)),
        ("mask", None),
    ):
        shard.columns[name] = [values for _ in rows]
    each = np.ones(length, np.uint32)
    few = np.zeros(ids, np.uint32)
    place = min(length.bit_length() - 1, 7)
    shard.numbers = {
        "hits": [np.zeros(length, np.uint32) for _ in rows],
        "ids": [few for _ in rows],
        "sizes": [few + np.uint32(length - 1) for _ in rows],
        **{
            f"places_{c}": [np.zeros(length * ids if c == place else 0, np.uint32) for _ in rows]
            for c in range(8)
        },
        "weights": [np.full(length * ids, 1 / (2 * ids), np.float32) for _ in rows],
    }
    shard.lists = [ids for _ in rows]
    shard.dtypes = dict.fromkeys(shard.numbers, np.uint32) | {"weights": np.float32}
    shard.stop = 2
    shard.description |= {
        "fingerprint": identity_.fingerprint,
        "start": 0,
        "stop": 2,
        "positions": 2 * len(each),
        "entries": 2 * length * ids,
    }
    shard.bind_text()
    shutil.rmtree(cache / "shards")
    shutil.rmtree(cache / "corpus")
    shard.write(cache)


def extension_type() -> bytes:
    """Return an Arrow schema whose types old versions would unpickle (CVE-2023-47248)."""
    import base64

    import pyarrow as pa

    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": b"cos\nsystem\n(S'touch /tmp/owned'\ntR.",
    }
    fields = [pa.field("window_index", pa.int64(), metadata=metadata)]
    return base64.b64encode(pa.schema(fields).serialize().to_pybytes())


BIG = 250_000_000
"""Number of 4-byte values that take a gigabyte."""
EMPTY_CHUNK = struct_of((2, forge.I64, zigzag(0)))
EMPTY_GROUP = struct_of(
    (1, forge.LIST, forge.list_of(forge.STRUCT, [])),
    (2, forge.I64, zigzag(0)),
    (3, forge.I64, zigzag(0)),
)


def group_of(chunks: bytes) -> bytes:
    return struct_of((1, forge.LIST, chunks), (2, forge.I64, zigzag(0)), (3, forge.I64, zigzag(8)))


def rle_claim(page: Page, times: int) -> Page:
    """Return levels in run lengths that claim a number of values."""
    levels = forge.runs([(0, times)]) + forge.runs([(1, times)])
    return changed(page, data=levels + bytes(64), values=times, uncompressed=None)


def growing_footer(keys: list[tuple[bytes, bytes]]) -> Callable[[Ground, Path], None]:
    return parts(lambda p: p | {"keys": [*p["keys"], *keys]})


INT32_STARTS = np.array([-(2**31)], np.int64)

VALUES: dict[str, Mutation] = {
    "start of -2^31": Mutation(value("document_starts", 3, INT32_STARTS), FIRST, DECODING),
    "starts unsorted": Mutation(value("document_starts", 3, np.array([9, 5])), FIRST, DECODING),
    "token beyond V": Mutation(value("tokens", 3, np.arange(500, 532)), FIRST, DECODING),
    "token of -1": Mutation(value("tokens", 3, np.arange(WINDOW) - 1), FIRST, DECODING),
    "counts of 2^32 - 1": Mutation(number("counts", 2**32 - 1), FIRST, DECODING),
    "sizes of 2^32 - 1": Mutation(number("sizes", 2**32 - 1), FIRST, DECODING),
    "ids of 2^32 - 1": Mutation(number("ids", 2**32 - 1), FIRST, DECODING),
    "loss NaN": Mutation(value("teacher_loss", 3, float("nan")), FIRST, DECODING),
    "block of nothing": Mutation(
        on_shard(lambda s: s.columns.update(targets=[b""] * SHARD)), FIRST, DECODING
    ),
    "block of 2^32 - 1 lists": Mutation(
        on_shard(lambda s: s.lists.__setitem__(3, 2**32 - 1)), FIRST, DECODING
    ),
}

FOOTERS: dict[str, Mutation] = {
    "tables a list": Mutation(footer(tables=[]), FIRST, READING),
    "tables null": Mutation(footer(tables=None), FIRST, READING),
    "tables of text": Mutation(footer(tables={"ids": ["x"]}), FIRST, READING),
    "provenance missing": Mutation(
        on_shard(lambda s: s.description.pop("provenance")), FIRST, READING
    ),
    "provenance text": Mutation(footer(provenance="x"), FIRST, READING),
    "entries of text": Mutation(footer(entries="x"), FIRST, READING),
    "loss infinite": Mutation(
        on_shard(lambda s: setattr(s, "text", b'{"teacher_loss": Infinity}')), FIRST, READING
    ),
    "fingerprint of escapes": Mutation(footer(fingerprint=ESCAPES), FIRST, READING),
    "JSON nested": Mutation(on_shard(lambda s: setattr(s, "text", b"[" * 200_000)), FIRST, READING),
    "JSON of arrays": Mutation(
        on_shard(lambda s: setattr(s, "text", b"[" + b"[]," * 10**7 + b"0]")), FIRST, READING
    ),
    "keys by the million": Mutation(growing_footer([(b"", b"")] * 10**6), FIRST, READING),
    "Arrow's extension type": Mutation(
        growing_footer([(b"ARROW:schema", extension_type())]), FIRST, READING
    ),
    "chunks by the million": Mutation(
        parts(
            lambda p: (
                p | {"groups": [group_of(forge.list_of(forge.STRUCT, [EMPTY_CHUNK] * 10**6))] * 2}
            )
        ),
        FIRST,
        READING,
    ),
    "a few chunks, a million claimed": Mutation(
        parts(lambda p: p | {"groups": [group_of(forge.list_of(forge.STRUCT, [], 10**6 - 1))] * 2}),
        FIRST,
        READING,
    ),
    "row groups by the million": Mutation(
        parts(lambda p: p | {"groups": [EMPTY_GROUP] * 900_000}), FIRST, READING
    ),
    "row groups claimed": Mutation(
        parts(lambda p: p | {"claimed_groups": 10**6 - 1}), FIRST, READING
    ),
    "rows of 2^62": Mutation(parts(lambda p: p | {"rows": 2**62}), FIRST, ()),
    "schema nested": Mutation(
        parts(lambda p: p | {"schema": [p["schema"][0]] * 10_000 + p["schema"]}), FIRST, READING
    ),
    "schema of other columns": Mutation(
        parts(lambda p: p | {"schema": p["schema"][:2]}), FIRST, READING
    ),
    "unknown fields nested": Mutation(
        parts(lambda p: p | {"more": [(99, forge.LIST, b"\x19" * 10**5 + b"\x15\0")]}),
        FIRST,
        READING,
    ),
    "a name of 8e8 windows": Mutation(
        on_shard(lambda s: (setattr(s, "stop", 8 * 10**8), s.description.update(stop=8 * 10**8))),
        "windows-000000000000-000800000000.parquet",
        READING,
    ),
    "a name of 8e5 windows, the guard too": Mutation(
        on_shard(
            lambda s: (
                setattr(s, "stop", 8 * 10**5),
                s.description.update(stop=8 * 10**5),
                setattr(s, "guard_groups", 10**5),
            )
        ),
        "windows-000000000000-000000800000.parquet",
        READING,
    ),
    "a name of 10^17 windows": Mutation(
        on_shard(lambda s: setattr(s, "stop", 10**17)), None, READING
    ),
    "a name of escapes": Mutation(file(f"shards/{ESCAPES.replace('/', '')}", b"x"), None, ()),
}

INT = np.int32(1).tobytes()
BOMBS: dict[str, Mutation] = {
    **{
        f"a gigabyte of {name} in a dictionary": Mutation(
            replaced(
                name, lambda rows, _, name=name, one=one: forge.repeated(name, rows, BIG, one)
            ),
            FIRST,
            DECODING,
        )
        for name, one in (("tokens", INT), ("document_starts", INT), ("targets", bytes(64)))
    },
    "a gigabyte of tokens in zstd": Mutation(
        replaced(
            "tokens",
            lambda rows, page: changed(page, data=zeros_compressed(1 << 28), uncompressed=1 << 28),
        ),
        FIRST,
        DECODING,
    ),
    "tokens that claim to be two gigabytes": Mutation(
        replaced("tokens", lambda rows, page: changed(page, uncompressed=2**31 - 1)),
        FIRST,
        DECODING,
    ),
    "targets that claim to be two gigabytes": Mutation(
        replaced("targets", lambda rows, page: changed(page, uncompressed=2**31 - 1)),
        FIRST,
        DECODING,
    ),
    "targets compressed": Mutation(
        replaced(
            "targets",
            lambda rows, page: changed(
                page, data=zeros_compressed(1 << 28), uncompressed=1 << 28, codec=forge.ZSTD
            ),
        ),
        FIRST,
        DECODING,
    ),
    "a size of -1": Mutation(
        replaced("targets", lambda rows, page: changed(page, uncompressed=-1)), FIRST, DECODING
    ),
    "levels by the billion": Mutation(
        replaced("document_starts", lambda rows, page: rle_claim(page, BIG)), FIRST, DECODING
    ),
    "levels of masks by the billion": Mutation(
        replaced("mask", lambda rows, page: rle_claim(page, BIG)), FIRST, DECODING
    ),
    "values claimed in the footer alone": Mutation(
        replaced("document_starts", lambda rows, page: changed(page, claimed={"values": BIG})),
        FIRST,
        DECODING,
    ),
    "a deltas' page": Mutation(
        replaced(
            "document_starts",
            lambda rows, page: changed(
                page,
                data=forge.runs([(0, 8)])
                + forge.runs([(1, 8)])
                + forge.varint(1 << 30)
                + forge.varint(1)
                + forge.varint(BIG)
                + b"\0" * 64,
                encoding=forge.DELTA,
            ),
        ),
        FIRST,
        DECODING,
    ),
    "a page of another kind": Mutation(
        replaced("targets", lambda rows, page: changed(page, kind=3)), FIRST, DECODING
    ),
    "an unknown compression": Mutation(
        replaced("targets", lambda rows, page: changed(page, codec=-9)), FIRST, ()
    ),
    "pages over each other": Mutation(
        replaced("targets", lambda rows, page: changed(page, claimed={"offset": 4})),
        FIRST,
        DECODING,
    ),
    "pages outside the file": Mutation(
        replaced("targets", lambda rows, page: changed(page, claimed={"offset": 2**62})),
        FIRST,
        DECODING,
    ),
    "tokens of 2^62 bytes": Mutation(
        replaced("tokens", lambda rows, page: changed(page, claimed={"size": 2**62})),
        FIRST,
        READING,
    ),
    "the longest windows": Mutation(long_windows, None, ()),
    "entries by the million": Mutation(many_entries, None, DECODING),
    "all free entries": Mutation(many_free_entries, None, ()),
}

IDENTITIES: dict[str, Mutation] = {
    "rounds of 2^31": Mutation(identity(codec={"rounds": 2**31}), "cache.json", OPENING),
    "rounds of the sampler alone": Mutation(identity(sampler={"rounds": 7}), "cache.json", OPENING),
    "a vocabulary of 2^40": Mutation(identity(vocab_size=2**40), "cache.json", OPENING),
    "a vocabulary of 2^24": Mutation(identity(vocab_size=2**24), None, ()),
    "windows of 2^50": Mutation(identity(window_length=2**50), "cache.json", OPENING),
    "windows of 2": Mutation(identity(window_length=2), None, DECODING),
    "a teacher of escapes": Mutation(identity(teacher={"name": ESCAPES, "dtype": ESCAPES}), None),
    "a teacher of markup": Mutation(
        identity(teacher={"name": "`x` | <script>alert(1)</script>\n# x\n```\n[a](javascript:b)"}),
        None,
    ),
    "a teacher without a name": Mutation(identity(teacher={"weights": 1}), None),
    "a teacher that is a list": Mutation(identity(teacher={"name": [ESCAPES]}), None),
    "a sampler of escapes": Mutation(identity(sampler={"name": ESCAPES, ESCAPES: ESCAPES}), None),
    "a sampler without a name": Mutation(
        identity(sampler={"name": None, "rounds": 12, "x": [[[]]]}), None
    ),
    "packing of nothing": Mutation(identity(packing=3), "cache.json", OPENING),
    "packing of text": Mutation(identity(packing={"reset_attention": "yes"}), None),
    "temperature of 1e-300": Mutation(identity(temperature=1e-300), "cache.json", OPENING),
    "seed of 10^100": Mutation(identity(seed=10**100), "cache.json", OPENING),
    "cache.json a folder": Mutation(file("cache.json", Path.mkdir), "cache.json", OPENING),
    "cache.json a pipe": Mutation(file("cache.json", os.mkfifo), "cache.json", OPENING),
    "cache.json a device": Mutation(file("cache.json", device), "cache.json", OPENING),
    "cache.json a socket": Mutation(file("cache.json", socket), "cache.json", OPENING),
    "cache.json a loop": Mutation(
        file("cache.json", lambda p: p.symlink_to(p.name)), "cache.json", OPENING
    ),
    "cache.json of 192 MiB": Mutation(
        file("cache.json", lambda p: p.write_bytes(b"[" + b"[]," * (64 << 20) + b"0]")),
        "cache.json",
        OPENING,
    ),
    "cache.json of a terabyte": Mutation(
        file("cache.json", sparse(1 << 40)), "cache.json", OPENING
    ),
    "cache.json of arrays": Mutation(
        file("cache.json", b"[" + b"[]," * 300_000 + b"0]"), "cache.json", OPENING
    ),
    "cache.json of text": Mutation(file("cache.json", json.dumps(ESCAPES)), "cache.json", OPENING),
}

FILES: dict[str, Mutation] = {
    **{
        f"a shard that is a {kind}": Mutation(file(f"shards/{FIRST}", make), FIRST, READING)
        for kind, make in (
            ("pipe", os.mkfifo),
            ("folder", Path.mkdir),
            ("device", device),
            ("socket", socket),
            ("loop", lambda p: p.symlink_to(p.name)),
            ("terabyte of zeros", sparse(1 << 40)),
        )
    },
    "a shard of nothing": Mutation(file(f"shards/{FIRST}", b""), FIRST, READING),
    "shards a file": Mutation(file("shards", b"x"), None, ()),
    "shards a pipe": Mutation(file("shards", os.mkfifo), None, ()),
    "README.md of gigabytes": Mutation(file("README.md", sparse(1 << 36)), None, ()),
    "README.md a pipe": Mutation(file("README.md", os.mkfifo), None, ()),
    "vocabulary.safetensors of terabytes": Mutation(
        file("vocabulary.safetensors", (2**62).to_bytes(8, "little") + b"{}"), None, ()
    ),
    "vocabulary.safetensors a pipe": Mutation(file("vocabulary.safetensors", os.mkfifo), None, ()),
    **{
        f"corpus: {name} a {kind}": Mutation(file(f"corpus/{name}", make), None, refused)
        for name, refused in (
            ("corpus.json", ("eval",)),
            ("index.json", ("eval",)),
            ("training/part-00000000.parquet", ("eval",)),
        )
        for kind, make in (("pipe", os.mkfifo), ("folder", Path.mkdir), ("device", device))
    },
    "corpus: corpus.json null": Mutation(file("corpus/corpus.json", b"null"), None, ("eval",)),
    "corpus: corpus.json of a list": Mutation(file("corpus/corpus.json", b"[1]"), None, ("eval",)),
    "corpus: corpus.json of arrays": Mutation(
        file("corpus/corpus.json", b"[" + b"[]," * (16 << 20) + b"0]"), None, ("eval",)
    ),
    "corpus: corpus.json nested": Mutation(
        file("corpus/corpus.json", b"[" * 10**6), None, ("eval",)
    ),
    "corpus: corpus.json not UTF-8": Mutation(
        file("corpus/corpus.json", b'{"a": "\xff"}'), None, ("eval",)
    ),
    "corpus: no packing": Mutation(
        edited("corpus/corpus.json", lambda c: {k: v for k, v in c.items() if k != "packing"}),
        None,
        ("eval",),
    ),
    "corpus: a packing of text": Mutation(
        edited("corpus/corpus.json", lambda c: c | {"packing": {"window_length": "x"}}),
        None,
        ("eval",),
    ),
    "corpus: windows of zero": Mutation(
        edited(
            "corpus/corpus.json", lambda c: c | {"packing": c["packing"] | {"window_length": 0}}
        ),
        None,
        ("eval",),
    ),
    "corpus: windows of 2^60": Mutation(
        edited(
            "corpus/corpus.json", lambda c: c | {"packing": c["packing"] | {"window_length": 2**60}}
        ),
        None,
        ("eval",),
    ),
    "corpus: a source of escapes": Mutation(
        edited("corpus/corpus.json", lambda c: c | {"source": ESCAPES}), None, ("eval",)
    ),
    "corpus: a vocabulary of 2^60": Mutation(
        edited("corpus/corpus.json", lambda c: c | {"vocab_size": 2**60}), None, ()
    ),
    "corpus: index of nothing": Mutation(
        edited("corpus/index.json", lambda _: {}), None, ("eval",)
    ),
    "corpus: index of text": Mutation(
        edited("corpus/index.json", lambda i: i | {"training": ["x"]}), None, ("eval",)
    ),
    "corpus: index of 2^70": Mutation(
        edited("corpus/index.json", lambda i: i | {"training": [2**70]}), None, ("eval",)
    ),
    "corpus: index of 10^15": Mutation(
        edited("corpus/index.json", lambda i: i | {"training": [10**15]}), None, ("eval",)
    ),
    "corpus: index below zero": Mutation(
        edited("corpus/index.json", lambda i: i | {"training": [-5, 10**4]}), None, ("eval",)
    ),
    "corpus: index of NaN": Mutation(
        edited("corpus/index.json", lambda i: i | {"training": [float("nan")]}), None, ("eval",)
    ),
    "corpus: part of zeros": Mutation(
        file("corpus/training/part-00000000.parquet", bytes(1000)), None, ("eval",)
    ),
    "corpus: tokens beyond V": Mutation(
        lambda g, c: _corpus_part(c, tokens=10**6), None, ("eval",)
    ),
    "corpus: tokens below zero": Mutation(lambda g, c: _corpus_part(c, tokens=-1), None, ("eval",)),
    "corpus: tokens by the billion": Mutation(
        lambda g, c: _corpus_part(c, times=10**7), None, ("eval",)
    ),
    "corpus: tokens of another type": Mutation(
        lambda g, c: _corpus_part(c, tokens="x"), None, ("eval",)
    ),
}


def _corpus_part(cache: Path, *, tokens: Any = 5, times: int = 0) -> None:
    """Write a part of the packed text that matches its index, with other tokens."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = json.loads((cache / "corpus/index.json").read_text())
    path = cache / "corpus/training/part-00000000.parquet"
    metadata = pq.read_metadata(path).metadata
    count = times or index["training"][0]
    table = pa.table(
        {"token": [tokens] * count, "document_start": [False] * count}
        if not isinstance(tokens, int)
        else {
            "token": pa.array(np.full(count, tokens), pa.int32()),
            "document_start": np.zeros(count, np.bool_),
        }
    )
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table, row_group_size=max(count, 1))
        writer.add_key_value_metadata({k: v for k, v in metadata.items() if b"ARROW" not in k})


MUTATIONS = {
    f"{family}: {name}": mutation
    for family, group in (
        ("value", VALUES),
        ("footer", FOOTERS),
        ("bomb", BOMBS),
        ("identity", IDENTITIES),
        ("file", FILES),
    )
    for name, mutation in group.items()
}


FAMILIES = {
    "value": ("verify", "view", "train", "export", "repair"),
    "footer": ("info", "card", "verify", "view", "train", "merge", "push", "repair"),
    "bomb": ("info", "verify", "view", "train", "merge", "export"),
    "identity": OPENING,
    "file": ("info", "verify", "eval", "train", "push", "repair"),
}
"""Commands that read the data changed by a family of mutations."""


def commands(ground: Ground, cache: Path, out: Path) -> dict[str, list[str]]:
    """Return the command lines to run; those that change the cache are last."""
    model = str(ground.model)
    recipe = out / "recipe.yaml"
    recipe.write_text(
        f"cache: {cache}\nout: {out / 'run'}\n"
        f"student: {{hidden_size: 16, layers: 1, heads: 2}}\nper_device_train_batch_size: 8\n"
    )
    return {
        "info": ["info", str(cache)],
        "info --json": ["info", str(cache), "--json"],
        "card": ["card", str(cache)],
        "verify": ["verify", str(cache)],
        "verify --json": ["verify", str(cache), "--json"],
        "view": ["view", str(cache), "--window", "3", "--out", str(out / "w.html")],
        "train": ["train", str(recipe)],
        "eval": ["eval", model, "--cache", str(cache), "--resamples", "10"],
        "export": ["export", str(cache), "--out", str(out / "lists")],
        "merge": ["merge", str(cache), "--out", str(out / "merged")],
        "push": ["push", str(cache), f"memory://{out.name}"],
        "repair": ["repair", str(cache)],
    }


@dataclass(frozen=True)
class Outcome:
    """Outcome of a command."""

    code: int
    seconds: float
    mib: float
    said: str


def ran(line: list[str], work: Path, memory_mib: int = MEMORY_MIB) -> Outcome:
    """Run a command line in a forked child under the limits."""
    said, begun = work / "said", time.monotonic()
    child = os.fork()
    if child == 0:
        _child(line, said, memory_mib)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() - begun > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(-999, SECONDS, 0, said.read_text(errors="replace"))
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    peak = work / "peak"
    mib = float(peak.read_text() or 0) if peak.exists() else 0.0
    peak.unlink(missing_ok=True)
    return Outcome(code, time.monotonic() - begun, mib, said.read_text(errors="replace"))


def _child(line: list[str], said: Path, memory_mib: int) -> None:
    from sparselogits.cli import main

    code, mapped = 70, 0
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.chdir(said.parent)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (memory_mib << 20),) * 2)
        sys.argv = ["sparselogits", *line]
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException as error:  # says so in its own way, and would be taken for a result
        os.write(2, f"ESCAPED {error!r}".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        highest = int(Path("/proc/self/status").read_text().split("VmPeak:")[1].split()[0]) << 10
        (said.parent / "peak").write_text(str((highest - mapped) / 2**20))
        os._exit(code)


def judged(command: str, mutation: Mutation, outcome: Outcome) -> str | None:
    """Return what is wrong with an outcome; None if nothing is wrong."""
    said, name = outcome.said, command.split()[0]
    if outcome.code == -999:
        return "did not end"
    if outcome.code not in (0, 2):
        return f"exit code {outcome.code}"
    if "Traceback" in said or "bug:" in said or "ESCAPED" in said:
        return "a traceback"
    if any(not (c.isprintable() or c in "\n\t ") for c in said):
        return "control characters"
    if outcome.code == 0 and name in mutation.refused and name not in ("repair", "merge", "push"):
        return "accepted"
    found = said.replace("\n", "")
    if outcome.code == 2 and mutation.named and mutation.named not in found:
        return f"does not name {mutation.named}"
    if "out of memory" in said.lower() or "MemoryError" in said:
        return "out of memory"
    if command.endswith("--json") and outcome.code == 0:
        try:
            json.loads(said[said.index("{") :], parse_constant=_no_number)
        except ValueError as error:
            return f"no JSON: {error}"
    return None


def _no_number(name: str) -> None:
    raise ValueError(name)


def attack(
    ground: Ground, names: list[str], only: list[str] | None = None, *, loud: bool = False
) -> dict[str, Any]:
    """Run the commands on mutated caches; return the counts and the failures."""
    counted: dict[str, dict[str, int]] = {}
    failures: list[str] = []
    highest, slowest = ("", 0.0), ("", 0.0)
    work = ground.folder / "work"
    for name in names:
        mutation = MUTATIONS[name]
        shutil.rmtree(work, ignore_errors=True)
        cache = work / "a stranger's [/x]"
        shutil.copytree(ground.cache, cache)
        mutation.apply(ground, cache)
        for command, line in commands(ground, cache, work).items():
            if command.split()[0] not in (only or FAMILIES[name.partition(":")[0]]):
                continue
            outcome = ran(line, work)
            fault = judged(command, mutation, outcome)
            key = f"{name} / {command}"
            ended = "sound" if outcome.code == 0 else "refused"
            if fault is not None:
                ended = "failed"
                failures.append(f"{key}: {fault}: {outcome.said[-600:]}")
            count = counted.setdefault(command, {"sound": 0, "refused": 0})
            count[ended] = count.get(ended, 0) + 1
            highest = max(highest, (key, outcome.mib), key=lambda pair: pair[1])
            slowest = max(slowest, (key, outcome.seconds), key=lambda pair: pair[1])
            if loud:
                print(
                    f"{fault or ended:12} {outcome.seconds:5.1f} s {outcome.mib:6.0f} MiB  {key}",
                    flush=True,
                )
                if fault:
                    print("   ", outcome.said[-1500:].replace("\n", "\n    "), flush=True)
    return {
        "mutations": len(names),
        "commands": counted,
        "address_space_mib": MEMORY_MIB,
        "seconds_at_most": SECONDS,
        "highest_mib": {"what": highest[0], "mib": round(highest[1])},
        "slowest": {"what": slowest[0], "seconds": round(slowest[1], 1)},
        "failures": failures,
    }


@contextlib.contextmanager
def warm_ground() -> Iterator[Ground]:
    """Build the valid cache, and run each command once so that its modules are imported."""
    import torch

    from sparselogits.cli import app

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ground = make_ground(Path(folder))
        work = Path(folder) / "work"
        work.mkdir()
        shutil.copytree(ground.cache, work / "cache")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for line in commands(ground, work / "cache", work).values():
                app(line, standalone_mode=False, obj={})
        yield ground


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="parts of the mutations' names")
    parser.add_argument("--commands", nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = [n for n in MUTATIONS if not options.only or any(o in n for o in options.only)]
    with warm_ground() as ground:
        result = attack(ground, names, options.commands, loud=True)
    print(json.dumps(result | {"failures": len(result["failures"])}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
