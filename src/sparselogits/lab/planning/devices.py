"""List peak rates (dense bfloat16 operations) and memory of accelerators, as vendors state them.

No value was measured. A vendor's GB is taken as 1e9 bytes, which is less than most devices report.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError


@dataclass(frozen=True)
class DeviceKind:
    """Kind of accelerator.

    Args:
        name: name by which options select the device.
        flops: dense bfloat16 floating-point operations per second.
        source: source of `flops`.
        memory: bytes of memory; None if unknown.
    """

    name: str
    flops: float
    source: str
    memory: float | None = None


_AMPERE = "NVIDIA A100 data sheet, BF16 tensor core, dense"
_ADA = "NVIDIA Ada GPU architecture white paper, BF16 with FP32 accumulate, dense"
DEVICES: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        DeviceKind("a100-40gb", 312e12, _AMPERE, 40e9),
        DeviceKind("a100-80gb", 312e12, _AMPERE, 80e9),
        DeviceKind("a10", 125e12, "NVIDIA A10 data sheet, BF16, 250 TFLOPS sparse, halved", 24e9),
        DeviceKind("a10g", 70e12, "NVIDIA A10G data sheet, BF16, 140 TFLOPS sparse, halved", 24e9),
        DeviceKind("a40", 149.7e12, "NVIDIA A40 data sheet, BF16 tensor core, dense", 48e9),
        DeviceKind("a6000", 154.8e12, "NVIDIA RTX A6000 data sheet, 309.7 sparse, halved", 48e9),
        DeviceKind("h100-pcie", 756e12, "NVIDIA H100 PCIe data sheet, 1513 sparse, halved", 80e9),
        DeviceKind("h100", 989e12, "NVIDIA H100 SXM data sheet, 1979 TFLOPS sparse, halved", 80e9),
        DeviceKind("h200", 989e12, "NVIDIA H200 SXM data sheet, 1979 TFLOPS sparse, halved", 141e9),
        DeviceKind("gh200", 989e12, "NVIDIA GH200 data sheet, 1979 TFLOPS sparse, halved", 96e9),
        DeviceKind(
            "b200", 2250e12, "NVIDIA DGX B200 data sheet, 36 PFLOPS sparse of 8, halved", 180e9
        ),
        DeviceKind("l4", 121e12, "NVIDIA L4 data sheet, 242 TFLOPS sparse, halved", 24e9),
        DeviceKind("l40s", 362e12, "NVIDIA L40S data sheet, 362 TFLOPS dense", 48e9),
        DeviceKind(
            "rtx3090", 71e12, "NVIDIA GA102 white paper, BF16 with FP32 accumulate, dense", 24e9
        ),
        DeviceKind("rtx4090", 165.2e12, _ADA, 24e9),
        DeviceKind(
            "rtx5090", 209.5e12, "NVIDIA RTX Blackwell white paper, BF16 with FP32, dense", 32e9
        ),
        DeviceKind("mi250x", 383e12, "AMD Instinct MI250X data sheet, BF16 matrix", 128e9),
        DeviceKind(
            "mi300x", 1307.4e12, "AMD Instinct MI300X data sheet, BF16 matrix, dense", 192e9
        ),
        DeviceKind(
            "mi325x", 1307.4e12, "AMD Instinct MI325X data sheet, BF16 matrix, dense", 256e9
        ),
    )
}
"""Known kinds of devices, by name."""
_ALIASES = {
    "a100": "a100-80gb",
    "a100sxm": "a100-80gb",
    "a10080gbsxm": "a100-80gb",
    "a100sxm480gb": "a100-80gb",
    "a100sxm440gb": "a100-40gb",
    "h10080gb": "h100",
    "h100sxm": "h100",
    "h100sxm5": "h100",
    "h10080gbhbm3": "h100",
    "h100nvl": "h100-pcie",
    "h200sxm": "h200",
    "h200141gb": "h200",
    "rtxa6000": "a6000",
    "3090": "rtx3090",
    "4090": "rtx4090",
    "5090": "rtx5090",
}
"""Names in `DEVICES` by other normalised names of a device."""


def device_kind(name: str, flops: float | None = None, memory: float | None = None) -> DeviceKind:
    """Return the kind of a device by name.

    Case, punctuation, vendors and product lines are ignored: "NVIDIA H100 80GB HBM3" is h100.

    Args:
        name: name of the device; any name if `flops` is given.
        flops: dense bfloat16 operations per second; None for the vendor's value.
        memory: bytes of memory; None for the vendor's value.

    Raises:
        InvalidArgumentError: If the device is unknown, and `flops` is not given.

    Examples:
        >>> device_kind("NVIDIA H100 80GB HBM3").name
        'h100'
    """
    normalised = {_normalised(known): kind for known, kind in DEVICES.items()}
    wanted = _normalised(name)
    known = normalised.get(wanted) or DEVICES.get(_ALIASES.get(wanted, ""))
    if known is None:
        if flops is not None:
            return DeviceKind(name, flops, "given", memory)
        near = difflib.get_close_matches(wanted, normalised, 1)
        hint = f", did you mean {near[0]}?" if near else "."
        raise InvalidArgumentError(
            f"unknown device {name!r}{hint} Available: {', '.join(DEVICES)}. For another device "
            "give the dense bfloat16 operations per second, as in --device-flops 500T, and the "
            "memory, as in --device-memory 80G"
        )
    return DeviceKind(
        known.name,
        known.flops if flops is None else flops,
        known.source if flops is None else "given",
        known.memory if memory is None else memory,
    )


def _normalised(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|amd|instinct|[^a-z0-9]", "", name.lower())
