"""Leaving the ranks of a job."""

from __future__ import annotations

import time

import torch.distributed as dist

RELEASE_SECONDS = 0.5  # a gloo thread needs microseconds of the interpreter's lock, once scheduled


def leave_process_group() -> None:
    """Wait for all ranks, then leave the default process group, if there is one: a script's end.

    A rank that simply ends may die with "terminate called without an active exception", by chance
    and more often on a busy machine, and its job counts as failed: a gloo thread that waits for
    the interpreter's lock, to release the last collective's tensors, is aborted when the
    interpreter goes away (pytorch issue 190489). Destroying the group joins its threads only if
    nothing else holds it, and DDP's reducer does; so the lock is left free for them for a moment.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(RELEASE_SECONDS)
