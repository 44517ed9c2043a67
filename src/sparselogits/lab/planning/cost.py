"""Compute the cost of a cache and of training from it, from constants whose sources are stated.

A matrix product with P parameters costs 2 P operations per token forward and 4 P backward (Kaplan
et al. 2020, arXiv 2001.08361, section 2.1). The products inside attention are not counted; in a 1B
model they are a few per cent of all operations at 1 024 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.planning.devices import DEVICES, DeviceKind

FORWARD, TRAINING = 2, 6
"""Operations per parameter and token, for a forward pass and for a training step."""
UTILISATION = 0.4
"""Default share of a device's peak rate that a model reaches.

An assumption: Llama 3 405B reports 38 to 43 % (arXiv 2407.21783, table 4).
"""
BUILD_OVERHEAD = 0.046
"""Extra time of a build, relative to the teacher's passes (benchmarks/cache_build.json)."""
STEP_OVERHEAD = 0.006
"""Extra time of a step from the cache, relative to a CE step (benchmarks/step.json, 'even')."""
TEXT_BYTES = 1.49
"""Stored bytes per token without the targets (benchmarks/size.json, V = 49 152)."""
MEASURED_BITS = ((49_152, 9.683), (128_256, 12.19))
"""Pairs of vocabulary size and bits per entry, for 21 systematic rounds (benchmarks/size.json).

The second pair was measured on a shard of four synthetic windows, so interpolated values are too
high.
"""
ROW_GROUP = 8
"""Number of windows per row group, the smallest unit that is fetched (docs/format.md)."""
TOKENISED_PER_SECOND = 602_000.0
"""Tokens that one core tokenises and packs per second (benchmarks/packing.json).

Measured with SmolLM2's tokenizer; slow tokenizers and compressed text take several times as long.
"""
LIST_PAGE = 1000
"""Number of names per page when listing an object store; the limit of S3."""
COLD_REQUESTS = 3
"""Number of requests to read a window of an unopened shard (benchmarks/object_store.json)."""
HOURS_BETWEEN_FAILURES = 50_700.0
"""Mean hours between failures of one device.

Llama 3 405B: 419 interruptions in 54 days on 16 384 devices (arXiv 2407.21783, section 3.3.4).
"""


