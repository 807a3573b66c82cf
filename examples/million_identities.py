# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains a classifier of a million identities, and lets plain PyTorch try the same.

Identities are synthetic: random centres, seen through noise. A small network embeds the views, and
the head has one row of 512 numbers for each identity. Both heads take the same steps, one after the
other. The plain head may use half as much memory again as the fused head did.

The fused head's optimizer updates the weights inside backward, so that their gradient is never
held; with --optimizer none it is torch.optim.SGD. With --dtype bfloat16 weights, momentum and
arithmetic are in bfloat16. The plain head has fp32 weights, and an optimizer of torch.optim.

    python examples/million_identities.py                                     # a million, 20 steps
    python examples/million_identities.py --dtype bfloat16                    # 4 bytes a weight
    python examples/million_identities.py --classes 10000000 --dtype bfloat16 \\
        --optimizer rowwise_adagrad --batch 64 --repeat 2 --plain-steps 0     # ten million
    python examples/million_identities.py --classes 10000 --steps 300 --repeat 0
    torchrun --nproc-per-node 2 examples/million_identities.py                # half of them each
    python examples/million_identities.py --plot                              # docs/million.png
"""

import argparse
import functools
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import measure
from heads import HEADS
from marginkernels import ArcFace, MarginSoftmaxHead, backend_report, optim
from marginkernels.distributed.shard import local

VIEW_SIZE, EMBEDDING_SIZE = 128, 512
NOISE = 0.5  # standard deviation of a view around its centre; the centres' own is 1
MARGIN, SCALE = 0.5, 64.0
BACKBONE_RATE = 0.003
HEADROOM = 1.5  # of address space, for the plain head
INIT_BLOCK = 4096  # classes whose weights are drawn from one generator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# foreach=True makes a temporary of the size of the weights
OUTSIDE = dict(foreach=False)


class Rule(NamedTuple):
    """Describes an optimizer of the head: inside backward, and the nearest one of torch.optim."""

    rate: float
    fused: Callable[..., optim.HeadOptimizer] | None
    plain: Callable[..., torch.optim.Optimizer]
    numbers: int  # of state, per weight
    settings: dict[str, float]


RULES = {
    "sgd": Rule(0.05, optim.SGD, torch.optim.SGD, 1, dict(momentum=0.9)),
    "adamw": Rule(0.001, optim.AdamW, torch.optim.AdamW, 2, {}),
    "rowwise_adagrad": Rule(0.002, optim.RowwiseAdagrad, torch.optim.Adagrad, 0, {}),
    "none": Rule(0.05, None, torch.optim.SGD, 1, dict(momentum=0.9)),
}

PLOT = Path(__file__).parents[1] / "docs" / "million.png"
PLOT_CLASSES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
PLOT_HEADS = (  # label, head, optimizer, type
    ("fused SGD, bf16", "fused", "sgd", "bfloat16"),
    ("fused SGD, fp32", "fused", "sgd", "float32"),
    ("SGD after backward", "fused", "none", "float32"),
    ("plain PyTorch", "torch", "sgd", "float32"),
)
PLOT_LIMIT = 9.0  # GiB of address space, for either head

DEVICE, PEAK, LIMITED = torch.device("cpu"), "peak RSS", "address space (RLIMIT_AS)"
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.getenv("LOCAL_RANK", "0")))
    torch.cuda.set_device(DEVICE)
    PEAK = LIMITED = "GPU memory"

say = functools.partial(print, flush=True)


class Run(NamedTuple):
    """Holds the losses, the time and the memory of the steps of one head."""

    losses: list[float]
    seconds: float  # of a step: the median, without the first
    processor_seconds: float  # of a step, summed over all threads
    peaks: list[int]  # bytes resident, or allocated on the GPU, of each rank
    reserved: int  # most bytes of address space, or reserved on the GPU, of all ranks together


class Identities:
    """Draws views of identities. Their centres are computed when needed, and take no memory.

    The centre of identity j consists of random Fourier features cos(2 pi (a_k j + b_k)) of the
    number j. They are as good as independent from one identity to the next.
    """

    def __init__(self, num_classes: int, seed: int):
        self.num_classes, self.seed = num_classes, seed
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = torch.rand(2, VIEW_SIZE, generator=generator, dtype=torch.float64)

    def centres(self, labels: Tensor) -> Tensor:
        """Returns the centres (N, 128), each number of variance 1."""
        turns = labels[:, None] * self.a + self.b
        return (math.sqrt(2) * torch.cos(2 * math.pi * turns)).float()

    def batch(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """Returns views (size, 128) and labels (size,), the same for the same index."""
        generator = torch.Generator().manual_seed(self.seed + 1 + index)
        labels = torch.randint(self.num_classes, (size,), generator=generator)
        noise = torch.randn(size, VIEW_SIZE, generator=generator)
        return self.centres(labels) + NOISE * noise, labels


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=256, help="rows, of all ranks together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=4,
                        help="so many batches in turn; 0: a new one in each step")  # fmt: skip
    parser.add_argument("--optimizer", choices=RULES, default="sgd")
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="of weights, of their momentum and of the arithmetic")  # fmt: skip
    parser.add_argument("--backend", choices=("auto", *backend_report()), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-steps", type=int, default=3,
                        help="of the plain head, 0: leave it out")  # fmt: skip
    parser.add_argument("--plot", action="store_true", help="draw docs/million.png instead")
    parser.add_argument("--child", choices=HEADS, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_head(kind: str, args: argparse.Namespace) -> MarginSoftmaxHead:
    """Builds a head, whose classes the ranks of a group split."""
    settings = dict(margin=ArcFace(MARGIN), scale=SCALE, backend=args.backend, device=DEVICE)
    if kind == "fused":
        settings |= dict(dtype=DTYPES[args.dtype], compute_dtype=DTYPES[args.dtype])
    if dist.is_initialized():
        settings["sharding"] = dist.group.WORLD
    head = HEADS[kind](EMBEDDING_SIZE, args.classes, **settings)
    initialise(local(head.weight.detach()), head.shard.start if head.shard else 0, args.seed)
    return head


def initialise(weight: Tensor, start: int, seed: int) -> None:
    """Fills the rows of the classes from ``start`` on: N(0, 0.01^2), the same on any split."""
    stop = start + len(weight)
    for first in range(start // INIT_BLOCK * INIT_BLOCK, stop, INIT_BLOCK):
        generator = torch.Generator().manual_seed((seed << 32) + first)
        rows = torch.empty(INIT_BLOCK, weight.shape[1]).normal_(std=0.01, generator=generator)
        low, high = max(start, first), min(stop, first + INIT_BLOCK)
        weight[low - start : high - start] = rows[low - first : high - first]


def make_optimizers(
    kind: str, args: argparse.Namespace, backbone: nn.Module, head: MarginSoftmaxHead
) -> list[torch.optim.Optimizer]:
    """Makes the optimizer of the backbone and that of the head."""
    rule = RULES[args.optimizer]
    settings = dict(lr=rule.rate, **rule.settings)
    of_head: torch.optim.Optimizer
    if kind == "torch" or rule.fused is None:
        of_head = rule.plain(head.parameters(), **settings, **OUTSIDE)
    else:
        of_head = rule.fused(head, **settings)
    of_backbone = torch.optim.SGD(backbone.parameters(), lr=BACKBONE_RATE, momentum=0.9)
    return [of_backbone, of_head]


def lasting(kind: str, optimizer: str, dtype: str) -> float:
    """Counts the bytes of an identity that a head and its optimizer cannot do without."""
    rule = RULES[optimizer]
    per_class = 4.0 if optimizer == "rowwise_adagrad" else 0.0
    gradient = 1 if kind == "torch" or rule.fused is None else 0
    return EMBEDDING_SIZE * DTYPES[dtype].itemsize * (1 + gradient + rule.numbers) + per_class


def train(kind: str, args: argparse.Namespace, steps: int, say: Callable[[str], None]) -> Run:
    """Takes the steps with a head, and measures them.

    Under torchrun each rank has its part of the head and of each batch.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(args.seed)
    backbone: nn.Module = nn.Sequential(
        nn.Linear(VIEW_SIZE, 1024), nn.ReLU(), nn.Linear(1024, EMBEDDING_SIZE, bias=False)
    ).to(DEVICE)
    if world > 1:
        backbone = nn.parallel.DistributedDataParallel(backbone)
    head = make_head(kind, args)
    optimizers = make_optimizers(kind, args, backbone, head)
    identities = Identities(args.classes, args.seed)
    losses, seconds, processor = [], [], []
    for step in range(steps):
        batch = identities.batch(step % (args.repeat or steps), args.batch)
        views, labels = (t.tensor_split(world)[rank].to(DEVICE) for t in batch)
        started, busy = time.perf_counter(), time.process_time()
        loss = head(backbone(views), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - busy)
        if rank == 0:
            say(f"step {step + 1:4}   loss {losses[-1]:9.5f}   {seconds[-1]:7.2f} s")
    own = peak_and_reserved()
    memory = [own] * world
    if world > 1:
        dist.all_gather_object(memory, own)
    peaks, reserved = zip(*memory, strict=True)
    wall, threads = (statistics.median(times[1:] or times) for times in (seconds, processor))
    return Run(losses, wall, threads, [*peaks], sum(reserved))


