"""Validate the arguments of `SparseKDTrainer`.

Arguments of transformers' Trainer and TrainingArguments that `SparseKDTrainer` does not support are
rejected by name when the trainer is created.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, get_args

from transformers import TrainingArguments

from sparselogits.data import Schedule
from sparselogits.errors import InvalidArgumentError
from sparselogits.losses import MissingMass
from sparselogits.methods import TrainingMethod, find_method, require_fits


def _split_or_dispatched(value: Any) -> bool:
    settings = value if isinstance(value, Mapping) else vars(value) if value is not None else {}
    return bool(settings.get("split_batches") or settings.get("dispatch_batches"))


REJECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "train_sampling_strategy": (
        lambda value: value != "random",
        "the order of the windows is computed from the seed, so that a run resumes exactly and "
        "reads every window once per epoch; all windows have the same length. Use 'random'",
    ),
    "use_liger_kernel": (
        bool,
        "Liger would replace the student's forward, and with it the loss. Patch the student "
        "without a loss before creating the trainer: apply_liger_kernel_to_llama(model=student, "
        "fused_linear_cross_entropy=False, cross_entropy=False), or the function for its "
        "architecture",
    ),
    "label_names": (
        lambda value: value is not None,
        "the labels are those of the cache's windows. Leave label_names out",
    ),
    "deepspeed": (
        lambda value: value is not None,
        "the loss reads the head's weight inside the student's forward, where DeepSpeed's stage 3 "
        "has partitioned it, and no stage is tested. Use torchrun (DDP), or FSDP2 as in "
        "examples/fsdp2.py",
    ),
    "accelerator_config": (
        _split_or_dispatched,
        "split_batches and dispatch_batches assign windows to ranks in another order than the one "
        "that checkpoints and thinning are computed from. Leave both out",
    ),
}
"""Test for unsupported values, and the reason with advice, by field of TrainingArguments."""

REJECTED_BY_TRAINER: dict[str, str] = {
    "compute_loss_func": "`method` and `alpha` define the loss. For another loss, call "
    "sparselogits.linear_sparse_cross_entropy in your own Trainer",
}
"""Reason with advice, by unsupported argument of the Trainer's constructor."""


def require_known(args: TrainingArguments, others: Mapping[str, Any]) -> None:
    """Reject arguments that `SparseKDTrainer` does not support.

    Args:
        args: transformers' TrainingArguments.
        others: arguments of the Trainer's constructor, by name.

    Raises:
        InvalidArgumentError: If an argument is not supported; the message says what to do instead.
    """
    for name, (rejected, why) in REJECTED.items():
        value = getattr(args, name, None)
        if rejected(value):
            raise InvalidArgumentError(f"{name}={_cut(value)} cannot be used here: {why}")
    for name, why in REJECTED_BY_TRAINER.items():
        if others.get(name) is not None:
            raise InvalidArgumentError(f"{name} cannot be used here: {why}")


def require_objective(
    method: Any,
    alpha: Any,
    beta: Any,
    missing_mass: Any,
    rounds: Any,
    fresh_noise: Any,
    cosine: Any = 0.0,
    *,
    teacher: bool,
) -> TrainingMethod:
    """Validate the arguments of `SparseKDTrainer` that define the objective.

    `teacher` is True if a teacher is given. The other arguments are those of `SparseKDTrainer`.

    Returns:
        The training method named by `method`.

    Raises:
        InvalidArgumentError: If a value has the wrong type or range, or does not fit the method.
    """
    chosen = find_method(method)
    if not _is_number(alpha) or not 0 <= alpha <= 1:
        raise InvalidArgumentError(
            f"alpha is {alpha!r}; give the labels' share of the loss, a number in [0, 1]"
        )
    if beta is not None and not _is_number(beta):
        raise InvalidArgumentError(f"beta must be a number in (0, 1) or None, found {beta!r}")
    if missing_mass not in get_args(MissingMass):
        raise InvalidArgumentError(
            f"missing_mass must be one of {', '.join(map(repr, get_args(MissingMass)))}, "
            f"found {missing_mass!r}"
        )
    is_integer = isinstance(rounds, Integral) and not isinstance(rounds, bool)
    if rounds is not None and not isinstance(rounds, Schedule) and not is_integer:
        raise InvalidArgumentError(
            f"rounds must be an integer, a Schedule, or None for all rounds, found {rounds!r}"
        )
    if not isinstance(fresh_noise, bool):
        raise InvalidArgumentError(f"fresh_noise must be True or False, found {fresh_noise!r}")
    if not _is_number(cosine) or cosine < 0:
        raise InvalidArgumentError(
            f"cosine must be a number of at least 0 (the weight of the cosine loss), found "
            f"{cosine!r}"
        )
    require_fits(chosen, teacher=teacher, beta=beta, cosine=cosine)
    return chosen


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _cut(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else said[:57] + "..."
