"""Train a student on many ranks from one cache, in a plain loop with FSDP2's `fully_shard`.

    torchrun --nproc-per-node 8 examples/fsdp2.py --cache C --student S --out O --global-batch 64

C is a cache, S the folder of the student model, O the output folder. The same command, on any
number of ranks that divides the global batch, resumes from the newest checkpoint in O. A step on 2
ranks equals one on 8, apart from rounding:

- step n takes the same windows of one global order; rank r of R reads only every R-th of them;
- the loss is a mean over the positions of the global batch, not a mean of the ranks' means;
- weights and optimizer are stored by torch.distributed.checkpoint, which reshards them on loading.

A checkpoint gets its final name when it is complete, so a job may be killed at any moment. The
windows after the last full global batch of an epoch are skipped; they differ between epochs.
Dropout draws different numbers after a restart. Load only your own checkpoints, because torch's
checkpoints contain a pickle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from sparselogits.data import CacheDataset, WindowOrder, WindowSampler, collate
from sparselogits.objectives import IGNORE_INDEX
from sparselogits.train import leave_process_group
from sparselogits.train.objective import Objective, bind


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", required=True, help="folder or URL of a finished cache")
    parser.add_argument("--student", required=True, help="folder of a transformers model to train")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--global-batch", type=int, default=64, help="windows per step")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the cache")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of AdamW")
    parser.add_argument(
        "--alpha", type=float, default=0.0, help="weight of the cross-entropy on labels in the loss"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the window order")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="reader processes per rank")
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16; the weights stay in float32"
    )
    return parser.parse_args()


def begin() -> torch.device:
    """Initialise the process group of torchrun, and return the device of this rank."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return device


def sharded_student(
    folder: str, dataset: CacheDataset, *, alpha: float, bf16: bool, device: torch.device
) -> nn.Module:
    """Return the student with the loss in its forward, each layer sharded over all ranks.

    The loss is bound before sharding, because it must be inside the forward that FSDP wraps.
    """
    student: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    bind(student, Objective("sparse", alpha=alpha, temperature=dataset.identity.temperature))
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    computed = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=torch.float32)
    for layer in student.get_decoder().layers:  # type: ignore[operator]
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    return student


def batches(
    dataset: CacheDataset, sampler: WindowSampler, *, global_batch: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Yield this rank's part of each remaining global batch of the current epoch."""
    mine = global_batch // dist.get_world_size()
    loader = DataLoader(
        dataset, mine, sampler=sampler, num_workers=workers, collate_fn=collate, drop_last=True
    )
    yield from loader


def train_step(
    student: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> float:
    """Run one step on all ranks; return the loss in nats per position of the global batch."""
    positions = (batch["shift_labels"] != IGNORE_INDEX).sum()
    dist.all_reduce(positions)
    # FSDP averages gradients over ranks, so each rank divides by the mean positions per rank
    loss = student(**batch, num_items_in_batch=positions / dist.get_world_size()).loss
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean: Tensor = loss.detach().float() / dist.get_world_size()
    dist.all_reduce(mean)
    return float(mean)


def save(
    out: Path,
    step: int,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    order: dict[str, int | str],
) -> None:
    """Write a checkpoint; rank 0 renames it when the parts of all ranks are written."""
    weights, moments = get_state_dict(student, optimizer)
    unfinished = out / f"unfinished-{step:08d}"
    save_sharded({"student": weights, "optimizer": moments}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        (unfinished / "order.json").write_text(json.dumps({"step": step, **order}))
        unfinished.rename(out / f"step-{step:08d}")


def resume(
    out: Path, student: nn.Module, optimizer: torch.optim.Optimizer, sampler: WindowSampler
) -> int:
    """Load the newest checkpoint, if any, on any number of ranks; return its step."""
    if dist.get_rank() == 0:
        for unfinished in out.glob("unfinished-*"):
            shutil.rmtree(unfinished)
    dist.barrier()
    folder = max(out.glob("step-*"), default=None)
    if folder is None:
        return 0
    weights, moments = get_state_dict(student, optimizer)
    load_sharded({"student": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(student, optimizer, model_state_dict=weights, optim_state_dict=moments)
    order = json.loads((folder / "order.json").read_text())
    sampler.load_state_dict(order)
    return int(order["step"])


def save_student(student: nn.Module, folder: Path) -> None:
    """Gather the weights on rank 0 and write a transformers model."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(student, options=whole)
    if dist.get_rank() == 0:
        student.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]


def main() -> None:
    args = arguments()
    device = begin()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.global_batch % ranks:
        raise SystemExit(
            f"--global-batch is {args.global_batch}; expected a multiple of the {ranks} ranks"
        )
    dataset = CacheDataset(args.cache)
    order = WindowOrder(len(dataset), args.seed, dataset.identity.fingerprint)
    sampler = WindowSampler(order, rank=rank, world_size=ranks)
    student = sharded_student(
        args.student, dataset, alpha=args.alpha, bf16=args.bf16, device=device
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr)
    step = resume(args.out, student, optimizer, sampler)
    for epoch in range(sampler.epoch, args.epochs):
        sampler.set_epoch(epoch)
        begun = step
        for batch in batches(
            dataset, sampler, global_batch=args.global_batch, workers=args.workers
        ):
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = train_step(student, optimizer, on_device)
            step += 1
            if rank == 0:
                print(json.dumps({"step": step, "epoch": epoch, "loss": loss}), flush=True)
            if step % args.save_every == 0:
                taken = (step - begun) * args.global_batch
                save(args.out, step, student, optimizer, sampler.state_dict(taken))
    save_student(student, args.out / "model")
    leave_process_group()


if __name__ == "__main__":
    main()
