"""Shut down the ranks of a distributed job cleanly."""

from __future__ import annotations

import time

import torch.distributed as dist

RELEASE_SECONDS = 0.5  # enough for a gloo thread to be scheduled and to take the interpreter's lock


def leave_process_group() -> None:
    """Wait for all ranks and destroy the default process group; call this at the end of a script.

    Without a process group nothing happens. A rank that ends without this call may abort with
    "terminate called without an active exception", at random and more often on a busy machine, and
    its job counts as failed: a gloo thread that waits for the interpreter's lock, to release the
    tensors of the last collective, is aborted when the interpreter shuts down (pytorch issue
    190489). `destroy_process_group` joins these threads only if nothing else holds the group, and
    DDP's reducer holds it; so the lock is left free for `RELEASE_SECONDS` afterwards.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(RELEASE_SECONDS)
