"""Resolve the name of a device, before expensive work starts."""

from __future__ import annotations

from sparselogits.errors import InvalidArgumentError, reason_of


def resolve_device(name: str) -> str:
    """Return the device for a name; "auto" selects CUDA if it is available, otherwise the CPU.

    Raises InvalidArgumentError if the device is not available.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = reason_of(error).splitlines()[0]
        raise InvalidArgumentError(
            f"the device {name} is not available here ({first}); choose auto or cpu (--device), or "
            "install a build of torch that supports the device"
        ) from error
    return name


def resolve_training_device(name: str) -> str:
    """Return the device on which a student is trained; see `resolve_device`.

    transformers' Trainer uses all visible GPUs, or one per rank of torchrun, and has no argument
    for the number of a GPU.

    Raises:
        InvalidArgumentError: the device is not available, or has a number although it is not the
            only visible GPU.
    """
    import torch

    kind, _, number = name.partition(":")
    if number and kind != "cpu" and (number != "0" or torch.cuda.device_count() > 1):
        raise InvalidArgumentError(
            f"the device is {name}, but training uses all visible GPUs, or one per rank of "
            "torchrun; give cuda (--device), and make one GPU visible by "
            f"CUDA_VISIBLE_DEVICES={number}"
        )
    return resolve_device(name)
