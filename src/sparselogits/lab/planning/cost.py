"""Compute a plan by pure functions of its settings; every constant states its source.

A matrix product with P parameters costs 2 P operations per token forward and 4 P backward (Kaplan
et al. 2020, arXiv 2001.08361, section 2.1); attention over the window, which at 1 024 tokens is a
few per cent of a 1B model, is not included. Teacher and student may reach different utilisations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.planning.devices import DEVICES, DeviceKind

FORWARD, TRAINING = 2, 6
UTILISATION = 0.4
"""Assumed, not measured here: Llama 3 405B reports 38 to 43 % (arXiv 2407.21783, table 4)."""
BUILD_OVERHEAD = 0.046
"""Extra time of a build, as a share of the time of the teacher's forward passes:
benchmarks/cache_build.json."""
STEP_OVERHEAD = 0.006
"""Extra time of a training step from the cache, as a share of the time of a CE step:
benchmarks/step.json, student 'even'."""
TEXT_BYTES = 1.49
"""Stored bytes per token, without the targets: benchmarks/size.json, V = 49 152."""
MEASURED_BITS = ((49_152, 9.683), (128_256, 12.19))
"""Bits per entry (systematic, N = 21) by vocabulary size: benchmarks/size.json. The second is
measured on synthetic targets in a shard of four windows, so the line through both errs on the safe
side."""
ROW_GROUP = 8
"""Windows per row group, the smallest unit that is fetched: docs/format.md."""
TOKENISED_PER_SECOND = 602_000.0
"""Tokens that one core tokenises and packs per second, from text files, with SmolLM2's tokenizer:
benchmarks/packing.json. Slow pre-tokenizers and compressed sources take several times as long."""
LIST_PAGE = 1000
"""Names per page of an object-store listing: benchmarks/object_store.json, and S3's own limit."""
COLD_REQUESTS = 3
"""HEAD and two GET for a window of a shard that is not open: benchmarks/object_store.json."""
HOURS_BETWEEN_FAILURES = 50_700.0
"""Mean hours between failures of one device: Llama 3 405B had 419 unexpected interruptions in 54
days on 16 384 devices (arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class StorageCost:
    """Bytes of a token on disk."""

    entries: float = 12.0
    bits_per_entry: float = MEASURED_BITS[0][1]
    text_bytes: float = TEXT_BYTES

    @classmethod
    def ours(cls, vocab: int, entries: float = 12.0) -> StorageCost:
        """Return the cost with this package's codec: measured bits per entry, linear in log V."""
        (small, low), (large, high) = MEASURED_BITS
        share = max(0.0, math.log(vocab / small) / math.log(large / small))
        return cls(entries, low + share * (high - low), TEXT_BYTES)

    @classmethod
    def paper(cls, entries: float = 12.0) -> StorageCost:
        """Return the cost of RS-KD as published: 17-bit id and 7-bit count, without the text."""
        return cls(entries, 24.0, 0.0)

    @property
    def bytes_per_token(self) -> float:
        """Return the bytes of a token's targets and text."""
        return self.entries * self.bits_per_entry / 8 + self.text_bytes


@dataclass(frozen=True)
class Settings:
    """Settings of a plan; rates are per device, prices in any currency."""

    teacher_params: float
    student_params: float
    tokens: float
    storage: StorageCost = field(default_factory=StorageCost)
    passes: float = 1.0
    """Times the cached text is trained on: students times epochs times restarts."""
    device: DeviceKind = DEVICES["h100"]
    teacher_utilisation: float = UTILISATION
    student_utilisation: float = UTILISATION
    workers: int = 1
    """Devices that run the teacher."""
    ranks: int = 1
    """Devices that train one student."""
    window: int = 1024
    windows_per_shard: int = 512
    build_overhead: float = BUILD_OVERHEAD
    step_overhead: float = STEP_OVERHEAD
    device_price: float = 0.0
    """Price per device-hour."""
    storage_price: float = 0.0
    """Price per terabyte (1e12 bytes) and month."""
    months: float = 1.0
    hours_between_failures: float = HOURS_BETWEEN_FAILURES
    """Mean device hours between failures."""

    def __post_init__(self) -> None:
        for name in ("teacher_params", "student_params", "tokens", "passes"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("workers", "ranks", "window", "windows_per_shard"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("teacher_utilisation", "student_utilisation"):
            _require(0 < getattr(self, name) <= 1, name, getattr(self, name), "in (0, 1]: 0.4")
        hours = self.hours_between_failures
        _require(hours > 0, "hours between failures", hours, "more than 0")
        _require(self.device.flops > 0, "device flops", self.device.flops, "more than 0")
        for name in ("build_overhead", "step_overhead", "device_price", "storage_price", "months"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.storage.entries > 0, "entries", self.storage.entries, "more than 0")
        bits = self.storage.bits_per_entry
        _require(bits > 0, "bits per entry", bits, "more than 0")


@dataclass(frozen=True)
class Plan:
    """Result of a plan. Hours are device hours; divide by workers or ranks for elapsed time."""

    bytes: float
    bytes_per_token: float
    windows: int
    shards: int
    shard_bytes: float
    tokenising_hours: float
    """Hours of one processor core for tokenising and packing the text, once."""
    teacher_hours: float
    """Hours of the teacher's whole pass: forward, sampling, encoding, writing."""
    student_hours: float
    """Hours of one student's pass over the cache."""
    ce_hours: float
    """Hours of the same pass without a teacher."""
    online_hours: float
    """Hours of the same pass with an online teacher."""
    cached_cost: float
    """Price of the teacher's pass, all passes of students, and storage."""
    online_cost: float
    """Price of all passes with an online teacher."""
    break_even_passes: float | None
    """Number of passes from which the cache takes fewer device hours; None: never."""
    break_even_cost_passes: float | None
    """Number of passes from which the cache is cheaper, with storage; None: no price, or never."""
    read_bytes_per_second: float
    """Bytes per second that all ranks of one student read."""
    read_bytes_per_second_per_rank: float
    write_bytes_per_second: float
    """Bytes per second that all workers write."""
    list_requests: int
    """Requests for one whole listing."""
    put_requests_per_second: float
    """Uploads per second by all workers, one per shard."""
    shuffled_requests_per_second: float
    """Requests per second of all ranks in the worst order: no window is in an open shard."""
    shuffled_bytes_per_second: float
    """Bytes per second in the worst order: a whole row group is fetched per window."""
    shard_hours: float
    """A worker's hours for one shard, the largest loss by one failure."""
    failures: float
    """Expected failures of workers during the teacher's pass."""
    lost_hours: float
    """Device hours lost to these failures, half a shard each, without restarts."""


def plan(settings: Settings) -> Plan:
    """Compute a plan."""
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


def throughput_lost(ce: float, cached: float) -> float:
    """Return the share of CE's throughput lost to the cache, from speeds relative to full KD."""
    return 1 - cached / ce


def _hours(operations: float, tokens: float, device: DeviceKind, utilisation: float) -> float:
    return operations * tokens / (device.flops * utilisation) / 3600


def _require(holds: bool, name: str, found: float, expected: str) -> None:
    if not holds:
        raise InvalidArgumentError(f"{name} is {found:g}; give {expected}")
