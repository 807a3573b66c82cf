# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Writes docs/scaling.md, how far the head scales, from formulas for memory and communication.

Run it after a change of either: ``python -m tools.docs.scaling``. tests/test_scaling.py measures
small runs against the formulas.
"""

from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).parents[2] / "docs" / "scaling.md"
IDENTITIES, GPUS = (10**6, 10**7, 10**8), (8, 64, 512)

# the buffers of the Triton backend for a chunk of classes have at most so many bytes
CHUNK_BYTES = 512 << 20
# forward keeps a rounded w of at most so many bytes, with rows of a multiple of so many numbers
ROUNDED_BYTES, ROW_PADDING = 256 << 20, 64


class Setup(NamedTuple):
    """Describes one training step."""

    classes: int  # of all GPUs together
    gpus: int  # over which the classes are split
    rows: int = 128  # of each GPU
    features: int = 512
    itemsize: int = 2  # of x and of the compute type: bf16
    optimizer_numbers: int = 1  # per weight: SGD's momentum; AdamW has 2
    weight_bytes: int = 4  # of a weight, its gradient and each of these numbers
    fused: bool = False  # whether the update is part of backward: then there is no gradient
    class_bytes: int = 0  # of optimizer state per class

    @property
    def held(self) -> int:
        """Returns the number of classes on the GPU that has most."""
        return -(-self.classes // self.gpus)

    @property
    def batch(self) -> int:
        """Returns the number of rows of all GPUs."""
        return self.rows * self.gpus


# what the lasting memory of a class may be
STORED: dict[str, dict[str, Any]] = {
    "fp32, SGD after backward": dict(),
    "fp32, fused SGD": dict(fused=True),
    "fp32, fused AdamW": dict(fused=True, optimizer_numbers=2),
    "bf16, fused SGD": dict(fused=True, weight_bytes=2),
    "bf16, fused AdamW": dict(fused=True, weight_bytes=2, optimizer_numbers=2),
    "bf16, fused row-wise Adagrad": dict(
        fused=True, weight_bytes=2, optimizer_numbers=0, class_bytes=4
    ),
}


class Traffic(NamedTuple):
    """Describes a step with SGD and momentum, of which the passes over C x D are counted."""

    name: str
    compute_bytes: int
    weight_bytes: int  # of a weight, its gradient and its momentum
    fused: bool

    def passes(self) -> int:
        """Counts bytes per weight that are read and written beside the matrix products."""
        compute, weight = self.compute_bytes, self.weight_bytes
        rounded = 0 if compute == weight else 2 * (weight + compute)  # in both sweeps
        if self.fused:  # weight and momentum, there and back
            return rounded + 4 * weight
        norms = 0 if rounded else compute  # of rounded rows, on the way
        projection, update = compute + weight, 5 * weight
        return rounded + norms + projection + update

    def products(self) -> int:
        """Counts bytes per weight that the logits of both sweeps and dx read."""
        return 3 * self.compute_bytes


TRAFFIC = [
    Traffic("fp32 weights, SGD after backward", 2, 4, False),
    Traffic("fp32 weights, fused", 2, 4, True),
    Traffic("fp32 weights and arithmetic, fused", 4, 4, True),
    Traffic("bf16 weights, SGD after backward", 2, 2, False),
    Traffic("bf16 weights, fused", 2, 2, True),
]


def lasting(s: Setup) -> int:
    """Counts the bytes of weights, gradient and optimizer state on a GPU."""
    numbers = 1 + s.optimizer_numbers + (0 if s.fused else 1)
    return s.held * (s.weight_bytes * numbers * s.features + s.class_bytes)


def working(s: Setup) -> int:
    """Counts the bytes that a step takes on a GPU besides, at the higher peak of its two sweeps.

    The exponentials that forward may keep are not counted: at most 256 MiB, unless asked for more.
    """
    rounded = 0 if s.itemsize == s.weight_bytes else s.features * s.itemsize  # of a class
    kept = s.held * rounded
    if kept > ROUNDED_BYTES or s.features % ROW_PADDING:
        kept = 0  # w is rounded chunk by chunk
    passing = 0 if kept else rounded

    def chunk(class_bytes: int) -> int:
        """Returns the classes of a chunk; all chunks are about the same size."""
        most = max(1, CHUNK_BYTES // max(1, class_bytes + passing))
        return -(-s.held // -(-s.held // most))

    both = s.batch * s.features * s.itemsize + 4 * s.held + 64 * s.batch + kept
    forward = 16 * s.batch * s.gpus + chunk(0) * passing
    # G, and dw where it is not fp32 itself or is not written at all
    in_place = s.weight_bytes == 4 and not s.fused and s.features % ROW_PADDING == 0
    class_bytes = s.batch * s.itemsize + (0 if in_place else 4 * s.features)
    classes = chunk(class_bytes)
    backward = (
        s.batch * s.features * (4 + 4 + s.itemsize)  # dx twice, and the targets' part of dw
        + 4 * s.held
        + classes * (class_bytes + passing)
        + (s.batch * s.features * s.weight_bytes if s.fused and not kept else 0)  # w as it was
    )
    return both + max(forward, backward)


def volume(s: Setup) -> dict[str, int]:
    """Counts the bytes that the collectives of a step return; for dx, the bytes that they take."""
    return {
        "features": s.batch * s.features * s.itemsize,
        "labels": 8 * s.batch,
        "merge": 12 * s.batch * s.gpus,
        "dx": s.batch * s.features * s.itemsize,
    }


def operations(s: Setup) -> int:
    """Counts the floating-point operations of a step on a GPU; a quarter recompute logits."""
    return 8 * s.batch * s.held * s.features


INTRODUCTION = """\
# How far it scales

