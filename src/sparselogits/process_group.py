"""Shut down the ranks of a distributed job cleanly."""

from __future__ import annotations

import time

import torch.distributed as dist

RELEASE_SECONDS = 0.5
"""Seconds for gloo threads to acquire the interpreter's lock after the group is destroyed."""


def leave_process_group() -> None:
    """Wait for all ranks and destroy the default process group, if there is one.

    Call this at the end of a script. A rank that ends without this call may abort at random with
    "terminate called without an active exception", so that its job counts as failed: a gloo thread
    that waits for the interpreter's lock, to release the tensors of the last collective, is aborted
    when the interpreter shuts down (pytorch issue 190489). `destroy_process_group` joins these
    threads only if nothing else references the group, but DDP's reducer does. Therefore this
    function sleeps for `RELEASE_SECONDS` afterwards, without the interpreter's lock.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(RELEASE_SECONDS)