def peak_and_reserved() -> tuple[int, int]:
    """Returns the peak and the reserved bytes that :class:`Run` describes."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return 1024 * measure.resident_kib("VmHWM"), 1024 * measure.resident_kib("VmPeak")


def in_child(kind: str, args: argparse.Namespace, steps: int, limit: int) -> Run | str:
    """Trains in a fresh process with so many bytes, or returns why that was not enough."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--child", kind, "--limit", str(limit),
               "--steps", str(steps)]  # fmt: skip
    for name in ("classes", "batch", "repeat", "optimizer", "dtype", "backend", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    distributed = ("RANK", "WORLD", "LOCAL", "MASTER", "GROUP", "ROLE", "TORCHELASTIC")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(distributed)}
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait are not counted as busy
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads() * int(os.getenv("WORLD_SIZE", 1)))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return Run(**json.loads(done.stdout))
    said = [line for line in done.stderr.splitlines() if "alloc" in line.lower()]
    if done.returncode == -signal.SIGKILL:
        said.append("killed: the machine was out of memory")
    if not said:
        raise RuntimeError(done.stderr)
    return said[-1]


def child(args: argparse.Namespace) -> None:
    """Trains within the limit, and prints the :class:`Run` as JSON."""
    if DEVICE.type == "cuda":
        memory = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.limit / memory))
    else:
        resource.setrlimit(resource.RLIMIT_AS, (args.limit, args.limit))
    run = train(args.child, args, args.steps, lambda line: None)
    say(json.dumps(run._asdict()))


