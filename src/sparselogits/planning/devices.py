"""Peak rates of accelerators, as their vendors state them: dense bfloat16, without sparsity.

Nothing here was measured by us. What a run reaches of the peak is the utilisation, an input of the
plan; prices change by the week and are an input too.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparselogits.errors import InvalidArgumentError


@dataclass(frozen=True)
class DeviceKind:
    """An accelerator."""

    name: str
    flops: float
    """Dense bfloat16 floating-point operations a second."""
    source: str
    """Where the figure stands."""


DEVICES = {
    kind.name: kind
    for kind in (
        DeviceKind("a100", 312e12, "NVIDIA A100 data sheet, BF16 tensor core, dense"),
        DeviceKind("h100", 989e12, "NVIDIA H100 SXM data sheet, 1979 TFLOPS sparse, halved"),
        DeviceKind("h200", 989e12, "NVIDIA H200 SXM data sheet, 1979 TFLOPS sparse, halved"),
        DeviceKind("l4", 121e12, "NVIDIA L4 data sheet, 242 TFLOPS sparse, halved"),
        DeviceKind("mi300x", 1307.4e12, "AMD Instinct MI300X data sheet, BF16 matrix, dense"),
    )
}


def device_kind(name: str, flops: float | None = None) -> DeviceKind:
    """The device an option names; with `flops` any name will do.

    Raises:
        InvalidArgumentError: for a device that is not in the table, without its rate.
    """
    if flops is not None:
        return DeviceKind(name, flops, "given")
    if name not in DEVICES:
        raise InvalidArgumentError(
            f"device {name!r} is not in the table ({', '.join(DEVICES)}); "
            "give its dense bfloat16 operations a second, as in --device-flops 500T"
        )
    return DEVICES[name]
