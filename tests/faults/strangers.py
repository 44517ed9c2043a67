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

import os

from tests.conftest import write_lines

os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # an arena reserves 64 MiB of address space

import argparse
import base64
import contextlib
import io
import json
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparselogits.store import Cache, WindowRecord
from tests.faults import forge
from tests.faults.forge import Page, Shard, struct_of
from tests.forks import fork_command, wait_for

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
    from sparselogits.corpus import open_source, pack, packing_for
    from sparselogits.samplers import Systematic
    from tests.conftest import build_cache, documents, tiny_llama, tokenizer

    ground = Ground(folder)
    words = tokenizer.__wrapped__()
    tiny_llama().save_pretrained(ground.model)
    words.save_pretrained(ground.model)
    text = folder / "text.jsonl"
    pages = [page[:900] for page in documents()[:14]]
    write_lines(text, ({"text": page} for page in pages))
    packing = packing_for(words, window_length=WINDOW, separator_id=0, holdout=0.3)
    corpus = pack(open_source(text), words, packing, ground.cache / "corpus", vocab_size=520)
    options = {"windows_per_shard": SHARD}
    build_cache(ground.model, corpus, ground.cache, Systematic(12), words, **options)
    return ground


# mutations: each changes a copy of the cache
Apply = Callable[[Ground, Path], None]


@dataclass(frozen=True)
class Mutation:
    """Modification that makes a cache hostile.

    Args:
        apply: function that modifies the folder of a cache.
        named: text that an error must contain; None if any file of the cache is enough.
        refused: commands that must not succeed.
    """

    apply: Apply
    named: str | None = None
    refused: tuple[str, ...] = ()


DECODING = ("verify", "view", "train", "export")
READING = ("info", "card", *DECODING)
OPENING = (*READING, "repair", "merge", "push")


def on_shard(change: Callable[[Shard], None]) -> Apply:
    def apply(ground: Ground, cache: Path) -> None:
        shard = ground.shard(cache)
        change(shard)
        for old in (cache / "shards").glob("windows-000000000000-*"):
            old.unlink()
        path = cache / "shards" / shard.name
        path.write_bytes(shard.bytes())

    return apply


def replaced(name: str, make: Callable[[int, Page], Page]) -> Apply:
    """Return the mutation that replaces the page of a column in both row groups."""

    def change(shard: Shard) -> None:
        def pages(group: int, column: str, page: Page) -> Page:
            return make(8, page) if column == name else page

        shard.pages = pages

    return on_shard(change)


def page(name: str, **changes: Any) -> Apply:
    return replaced(name, lambda _, own: changed(own, **changes))


def value(column: str, row: int, new: Any) -> Apply:
    def change(shard: Shard) -> None:
        shard.columns[column][row] = new
        shard.bind_text()

    return on_shard(change)


def number(column: str, new: float) -> Apply:
    return on_shard(lambda shard: shard.numbers[column][3].__setitem__(0, new))


def footer(**changes: Any) -> Apply:
    return on_shard(lambda shard: shard.description.update(changes))


