# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with the classes split over the ranks: DDP backbone, mixed precision, checkpoint, resume.

    torchrun --nproc-per-node 2 examples/distributed.py --steps 40 --out run
    torchrun --nproc-per-node 3 examples/distributed.py --steps 80 --out run   # goes on from 40

The second command may run on another number of ranks, or be plain ``python``. Each rank uses a
GPU of its own where there are GPUs.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import marginkernels as mk
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint

FEATURES, EMBEDDING_SIZE, BATCH_SIZE, SAVE_EVERY = 64, 32, 240, 20


def start() -> torch.device:
    """Joins the process group that torchrun describes, and returns this rank's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.getenv("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def batch(step: int, identities: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws this rank's share of a step's observations (n, FEATURES) and their labels (n,)."""
    people = torch.randn(identities, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step)  # the batch depends on the step alone
    labels = torch.randint(identities, (BATCH_SIZE,), generator=generator)
    views = people[labels] + 0.8 * torch.randn(BATCH_SIZE, FEATURES, generator=generator)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return views.tensor_split(world)[rank], labels.tensor_split(world)[rank]


def make_model(identities: int, device: torch.device) -> nn.ModuleDict:
    """Builds the backbone, copied to all ranks, and the head, whose classes are split over them."""
    torch.manual_seed(0)
    backbone: nn.Module = nn.Sequential(
        nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, EMBEDDING_SIZE)
    ).to(device)
    group = None
    if dist.is_initialized():
        group = dist.group.WORLD
        backbone = DistributedDataParallel(backbone)  # the backbone alone: the head is split
    head = mk.MarginSoftmaxHead(
        EMBEDDING_SIZE, identities, margin=mk.ArcFace(0.3), scale=32.0, sharding=group,
        device=device,
    )  # fmt: skip
    return nn.ModuleDict({"backbone": backbone, "head": head})


def newest(out: Path) -> tuple[int, Path | None]:
    """Finds the checkpoint with most steps; a directory of this name is always a whole one."""
    found = [(int(path.name), path) for path in out.glob("*") if path.name.isdecimal()]
    return max(found, default=(0, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--identities", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    args = parser.parse_args()

    device = start()
    model = make_model(args.identities, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    narrow = torch.float16 if device.type == "cuda" else torch.bfloat16
    # bf16 needs no scaling; the scale of fp16 is not saved, and is found again in a few steps
    scaler = mk.GradScaler(device.type, enabled=narrow == torch.float16)

    first, path = newest(args.out)
    if path is not None:
        load_checkpoint(path, model, optimizer)
    for step in range(first, args.steps):
        views, labels = (tensor.to(device) for tensor in batch(step, args.identities))
        with torch.autocast(device.type, narrow):
            loss = model["head"](model["backbone"](views), labels)  # of the batch of all ranks
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        mk.clip_grad_norm_(model.parameters(), max_norm=5.0)  # whole and split parameters together
        scaler.step(optimizer)
        scaler.update()
        done = step + 1
        if done % SAVE_EVERY == 0:
            if int(os.getenv("RANK", "0")) == 0:
                print(f"step {done:4}: loss {loss.item():.4f}", flush=True)
            save_checkpoint(args.out / str(done), model, optimizer)
    if dist.is_initialized():
        dist.destroy_process_group()
        if device.type == "cpu":
            # gloo's threads still hold the last tensors, and to free one while Python ends aborts
            time.sleep(0.5)


if __name__ == "__main__":
    main()
