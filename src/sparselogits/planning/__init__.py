"""What a cache will cost before it is made: bytes, hours, money, and when it beats no cache."""

from sparselogits.planning.cost import Plan, Settings, Storage, plan
from sparselogits.planning.devices import DEVICES, DeviceKind, device_kind
from sparselogits.planning.sizes import parameters_of, quantity

__all__ = [
    "DEVICES",
    "DeviceKind",
    "Plan",
    "Settings",
    "Storage",
    "device_kind",
    "parameters_of",
    "plan",
    "quantity",
]
