"""Leaving the ranks of a job."""

from __future__ import annotations

import torch.distributed as dist


def leave_process_group() -> None:
    """Wait for all ranks, then leave the default process group, if there is one: a script's end.

    A rank that simply ends may die with "terminate called without an active exception", by chance
    and more often on a busy machine, and its job counts as failed: gloo's threads release the last
    collective's tensors while the interpreter goes away (pytorch issue 190489). A barrier, whose
    own work holds no tensor, sees those released.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
