"""Run every decoder on malformed bytes, under a limit of address space.

    python -m tests.faults.fuzz --first 0 --inputs 10000 --out piece.json
    python -m tests.faults.run --only fuzz                  a million

Six entry points are used in turn. Each input is a valid original with some bytes changed, cut,
repeated or inserted, as a function of its number and the seed. An input passes if it decodes or
raises a typed error of the library; it fails if it raises anything else, takes more than ten
seconds, or kills the process. RLIMIT_AS bounds the memory to what the process has mapped at the
start plus `--memory-mib`. The maximum is reported.

    block     the coded targets of a window, passed to the decoder without checksums
    tables    the coding tables of a shard, without checksums
    footer    guard and footer of a shard, with a guard that matches the changed bytes
    frame     a shard file, which guard and footer must reject
    forged    a shard file with a guard that matches the changed bytes, so that Parquet's parser
              reads them: this happens only in an attack, not by damage
    identity  a cache.json, sometimes nested deeper than a parser can recurse
"""

import argparse
import json
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

from sparselogits.errors import CacheError
from sparselogits.identity import canonical_json
from sparselogits.store.bounds import DamageError
from sparselogits.store.cache import CACHE_JSON, read_identity
from sparselogits.store.codec import BlockDecoder, TargetCodec, TargetWindow
from sparselogits.store.shard.reader import Shard
from sparselogits.store.shard.writer import encode_shard
from sparselogits.store.storage.memory import FilesInMemory
from tests.store.draws import KINDS, identity, records

SECONDS = 10
MEMORY_MIB = 64


class SlowError(Exception):
    """Raised for an input that takes too long."""


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Return the data after one to four edits of kinds that break parsers."""
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
    """Return the file with a valid guard, if the frame of the guard can still be found."""
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
    """Return a function per entry point that runs it on one mutated input."""
    made = {kind: _originals(kind) for kind in KINDS}

    def block(chance: random.Random) -> None:
        codec, tables, blocks, windows, _ = made[chance.choice(list(KINDS))]
        i = chance.randrange(len(blocks))
        decoder = BlockDecoder(codec, tables)
        decoder.decode(i, mutate(blocks[i], chance), windows[i].tokens, windows[i].present)

    def tables(chance: random.Random) -> None:
        codec, tables, blocks, windows, _ = made[chance.choice(list(KINDS))]
        name = chance.choice(list(tables))
        (first, table), *rest = tables[name]
        broken = {**tables, name: [(first, mutate(table, chance)), *rest]}
        i = chance.randrange(len(blocks))
        BlockDecoder(codec, broken).decode(i, blocks[i], windows[i].tokens, windows[i].present)

    def frame(chance: random.Random) -> None:
        kind = chance.choice(list(KINDS))
        name, data = made[kind][4]
        _read(kind, name, mutate(data, chance))

    def forged(chance: random.Random) -> None:
        kind = chance.choice(list(KINDS))
        name, data = made[kind][4]
        _read(kind, name, reseal(_mutate_inside(data, chance)))

    def footer(chance: random.Random) -> None:
        kind = chance.choice(list(KINDS))
        name, data = made[kind][4]
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        _read(kind, name, reseal(_mutate_inside(data, chance, start)))

    def identity_(chance: random.Random) -> None:
        data = canonical_json(
            {"fingerprint": identity().fingerprint, "identity": identity().to_json()}
        )
        if chance.random() < 0.05:
            at = 1 + chance.choice([i for i, byte in enumerate(data) if byte == ord(":")])
            data = data[:at] + chance.choice((b"[", b'{"a":')) * 100_000 + data[at:]
        else:
            data = mutate(data, chance)
        read_identity(FilesInMemory({CACHE_JSON: data}))

    return {
        "block": block,
        "tables": tables,
        "footer": footer,
        "frame": frame,
        "forged": forged,
        "identity": identity_,
    }


def _originals(kind: str) -> tuple[Any, ...]:
    made = records(kind, 0, 9)
    codec = TargetCodec.from_identity(identity(kind).codec, 1000)
    windows = [TargetWindow(r.targets, r.tokens, r.present()) for r in made]
    tables, blocks = codec.encode(windows)
    return codec, tables, blocks, windows, encode_shard(identity(kind), made, {"a": 1})


def _mutate_inside(data: bytes, chance: random.Random, start: int = 0) -> bytes:
    """Overwrite bytes from `start` on and keep the length, so that the guard stays in place."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(start, len(out) - 8)
        new = chance.choice((b"\xff\xff\xff\x7f", b"\xff", b"\0", bytes([chance.randrange(256)])))
        out[at : at + len(new)] = new
    return bytes(out)


def _read(kind: str, name: str, data: bytes) -> None:
    shard = Shard(FilesInMemory({name: data}), name, identity(kind))
    for row in range(len(shard)):
        shard.read(row)


def fuzz(first: int, inputs: int, seed: int) -> dict[str, dict[str, int]]:
    """Run inputs, and return the outcomes per entry point; unexpected errors are raised."""
    ways = doors()
    answers: dict[str, Counter[str]] = {door: Counter() for door in ways}
    signal.signal(signal.SIGALRM, _too_slow)
    for number in range(first, first + inputs):
        door = list(ways)[number % len(ways)]
        chance = random.Random(f"{seed}/{number}")
        signal.alarm(SECONDS)
        try:
            ways[door](chance)
            answer = "decoded"
        except (DamageError, CacheError) as error:
            answer = type(error).__name__ + " for want of memory" * _wanted_memory(error)
        except BaseException as error:
            raise AssertionError(
                f"input {number} of seed {seed}, door {door}: {error!r}"
            ) from error
        finally:
            signal.alarm(0)
        answers[door][answer] += 1
    return {door: dict(sorted(count.items())) for door, count in answers.items()}


def _wanted_memory(error: BaseException | None) -> bool:
    """Return whether the limit of memory caused an error."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__
    return error is not None


def _too_slow(*_: object) -> None:
    raise SlowError(f"more than {SECONDS} s")


def limit_memory(mib: int) -> int:
    """Limit the address space to `mib` beyond what is mapped now; return the mapped bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    mapped = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (mib << 20),) * 2)
    return mapped


def highest_mapped() -> int:
    """Return the maximum of mapped bytes in the life of the process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmPeak:")[1].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-mib", type=int, default=MEMORY_MIB)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # whatever is loaded on first use, threads and their stacks too, is there before the limit
    fuzz(0, 60, seed=-1)
    mapped = limit_memory(options.memory_mib)
    start = time.monotonic()
    answers = fuzz(options.first, options.inputs, options.seed)
    result = {
        "first": options.first,
        "inputs": options.inputs,
        "seed": options.seed,
        "memory_mib": options.memory_mib,
        "highest_mib": max(0, highest_mapped() - mapped) / (1 << 20),
        "answers": answers,
        "seconds": time.monotonic() - start,
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