def parts(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Apply:
    return on_shard(lambda shard: setattr(shard, "footer", lambda own: own | change(own)))


def json_of(text: bytes) -> Apply:
    """Return the mutation that replaces the JSON of the footer."""
    return on_shard(lambda shard: setattr(shard, "text", text))


def named_up_to(stop: int, guard_groups: int | None = None) -> Apply:
    """Return the mutation that changes the last window in the name, the footer and the guard."""

    def change(shard: Shard) -> None:
        shard.stop = shard.description["stop"] = stop
        shard.guard_groups = guard_groups

    return on_shard(change)


def identity(**changes: Any) -> Apply:
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


def file(name: str, content: bytes | str | Callable[[Path], None]) -> Apply:
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


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Apply:
    """Return the mutation that changes values in a JSON file of the packed text."""

    def apply(ground: Ground, cache: Path) -> None:
        path = cache / f"corpus/{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

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
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": b"cos\nsystem\n(S'touch /tmp/owned'\ntR.",
    }
    fields = [pa.field("window_index", pa.int64(), metadata=metadata)]
    return base64.b64encode(pa.schema(fields).serialize().to_pybytes())


BIG = 250_000_000
"""Number of 4-byte values that take a gigabyte."""
ZEROS = pa.compress(bytes(1 << 28), codec="zstd", asbytes=True)
EMPTY_CHUNK = struct_of(forge.i64(2, 0))
EMPTY_GROUP = struct_of(
    (1, forge.LIST, forge.list_of(forge.STRUCT, [])), forge.i64(2, 0), forge.i64(3, 0)
)


def group_of(items: list[bytes], claimed: int | None = None) -> bytes:
    chunks = forge.list_of(forge.STRUCT, items, claimed)
    return struct_of((1, forge.LIST, chunks), forge.i64(2, 0), forge.i64(3, 8))


def rle_claim(page: Page, times: int) -> Page:
    """Return levels in run lengths that claim a number of values."""
    levels = forge.runs([(0, times)]) + forge.runs([(1, times)])
    return changed(page, data=levels + bytes(64), values=times, uncompressed=None)


def growing_footer(keys: list[tuple[bytes, bytes]]) -> Apply:
    return parts(lambda p: {"keys": [*p["keys"], *keys]})


DELTAS = (*map(forge.varint, (1 << 30, 1, BIG)), b"\0" * 64)
"""Header of a page of deltas that claims a billion values."""


def windows_of(length: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda c: c | {"packing": c["packing"] | {"window_length": length}}


VALUES: dict[str, Apply | Mutation] = {
    "start of -2^31": value("document_starts", 3, np.array([-(2**31)], np.int64)),
    "starts unsorted": value("document_starts", 3, np.array([9, 5])),
    "token beyond V": value("tokens", 3, np.arange(500, 532)),
    "token of -1": value("tokens", 3, np.arange(WINDOW) - 1),
    "counts of 2^32 - 1": number("counts", 2**32 - 1),
    "sizes of 2^32 - 1": number("sizes", 2**32 - 1),
    "ids of 2^32 - 1": number("ids", 2**32 - 1),
    "loss NaN": value("teacher_loss", 3, float("nan")),
    "block of nothing": on_shard(lambda s: s.columns.update(targets=[b""] * SHARD)),
    "block of 2^32 - 1 lists": on_shard(lambda s: s.lists.__setitem__(3, 2**32 - 1)),
}

FOOTERS: dict[str, Apply | Mutation] = {
    "tables a list": footer(tables=[]),
    "tables null": footer(tables=None),
    "tables of text": footer(tables={"ids": ["x"]}),
    "provenance missing": on_shard(lambda s: s.description.pop("provenance")),
    "provenance text": footer(provenance="x"),
    "entries of text": footer(entries="x"),
    "loss infinite": json_of(b'{"teacher_loss": Infinity}'),
    "fingerprint of escapes": footer(fingerprint=ESCAPES),
    "JSON nested": json_of(b"[" * 200_000),
    "JSON of arrays": json_of(b"[" + b"[]," * 10**7 + b"0]"),
    "keys by the million": growing_footer([(b"", b"")] * 10**6),
    "Arrow's extension type": growing_footer([(b"ARROW:schema", extension_type())]),
    "chunks by the million": parts(lambda _: {"groups": [group_of([EMPTY_CHUNK] * 10**6)] * 2}),
    "a few chunks, a million claimed": parts(lambda _: {"groups": [group_of([], 10**6 - 1)] * 2}),
    "row groups by the million": parts(lambda _: {"groups": [EMPTY_GROUP] * 900_000}),
    "row groups claimed": parts(lambda _: {"claimed_groups": 10**6 - 1}),
    "rows of 2^62": Mutation(parts(lambda _: {"rows": 2**62}), FIRST),
    "schema nested": parts(lambda p: {"schema": [p["schema"][0]] * 10_000 + p["schema"]}),
    "schema of other columns": parts(lambda p: {"schema": p["schema"][:2]}),
    "unknown fields nested": parts(
        lambda _: {"more": [(99, forge.LIST, b"\x19" * 10**5 + b"\x15\0")]}
    ),
    "a name of 8e8 windows": Mutation(
        named_up_to(8 * 10**8), "windows-000000000000-000800000000.parquet", READING
    ),
    "a name of 8e5 windows, the guard too": Mutation(
        named_up_to(8 * 10**5, 10**5), "windows-000000000000-000000800000.parquet", READING
    ),
    "a name of 10^17 windows": Mutation(
        on_shard(lambda s: setattr(s, "stop", 10**17)), None, READING
    ),
    "a name of escapes": Mutation(file(f"shards/{ESCAPES.replace('/', '')}", b"x")),
}

BOMBS: dict[str, Apply | Mutation] = {
    **{
        f"a gigabyte of {name} in a dictionary": replaced(
            name, lambda rows, _, name=name, one=one: forge.repeated(name, rows, BIG, one)
        )
        for name, one in (
            *(("tokens", np.int32(1).tobytes()), ("document_starts", np.int32(1).tobytes())),
            ("targets", bytes(64)),
        )
    },
    "a gigabyte of tokens in zstd": page("tokens", data=ZEROS, uncompressed=1 << 28),
    "tokens that claim to be two gigabytes": page("tokens", uncompressed=2**31 - 1),
    "targets that claim to be two gigabytes": page("targets", uncompressed=2**31 - 1),
    "targets compressed": page("targets", data=ZEROS, uncompressed=1 << 28, codec=forge.ZSTD),
    "a size of -1": page("targets", uncompressed=-1),
    "levels by the billion": replaced("document_starts", lambda _, page: rle_claim(page, BIG)),
    "levels of masks by the billion": replaced("mask", lambda _, page: rle_claim(page, BIG)),
    "values claimed in the footer alone": page("document_starts", claimed={"values": BIG}),
    "a deltas' page": page(
        "document_starts",
        data=b"".join([forge.runs([(0, 8)]), forge.runs([(1, 8)]), *DELTAS]),
        encoding=forge.DELTA,
    ),
    "a page of another kind": page("targets", kind=3),
    "an unknown compression": Mutation(page("targets", codec=-9), FIRST),
    "pages over each other": page("targets", claimed={"offset": 4}),
    "pages outside the file": page("targets", claimed={"offset": 2**62}),
    "tokens of 2^62 bytes": Mutation(page("tokens", claimed={"size": 2**62}), FIRST, READING),
    "the longest windows": Mutation(long_windows),
    "entries by the million": Mutation(many_entries, None, DECODING),
    "all free entries": Mutation(many_free_entries),
}

MARKUP = "`x` | <script>alert(1)</script>\n# x\n```\n[a](javascript:b)"
IDENTITIES: dict[str, Apply | Mutation] = {
    "rounds of 2^31": identity(codec={"rounds": 2**31}),
    "rounds of the sampler alone": identity(sampler={"rounds": 7}),
    "a vocabulary of 2^40": identity(vocab_size=2**40),
    "a vocabulary of 2^24": Mutation(identity(vocab_size=2**24)),
    "windows of 2^50": identity(window_length=2**50),
    "windows of 2": Mutation(identity(window_length=2), None, DECODING),
    "a teacher of escapes": Mutation(identity(teacher={"name": ESCAPES, "dtype": ESCAPES})),
    "a teacher of markup": Mutation(identity(teacher={"name": MARKUP})),
    "a teacher without a name": Mutation(identity(teacher={"weights": 1})),
    "a teacher that is a list": Mutation(identity(teacher={"name": [ESCAPES]})),
    "a sampler of escapes": Mutation(identity(sampler={"name": ESCAPES, ESCAPES: ESCAPES})),
    "a sampler without a name": Mutation(
        identity(sampler={"name": None, "rounds": 12, "x": [[[]]]})
    ),
    "packing of nothing": identity(packing=3),
    "packing of text": Mutation(identity(packing={"reset_attention": "yes"})),
    "temperature of 1e-300": identity(temperature=1e-300),
    "seed of 10^100": identity(seed=10**100),
    "cache.json a folder": file("cache.json", Path.mkdir),
    "cache.json a pipe": file("cache.json", os.mkfifo),
    "cache.json a device": file("cache.json", device),
    "cache.json a socket": file("cache.json", socket),
    "cache.json a loop": file("cache.json", lambda p: p.symlink_to(p.name)),
    "cache.json of 192 MiB": file(
        "cache.json", lambda p: p.write_bytes(b"[" + b"[]," * (64 << 20) + b"0]")
    ),
    "cache.json of a terabyte": file("cache.json", sparse(1 << 40)),
    "cache.json of arrays": file("cache.json", b"[" + b"[]," * 300_000 + b"0]"),
    "cache.json of text": file("cache.json", json.dumps(ESCAPES)),
}

SHARD_FILES: dict[str, Apply | Mutation] = {
    "a shard that is a pipe": file(f"shards/{FIRST}", os.mkfifo),
    "a shard that is a folder": file(f"shards/{FIRST}", Path.mkdir),
    "a shard that is a device": file(f"shards/{FIRST}", device),
    "a shard that is a socket": file(f"shards/{FIRST}", socket),
    "a shard that is a loop": file(f"shards/{FIRST}", lambda p: p.symlink_to(p.name)),
    "a shard that is a terabyte of zeros": file(f"shards/{FIRST}", sparse(1 << 40)),
    "a shard of nothing": file(f"shards/{FIRST}", b""),
}
OTHER_FILES: dict[str, Apply | Mutation] = {
    "shards a file": file("shards", b"x"),
    "shards a pipe": file("shards", os.mkfifo),
    "README.md of gigabytes": file("README.md", sparse(1 << 36)),
    "README.md a pipe": file("README.md", os.mkfifo),
    "vocabulary.safetensors of terabytes": file(
        "vocabulary.safetensors", (2**62).to_bytes(8, "little") + b"{}"
    ),
    "vocabulary.safetensors a pipe": file("vocabulary.safetensors", os.mkfifo),
    "corpus: a vocabulary of 2^60": edited("corpus", lambda c: c | {"vocab_size": 2**60}),
}
CORPORA: dict[str, Apply | Mutation] = {
    **{
        f"corpus: {name} a {kind}": file(f"corpus/{name}", make)
        for name in ("corpus.json", "index.json", "training/part-00000000.parquet")
        for kind, make in (("pipe", os.mkfifo), ("folder", Path.mkdir), ("device", device))
    },
    "corpus: corpus.json null": file("corpus/corpus.json", b"null"),
    "corpus: corpus.json of a list": file("corpus/corpus.json", b"[1]"),
    "corpus: corpus.json of arrays": file("corpus/corpus.json", b"[" + b"[]," * (16 << 20) + b"0]"),
    "corpus: corpus.json nested": file("corpus/corpus.json", b"[" * 10**6),
    "corpus: corpus.json not UTF-8": file("corpus/corpus.json", b'{"a": "\xff"}'),
    "corpus: no packing": edited(
        "corpus", lambda c: {k: v for k, v in c.items() if k != "packing"}
    ),
    "corpus: a packing of text": edited(
        "corpus", lambda c: c | {"packing": {"window_length": "x"}}
    ),
    "corpus: windows of zero": edited("corpus", windows_of(0)),
    "corpus: windows of 2^60": edited("corpus", windows_of(2**60)),
    "corpus: a source of escapes": edited("corpus", lambda c: c | {"source": ESCAPES}),
    "corpus: index of nothing": edited("index", lambda _: {}),
    "corpus: index of text": edited("index", lambda i: i | {"training": ["x"]}),
    "corpus: index of 2^70": edited("index", lambda i: i | {"training": [2**70]}),
    "corpus: index of 10^15": edited("index", lambda i: i | {"training": [10**15]}),
    "corpus: index below zero": edited("index", lambda i: i | {"training": [-5, 10**4]}),
    "corpus: index of NaN": edited("index", lambda i: i | {"training": [float("nan")]}),
    "corpus: part of zeros": file("corpus/training/part-00000000.parquet", bytes(1000)),
    "corpus: tokens beyond V": lambda _, cache: _corpus_part(cache, tokens=10**6),
    "corpus: tokens below zero": lambda _, cache: _corpus_part(cache, tokens=-1),
    "corpus: tokens by the billion": lambda _, cache: _corpus_part(cache, times=10**7),
    "corpus: tokens of another type": lambda _, cache: _corpus_part(cache, tokens="x"),
}


def _corpus_part(cache: Path, *, tokens: Any = 5, times: int = 0) -> None:
    """Write a part of the packed text that matches its index, with other tokens."""
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
    f"{family}: {name}": each if isinstance(each, Mutation) else Mutation(each, named, refused)
    for family, group, named, refused in (
        ("value", VALUES, FIRST, DECODING),
        ("footer", FOOTERS, FIRST, READING),
        ("bomb", BOMBS, FIRST, DECODING),
        ("identity", IDENTITIES, "cache.json", OPENING),
        ("file", SHARD_FILES, FIRST, READING),
        ("file", OTHER_FILES, None, ()),
        ("file", CORPORA, None, ("eval",)),
    )
    for name, each in group.items()
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
    said, peak, begun = work / "said", work / "peak", time.monotonic()
    peak.unlink(missing_ok=True)
    mapped = 0

    def limited() -> None:
        nonlocal mapped
        os.chdir(work)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (memory_mib << 20),) * 2)

    def measured(code: int) -> int:
        highest = int(Path("/proc/self/status").read_text().split("VmPeak:")[1].split()[0]) << 10
        peak.write_text(str((highest - mapped) / 2**20))
        return code

    code = wait_for(fork_command(line, said, limited, measured), SECONDS)
    mib = float(peak.read_text() or 0) if peak.exists() else 0.0
    return Outcome(code, time.monotonic() - begun, mib, said.read_text(errors="replace"))


def judged(command: str, mutation: Mutation, outcome: Outcome) -> str | None:
    """Return what is wrong with an outcome; None if nothing is wrong."""
    said, name = outcome.said, command.split()[0]
    if outcome.code == -signal.SIGKILL:
        return "did not end"
    if outcome.code not in (0, 2):
        return f"exit code {outcome.code}"
    if "Traceback" in said or "bug:" in said:
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
                cost = f"{outcome.seconds:5.1f} s {outcome.mib:6.0f} MiB"
                print(f"{fault or ended:12} {cost}  {key}", flush=True)
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
