"""Hostile bytes against every decoder, under an address-space limit.

    python -m tests.faults.fuzz --inputs 1000000 --out tests/faults/results/fuzz.json

Four doors, taken in turn; each input is a sound original with some bytes changed, cut, repeated or
inserted. An input passes when it decodes, or raises the library's typed error; it fails when
anything else is raised, when it takes more than ten seconds, or when the process dies. Memory is
bounded by RLIMIT_AS: what the process has mapped at the start plus `--memory-mib`.

    block   a window's coded targets, handed to the decoder without any checksum before it
    tables  the coding tables of a shard, likewise
    frame   a shard file as it is: guard and footer must refuse it
    forged  a shard file whose guard was made to fit the changed bytes again, so that Parquet's own
            parser sees them: the work of an adversary, not of a disk
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa

from sparselogits.errors import CacheCorruptionError
from sparselogits.store.codec import BlockError, TargetCodec, Window
from sparselogits.store.memory import MemoryStorage
from sparselogits.store.shard import Shard
from sparselogits.store.shard_writer import encode_shard
from tests.store.draws import KINDS, identity, records

SECONDS = 10


class SlowError(Exception):
    """An input that took too long."""


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One to four edits, of kinds that break parsers."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(out) + 1)
        match chance.randrange(6):
            case 0 if out:
                out[at % len(out)] ^= 1 << chance.randrange(8)
            case 1 if out:
                out[at % len(out)] = chance.randrange(256)
            case 2:
                del out[at:]
            case 3:
                out[at : at + chance.randrange(1, 9)] = b""
            case 4:
                out[at:at] = out[at : at + chance.randrange(1, 65)]
            case _:
                out[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
    return bytes(out)


def reseal(data: bytes) -> bytes:
    """Make the guard fit again, where its frame can still be found."""
    out = bytearray(data)
    if len(out) < 28:
        return data
    footer = len(out) - 8 - int.from_bytes(out[-8:-4], "little")
    if footer < 20 or out[footer - 8 : footer] != b"SLGUARD1":
        return data
    count = int.from_bytes(out[footer - 20 : footer - 16], "little")
    start = footer - 20 - 20 * count
    if start < 0:
        return data
    for at in range(start, footer - 20, 20):
        first, length = struct.unpack_from("<QQ", out, at)
        if first + length <= start:
            crc = google_crc32c.value(bytes(out[first : first + length]))
            struct.pack_into("<I", out, at + 16, crc)
    struct.pack_into("<I", out, footer - 16, google_crc32c.value(bytes(out[footer:])))
    struct.pack_into("<I", out, footer - 12, google_crc32c.value(bytes(out[start : footer - 12])))
    return bytes(out)


def doors() -> dict[str, Callable[[random.Random], None]]:
    """An action for each door: feed it one mutated input; typed errors escape."""
    made = {kind: _originals(kind) for kind in KINDS}

    def block(chance: random.Random) -> None:
        codec, tables, blocks, windows, _ = made[chance.choice(list(KINDS))]
        i = chance.randrange(len(blocks))
        decoder = codec.decoder(tables)
        decoder.decode(i, mutate(blocks[i], chance), windows[i].tokens, windows[i].present)

    def tables(chance: random.Random) -> None:
        codec, tables, blocks, windows, _ = made[chance.choice(list(KINDS))]
        name = chance.choice(list(tables))
        (first, table), *rest = tables[name]
        broken = {**tables, name: [(first, mutate(table, chance)), *rest]}
        i = chance.randrange(len(blocks))
        codec.decoder(broken).decode(i, blocks[i], windows[i].tokens, windows[i].present)

    def frame(chance: random.Random) -> None:
        kind = chance.choice(list(KINDS))
        name, data = made[kind][4]
        _read(kind, name, mutate(data, chance))

    def forged(chance: random.Random) -> None:
        kind = chance.choice(list(KINDS))
        name, data = made[kind][4]
        _read(kind, name, reseal(_mutate_inside(data, chance)))

    return {"block": block, "tables": tables, "frame": frame, "forged": forged}


def _originals(kind: str) -> tuple[Any, ...]:
    made = records(kind, 0, 9)
    codec = TargetCodec.from_identity(identity(kind).codec, 1000)
    windows = [Window(r.targets, r.tokens, r.present()) for r in made]
    tables, blocks = codec.encode(windows)
    return codec, tables, blocks, windows, encode_shard(identity(kind), made, {"a": 1})


def _mutate_inside(data: bytes, chance: random.Random) -> bytes:
    """Overwrite bytes of pages or footer, so that the guard's frame stays in its place."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(out) - 8)
        new = chance.choice((b"\xff\xff\xff\x7f", b"\xff", b"\0", bytes([chance.randrange(256)])))
        out[at : at + len(new)] = new
    return bytes(out)


def _read(kind: str, name: str, data: bytes) -> None:
    shard = Shard(MemoryStorage({name: data}), name, identity(kind))
    for row in range(len(shard)):
        shard.read(row)


def fuzz(inputs: int, seed: int) -> dict[str, Any]:
    """Run; returns how each door answered. Raises what a door should not have raised."""
    ways, answers = doors(), {}
    signal.signal(signal.SIGALRM, _too_slow)
    for number in range(inputs):
        door = list(ways)[number % len(ways)]
        chance = random.Random(f"{seed}/{number}")
        signal.alarm(SECONDS)
        try:
            ways[door](chance)
            answer = "decoded"
        except (BlockError, CacheCorruptionError) as error:
            answer = type(error).__name__
        except BaseException as error:
            raise AssertionError(
                f"input {number} of seed {seed}, door {door}: {error!r}"
            ) from error
        finally:
            signal.alarm(0)
        answers.setdefault(door, Counter())[answer] += 1
    return {door: dict(sorted(count.items())) for door, count in answers.items()}


def _too_slow(*_: object) -> None:
    raise SlowError(f"more than {SECONDS} s")


def limit_memory(mib: int) -> None:
    """Bound the address space to what is mapped now and `mib` more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-mib", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    doors()  # whatever is loaded on first use is loaded before the limit
    limit_memory(options.memory_mib)
    start = time.monotonic()
    result = {
        "inputs": options.inputs,
        "seed": options.seed,
        "memory_mib": options.memory_mib,
        "answers": fuzz(options.inputs, options.seed),
        "seconds": round(time.monotonic() - start),
        "failures": 0,
        "python": platform.python_version(),
        "pyarrow": pa.__version__,
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