Generated by `python -m tools.docs.scaling` from formulas. `tests/test_scaling.py` counts the bytes
that small runs on several processes allocate and hand to collectives, and compares.

Classes are split over W GPUs, each of which brings n rows: N = n W rows meet C / W classes on every
GPU. Below, n = 128, D = 512, x and the arithmetic are bf16, weights, their gradient and SGD's
momentum are fp32. Nothing here has been timed on several GPUs; [one](gpu.md) has been.

**Memory of each GPU.** With an optimizer of `torch.optim` weights, gradient and momentum last: 12 C
D / W bytes (AdamW: 16). A step takes 8 bytes more for each class. The rest does not depend on the
number of classes: buffers of at most 512 MiB together, for every row of the batch its features, its
gradient and a few numbers, and 16 N W bytes in the forward merge. Where fp32 weights are rounded,
and that takes at most 256 MiB, forward keeps them for backward. The last column is one fp32 matrix
of logits; the usual head holds several.

"""

AFTER_MEMORY = """
So 10^7 identities fit beside a backbone on 8 GPUs of any kind, and 10^8 on 64; on 8 GPUs of 80 GB
10^8 leave it little room.

An optimizer of `marginkernels.optim` updates the weights inside backward, and there is no gradient.
With weights and state in bf16 half of the rest remains. What lasts on each GPU, in GiB:

"""

AFTER_STORED = """
"fp32" and "bf16" are the weights and their momentum; row-wise Adagrad has one fp32 number for each
class. The working memory above does not change.

**Communication of each GPU in a step**: two gathers and a merge forward, a reduce-scatter backward.
They have N D e bytes of features, 8 N of labels, 12 N W of merged rows, and N D e of dx, with e = 2
for bf16. In a ring a GPU sends and receives (W - 1) / W of that. None of it depends on C. The merge
grows with the square of W, because every GPU receives three numbers for every row from every other.
With `device_mesh["classes"]` of a larger mesh the classes are split over some GPUs only, and W is
their number; then the gradients of the replicas of a class have to be averaged, 4 C D / W bytes.
The backbone's own all-reduce is not counted.

