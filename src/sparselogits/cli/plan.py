"""Define `sparselogits plan`, which estimates the cost of a cache without running a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import typer
from rich.table import Table

from sparselogits.cli.options import (
    DATA,
    DISTRIBUTED,
    MODEL,
    OUTPUT,
    PERFORMANCE,
    TARGETS,
    Group,
    Json,
    given_words,
    print_json,
    print_next,
)
from sparselogits.console import results, styled
from sparselogits.errors import InvalidArgumentError
from sparselogits.lab.planning import (
    MemoryOf,
    Plan,
    Settings,
    Shape,
    StorageCost,
    device_kind,
    fewest_devices,
    largest_batch,
    pass_memory,
    quantity,
    size_of,
    training_memory,
)
from sparselogits.lab.planning import plan as estimate
from sparselogits.lab.planning.cost import BUILD_OVERHEAD, STEP_OVERHEAD, UTILISATION
from sparselogits.lab.planning.grid import grid

COST = Group("Cost")
"""Group of the options about prices."""


def plan(
    context: typer.Context,
    teacher_params: str = MODEL(
        "Number of parameters in the teacher, such as 8B, or a model folder.", ...
    ),
    student_params: str = MODEL(
        "Number of parameters in the student, such as 1B, or a model folder.", "1B"
    ),
    vocab: int = MODEL("Vocabulary size of the teacher.", 128_256),
    tokens: str = DATA("Number of tokens in the text, such as 100B.", "100B"),
    dtype: str = MODEL(
        "Data type of the teacher's weights: bfloat16, float32, int8 or int4.", "bfloat16"
    ),
    window: int = DATA("Tokens per window.", 1024),
    passes: float = DATA("Passes over the cache: students times epochs times repeated runs.", 1.0),
    budget: float = TARGETS("Mean number of entries per token.", 12.0),
    bits: float | None = TARGETS(
        "Bits per entry on disk.", shown="as measured at the same --budget"
    ),
    text_bytes: float | None = TARGETS(
        "Bytes per token for the text that is stored with the targets.",
        shown="as measured",
    ),
    windows_per_shard: int = OUTPUT("Windows per file of the cache.", 512),
    device: str = PERFORMANCE(
        "Type of accelerator: a100-80gb, a100-40gb, h100, h200, b200, l4, l40s, rtx4090, mi300x "
        "and others; another name needs --device-flops.",
        "h100",
    ),
    device_flops: str | None = PERFORMANCE(
        "Dense bfloat16 operations per second of the device, such as 500T.",
        shown="as published for the types of --device",
    ),
    device_memory: str | None = PERFORMANCE(
        "Memory of the device in bytes, such as 80G.",
        shown="as published for the types of --device",
    ),
    batch: int = PERFORMANCE("Windows per forward pass of the teacher.", 8, min=1),
    student_batch: int = PERFORMANCE("Windows per training step and device.", 8, min=1),
    checkpointing: bool = PERFORMANCE(
        "Recompute the student's activations in the backward pass.", False, "--checkpointing"
    ),
    teacher_utilisation: float = PERFORMANCE(
        "Fraction of the device's peak throughput that the teacher reaches.", UTILISATION
    ),
    student_utilisation: float = PERFORMANCE(
        "Fraction of the device's peak throughput that the student reaches.", UTILISATION
    ),
    build_overhead: float = PERFORMANCE(
        "Extra time of a build, as a fraction of the time of the forward passes.", BUILD_OVERHEAD
    ),
    step_overhead: float = PERFORMANCE(
        "Extra time of a training step from the cache, as a fraction of the time of a step with "
        "cross-entropy.",
        STEP_OVERHEAD,
    ),
    workers: int = DISTRIBUTED("Number of devices that run the teacher.", 1),
    ranks: int = DISTRIBUTED("Number of devices that train one student.", 1),
    price: float = COST("Price per device-hour, in any currency; 0 omits all costs.", 0.0),
    storage_price: float = COST(
        "Price per terabyte-month of storage, in the currency of --price.", 0.0
    ),
    months: float = COST("Number of months for which the cache is stored.", 1.0),
    sizes: bool = OUTPUT(
        "Also print a table for students of 300M to 13B and texts of 1B to 10T tokens.",
        False,
        "--grid",
    ),
    plot: Path | None = OUTPUT("PNG file for a chart of the table of --grid.", shown="no chart"),
    as_json: Json = False,
) -> None:
    """Estimate size, hours and cost of a cache, and when it is cheaper than an online teacher."""
    if vocab < 2:
        raise InvalidArgumentError(
            f"--vocab is {vocab}; give the teacher's vocabulary size, at least 2"
        )
    storage = StorageCost.ours(vocab, budget)
    if bits is not None:
        storage = replace(storage, bits_per_entry=bits)
    if text_bytes is not None:
        storage = replace(storage, text_bytes=text_bytes)
    teacher = size_of(teacher_params, "--teacher-params")
    student = size_of(student_params, "--student-params")
    kind = device_kind(
        device,
        None if device_flops is None else quantity(device_flops, "--device-flops"),
        None if device_memory is None else quantity(device_memory, "--device-memory"),
    )
    settings = Settings(
        *(teacher.parameters, student.parameters, quantity(tokens, "--tokens"), storage, passes),
        *(kind, teacher_utilisation, student_utilisation, workers, ranks),
        *(window, windows_per_shard, build_overhead, step_overhead),
        *(price, storage_price, months),
    )
    estimated = estimate(settings)
    models = (
        _ModelMemory(
            "teacher",
            "--batch",
            teacher.shape,
            batch,
            lambda size, devices: pass_memory(
                teacher.parameters,
                teacher.shape,
                vocab=vocab,
                window=window,
                batch=size,
                dtype=dtype,
                devices=devices,
            ),
            kind.memory,
        ),
        _ModelMemory(
            "student",
            "--student-batch",
            student.shape,
            student_batch,
            lambda size, ranks: training_memory(
                student.parameters,
                student.shape,
                vocab=vocab,
                window=window,
                batch=size,
                checkpointing=checkpointing,
                ranks=ranks,
                capacity=kind.memory or 80e9,
            ),
            kind.memory,
        ),
    )
    if plot is not None:
        from sparselogits.lab.report.plan_chart import draw_plan

        draw_plan(settings, plot)
    if as_json:
        shown: dict[str, object] = {"settings": asdict(settings), "plan": asdict(estimated)}
        if sizes:
            shown["grid"] = [
                {"student": student, "tokens": amount} | asdict(entry)
                for (student, amount), entry in grid(settings).items()
            ]
        print_json(shown | {"memory": {model.role: model.to_json() for model in models}})
        return
    results().print(_plan_table(settings, estimated, models))
    if sizes:
        results().print(_grid_table(settings))
    given = ("--teacher", "MODEL", "--data", "TEXT", "--out", "my-cache", "--budget", f"{budget:g}")
    same = given_words(context, "window", "windows_per_shard", "batch")
    print_next("cache", *given, *same)


@dataclass(frozen=True)
class _ModelMemory:
    """Memory that a teacher or a student needs, and the memory of a device, in bytes."""

    role: str
    option: str  # sets the batch size
    shape: Shape
    batch: int
    memory_of: MemoryOf
    capacity: float | None  # None if unknown

    def rows(self) -> list[tuple[str, str]]:
        """Return table rows: memory, whether it fits, largest batch or advice, and the parts."""
        needed = self.memory_of(self.batch, 1)
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in needed.parts)
        text = f"{_bytes(needed.total)} with {self.option} {self.batch}"
        if self.capacity is not None:
            fits = "fits" if needed.fits(self.capacity) else "does not fit"
            text += f": {fits} in {_bytes(self.capacity)}"
            most = largest_batch(self.memory_of, self.capacity)
            text += f"; the largest is {most}" if most else f"; {self._advice(self.capacity)}"
        return [(f"memory, {self.role}", text), ("", f"{parts}; shape of {self.shape.name}")]

    def _advice(self, capacity: float) -> str:
        """Return advice for a model that does not fit on one device with any batch size."""
        devices = fewest_devices(self.memory_of, 1, capacity)
        if devices is None:
            return "no number of such devices is enough"
        if self.role == "teacher":
            return f"split it over {devices} (cache --device-map or --tp-plan)"
        return f"shard it over {devices} (FSDP)"

    def to_json(self) -> dict[str, object]:
        """Return the required memory in bytes, and whether it fits, as JSON values."""
        needed, capacity = self.memory_of(self.batch, 1), self.capacity
        return {
            "batch": self.batch,
            "shape": asdict(self.shape),
            "parts": dict(needed.parts),
            "total": needed.total,
            "capacity": capacity,
            "fits": None if capacity is None else needed.fits(capacity),
            "largest_batch": None if capacity is None else largest_batch(self.memory_of, capacity),
        }


def _plan_table(settings: Settings, found: Plan, models: Sequence[_ModelMemory]) -> Table:
    """Return the table of a plan, with one quantity per row."""
    table = Table(show_header=False, box=None, pad_edge=False)
    even = found.break_even_passes
    s = settings
    per_rank = _bytes(found.read_bytes_per_second_per_rank)
    writes, lost = found.put_requests_per_second, f"{_time(found.lost_hours)} of device time lost"
    shuffled = f"{found.shuffled_requests_per_second:,.0f} requests and "
    shuffled += _bytes(found.shuffled_bytes_per_second)
    rows = [
        ("size", f"{_bytes(found.bytes)}, {found.bytes_per_token:.2f} bytes per token"),
        ("files", f"{found.shards:,} of {_bytes(found.shard_bytes)}"),
        *(row for model in models for row in model.rows()),
        ("tokenising", f"{_time(found.tokenising_hours)} on one processor core"),
        ("teacher", _clock(found.teacher_hours, s.workers, s.device.name)),
        ("training", _clock(found.student_hours, s.ranks, s.device.name)),
        ("  without a teacher", _clock(found.ce_hours, s.ranks, s.device.name)),
        ("  with an online teacher", _clock(found.online_hours, s.ranks, s.device.name)),
        ("break-even", "never" if even is None else f"from {even:.2f} passes over the text"),
        ("writing", f"{_bytes(found.write_bytes_per_second)} per second, all workers"),
        ("reading", f"{_bytes(found.read_bytes_per_second)} per second, {per_rank} per rank"),
        ("requests", f"{found.list_requests:,} to list all, {writes:.3g} writes per second"),
        ("  fully shuffled", f"{shuffled} per second, nothing cached locally"),
        ("failures", f"{found.failures:.2g} expected, {lost}, {_time(found.shard_hours)} per file"),
    ]
    if s.device_price > 0:
        rows.append(("cost", f"{found.cached_cost:,.0f}, online teacher {found.online_cost:,.0f}"))
        passes = found.break_even_cost_passes
        rows.append(("  break-even", "never" if passes is None else f"from {passes:.2f} passes"))
    for name, value in rows:
        table.add_row(styled(name, "dim"), value)
    return table


def _grid_table(settings: Settings) -> Table:
    """Return the table of `--grid`, with a row per student size and amount of text."""
    table = Table(box=None, pad_edge=False)
    heads = ("student", "tokens", "size", "files", "teacher h", "student h", "online h")
    for name in (*heads, "break-even"):
        table.add_column(name, justify="right", no_wrap=True)
    for (student, amount), found in grid(settings).items():
        even = found.break_even_passes
        hours = (found.teacher_hours, found.student_hours, found.online_hours)
        table.add_row(
            *(student, amount, _bytes(found.bytes), f"{found.shards:,}"),
            *(f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in hours),
            "never" if even is None else f"{even:.2f}",
        )
    return table


def _clock(hours: float, devices: int, name: str) -> str:
    """Format the elapsed time that a number of device-hours takes on several devices."""
    if devices == 1:
        return f"{_time(hours)} on one {name}"
    return f"{_time(hours / devices)} on {devices:,} {name}, {hours:,.1f} device-hours"


def _time(hours: float) -> str:
    """Format a time in hours with a suitable unit: seconds, minutes, hours or days."""
    seconds = hours * 3600
    if seconds < 1:
        return "under a second"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 72 else f"{hours:,.0f} h ({hours / 24:,.1f} days)"


def _bytes(count: float) -> str:
    """Format a number of bytes with a decimal unit, from B to PB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count / 1000:,.3g} PB"