def gib(nbytes: float) -> str:
    """Writes bytes in GiB."""
    return f"{nbytes / 2**30:.2f} GiB"


def print_summary(args: argparse.Namespace, fused: Run) -> None:
    """Prints the losses, the time and the memory of the fused head."""
    floor = gib(args.classes * lasting("fused", args.optimizer, args.dtype))
    what = "weights, gradient and momentum" if args.optimizer == "none" else "weights and state"
    say(f"""
{args.classes:,} identities x {EMBEDDING_SIZE}, batch {args.batch}, {args.optimizer}, \
{args.dtype}; {what} alone: {floor}
this head      loss {fused.losses[0]:.3f} -> {fused.losses[-1]:.3f} in {len(fused.losses)} steps, \
{fused.seconds:.2f} s a step
               {PEAK} of each rank: {", ".join(map(gib, fused.peaks))}""")


def print_plain(fused: Run, plain: Run | str, limit: int) -> None:
    """Prints what the plain head did with the limit."""
    allowed = f"in {gib(limit)} of {LIMITED}, {HEADROOM:g} times what this head's processes had"
    if isinstance(plain, str):
        say(f"plain PyTorch  does not run {allowed}:\n               {plain}")
        return
    both = min(len(plain.losses), len(fused.losses))
    say(
        f"plain PyTorch  {plain.seconds:.2f} s a step, {PEAK} {gib(plain.peaks[0])}, {allowed}"
        f"\n               loss of step {both}: {plain.losses[both - 1]:.5f}, of this head "
        f"{fused.losses[both - 1]:.5f}"
    )


def plot(args: argparse.Namespace) -> None:
    """Draws docs/million.png: time and memory of a step, each run in a process of its own."""
    import plots

    heads = []
    for label, kind, optimizer, dtype in PLOT_HEADS:
        asked = argparse.Namespace(**(vars(args) | {"optimizer": optimizer, "dtype": dtype}))
        runs = {classes: plotted_run(label, kind, asked, classes) for classes in PLOT_CLASSES}
        done = {classes: run for classes, run in runs.items() if isinstance(run, Run)}
        seconds = {classes: run.processor_seconds for classes, run in done.items()}
        peaks = {classes: run.peaks[0] for classes, run in done.items()}
        stopped = [classes for classes in runs if classes not in done]
        heads.append(plots.Growth(label, seconds, peaks, stopped, lasting(kind, optimizer, dtype)))
    title = f"A training step, batch {args.batch}, all threads together"
    plots.draw_growth(PLOT, heads, PLOT_LIMIT, title)
    say(f"wrote {PLOT}")


def plotted_run(label: str, kind: str, args: argparse.Namespace, classes: int) -> Run | str:
    """Takes a few steps with so many classes, and prints what they took."""
    shape = argparse.Namespace(**(vars(args) | {"classes": classes}))
    run = in_child(kind, shape, min(30, 3 + 300_000 // classes), int(PLOT_LIMIT * 2**30))
    text = run
    if isinstance(run, Run):
        processors = f"{run.processor_seconds:.3f} s of processors"
        text = f"{run.seconds:.3f} s, {processors}, {gib(run.peaks[0])}"
    say(f"{classes:>9,} {label:<18}  {text}")
    return run


def main() -> None:
    args = arguments()
    if args.child:
        child(args)
        return
    if args.plot:
        plot(args)
        return
    rank = int(os.getenv("RANK", 0))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    fused = train("fused", args, args.steps, say)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        print_summary(args, fused)
        if args.plain_steps:
            limit = int(HEADROOM * fused.reserved)
            print_plain(fused, in_child("torch", args, args.plain_steps, limit), limit)


if __name__ == "__main__":
    main()