"""

AFTER_VOLUME = """
Options add to this. A gather of five integers per rank tells the numbers of rows, unless
`even_batches=True` or `max_local_batch=n` promises them. Sample weights, row margins, random
margins, and losses that look at the target's cosine first take 4 N to 8 N bytes each; a bias, label
smoothing or statistics take 4 N W. `sampling=PartialFC(rate)` divides the arithmetic, but neither
memory nor communication.

**Traffic of a step on one GPU**, 1,000,000 classes x 512, SGD with momentum, bf16 arithmetic unless
it says fp32. `python -m tools.traffic` runs the launchers of the Triton backend without executing a
kernel, and adds up what each kernel, GEMM and operation of PyTorch reads and writes of the classes'
rows; a test compares it with the formulas behind this table. Matrix products read w three times.
The gradient before its projection, 4 bytes per weight that are written once and read once, is in
neither column.

"""

AFTER_TRAFFIC = """
With fp32 weights and bf16 arithmetic w is rounded in both sweeps, which is 6.1 of the 14.3 GB. A
rounded copy that lasts, 2 bytes per weight, would make it 9.2.

**One machine without a GPU**: `python examples/million_identities.py` trains 10^6 identities, whose
weights and momentum take 3.8 GiB, in a process of 4.5 GiB, and with `--dtype bfloat16` 1.9 in 2.5.
The rest is mostly PyTorch's code; what the C++ backend takes besides is 4 C bytes and a few MiB per
thread.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float, unit: float) -> str:
    """Writes a value in a unit, with three digits."""
    value /= unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def document() -> str:
    """Writes the page."""
    memory, communication = [], []
    for s in (Setup(classes, gpus) for classes in IDENTITIES for gpus in GPUS):
        total, logits = lasting(s) + working(s), 4 * s.batch * s.held
        shape = [f"{s.classes:,}", f"{s.gpus}"]
        memory.append(
            [*shape, f"{s.batch:,}", f"{s.held:,}"]
            + [number(b, 2**30) for b in (lasting(s), working(s), total, logits)]
        )
        if s.classes == IDENTITIES[0]:
            parts = volume(s)
            communication.append(
                [shape[1], f"{s.batch:,}"]
                + [number(b, 2**20) for b in (*parts.values(), sum(parts.values()))]
                + [number(operations(Setup(c, s.gpus)), 1e12) for c in IDENTITIES]
            )
    per_gpu = ["identities", "GPUs", "N", "classes each"]
    return (
        INTRODUCTION
        + table([*per_gpu, "lasting, GiB", "working, GiB", "together, GiB", "logits, GiB"], memory)
        + AFTER_MEMORY
        + stored_table()
        + AFTER_STORED
        + table(
            ["GPUs", "N", "features, MiB", "labels, MiB", "merge, MiB", "dx, MiB", "together, MiB"]
            + [f"TFLOP at {c:,}" for c in IDENTITIES],
            communication,
        )
        + AFTER_VOLUME
        + traffic_table()
        + AFTER_TRAFFIC
    )


def stored_table() -> str:
    """Writes what lasts with each optimizer."""
    setups = [(classes, gpus) for classes in IDENTITIES[1:] for gpus in GPUS[:2]]
    rows = []
    for name, settings in STORED.items():
        sizes = [lasting(Setup(classes, gpus, **settings)) for classes, gpus in setups]
        rows.append([name, *(number(size, 2**30) for size in sizes)])
    header = [f"{classes:,} on {gpus} GPUs" for classes, gpus in setups]
    return table(["weights, optimizer", *header], rows)


def traffic_table() -> str:
    """Writes the traffic of a step at a million classes."""
    weights = IDENTITIES[0] * 512
    rows = [
        [t.name, str(t.passes()), *(number(b * weights, 1e9) for b in (t.passes(), t.products()))]
        for t in TRAFFIC
    ]
    return table(["step", "passes, bytes per weight", "passes, GB", "products, GB"], rows)


if __name__ == "__main__":
    PATH.write_text(document())