@dataclass(frozen=True)
class StorageCost:
    """Bytes per token on disk, and the quantities that determine them.

    Args:
        entries: mean entries per token.
        bits_per_entry: stored bits per entry.
        text_bytes: stored bytes per token without the targets.
    """

    entries: float = 12.0
    bits_per_entry: float = MEASURED_BITS[0][1]
    text_bytes: float = TEXT_BYTES

    @classmethod
    def ours(cls, vocab: int, entries: float = 12.0) -> StorageCost:
        """Return the cost with this package's codec, from `MEASURED_BITS` by linear interpolation.

        The interpolation is in log(vocab). A smaller vocabulary than the first measured one has the
        bits of the first; for a larger one than the second, the line is extended.
        """
        (small, low), (large, high) = MEASURED_BITS
        share = max(0.0, math.log(vocab / small) / math.log(large / small))
        return cls(entries, low + share * (high - low), TEXT_BYTES)

    @classmethod
    def paper(cls, entries: float = 12.0) -> StorageCost:
        """Return the cost in RS-KD (arXiv 2503.16870): 17-bit ids, 7-bit counts, and no text."""
        return cls(entries, 24.0, 0.0)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token for targets and text."""
        return self.entries * self.bits_per_entry / 8 + self.text_bytes


@dataclass(frozen=True)
class Settings:
    """Inputs of a plan; prices may be in any currency.

    Args:
        teacher_params: number of parameters in the teacher.
        student_params: number of parameters in a student.
        tokens: number of tokens of text.
        storage: bytes per token on disk.
        passes: number of passes over the cached text, that is, students times epochs times
            restarts.
        device: device that runs teacher and students.
        teacher_utilisation: share of the device's peak rate that the teacher reaches, in (0, 1].
        student_utilisation: share of the device's peak rate that a student reaches, in (0, 1].
        workers: number of devices that run the teacher.
        ranks: number of devices that train one student.
        window: number of tokens per window.
        windows_per_shard: number of windows per shard.
        build_overhead: extra time of a build, relative to the teacher's forward passes.
        step_overhead: extra time of a step from the cache, relative to a CE step.
        device_price: price per device-hour.
        storage_price: price per terabyte (1e12 bytes) and month.
        months: number of months for which the cache is stored.
        hours_between_failures: mean hours between failures of one device.

    Raises:
        InvalidArgumentError: If a value is out of range.
    """

    teacher_params: float
    student_params: float
    tokens: float
    storage: StorageCost = field(default_factory=StorageCost)
    passes: float = 1.0
    device: DeviceKind = DEVICES["h100"]
    teacher_utilisation: float = UTILISATION
    student_utilisation: float = UTILISATION
    workers: int = 1
    ranks: int = 1
    window: int = 1024
    windows_per_shard: int = 512
    build_overhead: float = BUILD_OVERHEAD
    step_overhead: float = STEP_OVERHEAD
    device_price: float = 0.0
    storage_price: float = 0.0
    months: float = 1.0
    hours_between_failures: float = HOURS_BETWEEN_FAILURES

    def __post_init__(self) -> None:
        for name in ("teacher_params", "student_params", "tokens", "passes"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("workers", "ranks", "window", "windows_per_shard"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("teacher_utilisation", "student_utilisation"):
            _require(0 < getattr(self, name) <= 1, name, getattr(self, name), "at most 1, above 0")
        for name in ("build_overhead", "step_overhead", "device_price", "storage_price", "months"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name, value in {
            "hours between failures": self.hours_between_failures,
            "device flops": self.device.flops,
            "entries": self.storage.entries,
            "bits per entry": self.storage.bits_per_entry,
        }.items():
            _require(value > 0, name, value, "more than 0")


@dataclass(frozen=True)
class Plan:
    """Cost of a cache and of training from it.

    Hours are device-hours unless stated otherwise; divide by workers or ranks for elapsed time.

    Args:
        bytes: bytes of the cache.
        bytes_per_token: bytes of the cache per token.
        windows: number of windows.
        shards: number of shards.
        shard_bytes: bytes of the largest shard.
        tokenising_hours: hours of one processor core to tokenise and pack the text.
        teacher_hours: hours of the build: forward passes, sampling, encoding and writing.
        student_hours: hours per pass of a student over the cache.
        ce_hours: hours per pass of a student over the text without a teacher.
        online_hours: hours per pass of a student over the text with the teacher online.
        cached_cost: price of the build, all training passes, and storage.
        online_cost: price of all passes with the teacher online.
        break_even_passes: number of passes from which on the cache takes fewer device-hours than
            the teacher online; None if it never does.
        break_even_cost_passes: number of passes from which on the cache, with storage, is cheaper
            than the teacher online; None if it never is, or without a device price.
        read_bytes_per_second: bytes per second that all ranks of one student read together.
        read_bytes_per_second_per_rank: bytes per second that one rank reads.
        write_bytes_per_second: bytes per second that all workers write together.
        list_requests: number of requests to list all shards.
        put_requests_per_second: uploads of shards per second, by all workers.
        shuffled_requests_per_second: requests per second of all ranks of one student in the worst
            order, in which each window is in a shard that is not open.
        shuffled_bytes_per_second: bytes per second that all ranks of one student read in the worst
            order, in which a row group is fetched per window.
        shard_hours: mean hours that a worker needs for one shard; a failure loses at most a shard.
        failures: expected number of worker failures during the build.
        lost_hours: hours lost to these failures, half a shard each, without the time to restart.
    """

    bytes: float
    bytes_per_token: float
    windows: int
    shards: int
    shard_bytes: float
    tokenising_hours: float
    teacher_hours: float
    student_hours: float
    ce_hours: float
    online_hours: float
    cached_cost: float
    online_cost: float
    break_even_passes: float | None
    break_even_cost_passes: float | None
    read_bytes_per_second: float
    read_bytes_per_second_per_rank: float
    write_bytes_per_second: float
    list_requests: int
    put_requests_per_second: float
    shuffled_requests_per_second: float
    shuffled_bytes_per_second: float
    shard_hours: float
    failures: float
    lost_hours: float


def plan(settings: Settings) -> Plan:
    """Compute the cost of a cache and of training from it.

    Examples:
        >>> found = plan(Settings(teacher_params=8e9, student_params=1e9, tokens=1e9))
        >>> found.windows, round(found.bytes_per_token, 2)
        (976563, 16.01)
    """
    s = settings
    windows = math.ceil(s.tokens / s.window)
    per_token = s.storage.bytes_per_token
    forward = _hours(FORWARD * s.teacher_params, s.tokens, s.device, s.teacher_utilisation)
    ce = _hours(TRAINING * s.student_params, s.tokens, s.device, s.student_utilisation)
    teacher, student = forward * (1 + s.build_overhead), ce * (1 + s.step_overhead)
    online = ce + forward
    stored = s.tokens * per_token / 1e12 * s.storage_price * s.months
    saved = online - student
    fixed = teacher * s.device_price + stored
    rank = per_token * s.tokens / (student * 3600)
    shards = math.ceil(windows / s.windows_per_shard)
    windows_read = windows / (student * 3600) * s.ranks
    failures, shard_hours = teacher / s.hours_between_failures, teacher / shards
    return Plan(
        bytes=s.tokens * per_token,
        bytes_per_token=per_token,
        windows=windows,
        shards=shards,
        shard_bytes=per_token * s.window * min(windows, s.windows_per_shard),
        tokenising_hours=s.tokens / TOKENISED_PER_SECOND / 3600,
        teacher_hours=teacher,
        student_hours=student,
        ce_hours=ce,
        online_hours=online,
        cached_cost=fixed + s.passes * student * s.device_price,
        online_cost=s.passes * online * s.device_price,
        break_even_passes=teacher / saved if saved > 0 else None,
        break_even_cost_passes=(
            fixed / (saved * s.device_price) if saved > 0 and s.device_price > 0 else None
        ),
        read_bytes_per_second=rank * s.ranks,
        read_bytes_per_second_per_rank=rank,
        write_bytes_per_second=per_token * s.tokens / (teacher * 3600) * s.workers,
        list_requests=math.ceil(shards / LIST_PAGE),
        put_requests_per_second=shards / (teacher * 3600) * s.workers,
        shuffled_requests_per_second=COLD_REQUESTS * windows_read,
        shuffled_bytes_per_second=rank * s.ranks * ROW_GROUP,
        shard_hours=shard_hours,
        failures=failures,
        lost_hours=failures * shard_hours / 2,
    )


def _hours(operations: float, tokens: float, device: DeviceKind, utilisation: float) -> float:
    return operations * tokens / (device.flops * utilisation) / 3600


def _require(holds: bool, name: str, found: float, expected: str) -> None:
    if not holds:
        raise InvalidArgumentError(f"{name} is {found:g}; give {expected}")
