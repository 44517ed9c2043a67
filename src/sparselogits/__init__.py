"""Distil language models offline, from a cache of a teacher's sparse targets.

    from sparselogits import CacheDataset, SparseKDTrainer

The names in `__all__` are public. Each name is imported at its first use, so that importing the
package is fast.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparselogits.caching import retokenize
    from sparselogits.data import CacheDataset, collate, decode
    from sparselogits.losses import (
        SparseKDLoss,
        linear_sparse_cross_entropy,
        sparse_cross_entropy,
    )
    from sparselogits.targets import SparseTargets
    from sparselogits.train import SparseKDTrainer

__version__ = "0.1.0"

_HOMES = {
    "CacheDataset": "sparselogits.data",
    "SparseKDLoss": "sparselogits.losses",
    "SparseKDTrainer": "sparselogits.train",
    "SparseTargets": "sparselogits.targets",
    "collate": "sparselogits.data",
    "decode": "sparselogits.data",
    "linear_sparse_cross_entropy": "sparselogits.losses",
    "retokenize": "sparselogits.caching",
    "sparse_cross_entropy": "sparselogits.losses",
}

__all__ = [
    "CacheDataset",
    "SparseKDLoss",
    "SparseKDTrainer",
    "SparseTargets",
    "collate",
    "decode",
    "linear_sparse_cross_entropy",
    "retokenize",
    "sparse_cross_entropy",
]


def _is_useful(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(
        ("Failed to load ", "%s is an Enum subclass and is now natively supported by torch.compile")
    )


# transformers imports torchao, if installed, with any model. torchao then logs which kernels do not
# match this device and Python version, and calls a deprecated function of torch. Users can do
# nothing about either message; all other messages of the two loggers pass.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).addFilter(_is_useful)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
