"""Estimate the cost of a cache before it is built: bytes, hours, price and break-even point."""

from sparselogits.lab.planning.cost import Plan, Settings, StorageCost, plan
from sparselogits.lab.planning.devices import DEVICES, DeviceKind, device_kind
from sparselogits.lab.planning.memory import (
    Memory,
    MemoryOf,
    Shape,
    fewest_devices,
    largest_batch,
    pass_memory,
    shape_of,
    training_memory,
)
from sparselogits.lab.planning.sizes import ModelSize, quantity, size_of

__all__ = [
    "DEVICES",
    "DeviceKind",
    "Memory",
    "MemoryOf",
    "ModelSize",
    "Plan",
    "Settings",
    "Shape",
    "StorageCost",
    "device_kind",
    "fewest_devices",
    "largest_batch",
    "pass_memory",
    "plan",
    "quantity",
    "shape_of",
    "size_of",
    "training_memory",
]
