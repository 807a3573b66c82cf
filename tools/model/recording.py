# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Records what a whole training step launches, at full size, without executing it.

The step runs on the meta device, from the user's call on. An op of the Triton backend becomes a
call of its launcher; launches and GEMMs are written down and left out.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from marginkernels import ArcFace, MarginSoftmaxHead, backends, margin_cross_entropy, optim, step
from marginkernels.backends.triton import configs, vendor_gemm
from marginkernels.backends.triton.backward import head_bwd
from marginkernels.backends.triton.forward import head_fwd
from marginkernels.backends.triton.loss import head_held, head_loss
from marginkernels.backends.triton.step import head_step

from .. import traffic
from .code import TILE_KERNELS, Tile, recorded_tile
from .gpus import Gpu

TILE, GEMM, PASS = "tile", "gemm", "pass"
# what an op of this library executes on a GPU, where the meta device has shapes only
BODIES: dict[str, Callable] = {
    "head_fwd_triton": head_fwd,
    "head_bwd_triton": head_bwd,
    "head_step_triton": head_step,
    "head_held_triton": head_held,
    "head_loss_triton": head_loss,
    "head_step": step._head_step,
    "open_update": step._open,
}
SWEEPS = ("head_fwd_triton", "head_bwd_triton", "head_step_triton")
# parts that the vendor's library splits the sum over classes into, about
SPLITS = 4
# they launch nothing
FILLS = (
    "fill_",
    "zero_",
    "new_zeros",
    "new_full",
    "zeros",
    "ones",
    "full",
    "ones_like",
    "zeros_like",
)
FREE = (*traffic.ALLOCATIONS, "scalar_tensor", "promote_types", "device")


class Shape(NamedTuple):
    """Holds the sizes of a step."""

    n: int
    c: int
    d: int


class Launch(NamedTuple):
    """Holds one launch, and what it asks for."""

    name: str
    kind: str
    read: int = 0  # bytes
    written: int = 0
    cached: int = 0  # bytes read or written that another launch has just left, or will find, in L2
    flops: int = 0
    rows: int = 0  # of classes that a row kernel walks
    tile: Tile | None = None
    tiles: int = 0
    programs: int = 0
    host: str = "torch"  # who launches: a field of gpus.Host


class Step(NamedTuple):
    """Holds all launches of a step, equal ones once with their number."""

    launches: Counter[Launch]
    around: Counter[Launch]  # those of them that no sweep makes


class Recorder(TorchDispatchMode):
    """Writes launches down."""

    def __init__(self, shape: Shape, gpu: Gpu):
        super().__init__()
        self.shape, self.gpu = shape, gpu
        self.launches: Counter[Launch] = Counter()
        self.around: Counter[Launch] = Counter()
        self.depth = 0  # of sweeps

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in BODIES:
            self.depth += name in SWEEPS
            with self:
                result = BODIES[name](*args, **kwargs)
            self.depth -= name in SWEEPS
            return result
        if name == "_fused_sgd_":
            weights, gradients, momenta = args[:3]
            read = sum(t.nbytes for t in (*weights, *gradients, *momenta))
            self.add(Launch("SGD", PASS, read, sum(t.nbytes for t in (*weights, *momenta))))
            return None
        result = function(*args, **kwargs)
        if not function.is_view and name not in FREE:
            self.operation(name, args, result)
        return result

    def add(self, launch: Launch) -> None:
        """Counts a launch."""
        self.launches[launch] += 1
        if not self.depth:
            self.around[launch] += 1

    def operation(self, name: str, args: tuple, result: Any) -> None:
        """Records an operation of PyTorch, which reads its arguments and writes its result."""
        if not isinstance(result, Tensor) or result.device.type != "meta" or not result.nbytes:
            return
        given = [t for t in args if isinstance(t, Tensor)]
        read = sum(t.nbytes for t in given)
        if name in FILLS:
            read = 0
        elif name == "copy_":
            read = given[1].nbytes
        elif name in traffic.GATHERS:
            read = result.nbytes
        of_classes = self.rows_of_classes(result)
        label = "round w" if name == "copy_" and of_classes else "PyTorch"
        self.add(Launch(label, PASS, read, result.nbytes))

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        """Records a launch of Triton's; takes the place of JITFunction.run."""
        name = kernel.__name__
        matrices = (arg.base if isinstance(arg, TensorDescriptor) else arg for arg in args)
        operands = dict(zip(kernel.arg_names, matrices, strict=False)) | kw
        asked = traffic.KERNELS.get(name, traffic.Kernel(traffic.PASS))
        of_classes = {k for k, operand in operands.items() if self.rows_of_classes(operand)}
        if name not in traffic.KERNELS and of_classes:
            raise RuntimeError(f"{name}: expected its {of_classes} in traffic.KERNELS")
        read = sum(self.rows_of_classes(operands.get(k)) for k in asked.reads)
        written = sum(self.rows_of_classes(operands.get(k)) for k in asked.writes)
        if operands.get("taken") is not None:  # rows of an index
            read = written
        raw = self.rows_of_classes(operands.get(traffic.RAW_GRADIENT))
        cached = raw if raw <= self.gpu.l2_size else 0
        read += raw - cached
        rows = next(operands[size] for size in ("R", "N") if size in operands)
        launch = Launch(
            name, PASS, read, written, cached, rows=rows, programs=grid[0], host="triton"
        )
        if name in TILE_KERNELS:
            launch = self.tile_launch(launch, operands)
        self.add(launch)

    def tile_launch(self, launch: Launch, operands: dict[str, Any]) -> Launch:
        """Returns the launch of a tile kernel with its work."""
        tile = recorded_tile(operands)
        row_tiles = -(-operands["N"] // tile.block_n)
        w, g = operands["w"], operands.get("g")
        count, d = w.shape
        tiles = row_tiles * -(-count // tile.block_c)
        flops = 2 * tiles * tile.block_n * tile.block_c * d
        g_bytes = 0 if g is None else operands["N"] * count * g.itemsize
        return launch._replace(
            kind=TILE, written=launch.written + g_bytes, flops=flops, tile=tile, tiles=tiles
        )

    def gemm(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Records a GEMM: for dx, which stays in L2, as x does, or for dw."""
        flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        read = sum(t.nbytes for t in (a, b) if t.numel() > self.shape.n * self.shape.d)
        if len(out) == self.shape.n:
            self.add(Launch("dx GEMM", GEMM, read, flops=flops))
            # a sum over many classes is split, and then added up
            self.add(Launch("split-K sum", PASS, cached=SPLITS * out.nbytes))
        elif out.nbytes <= self.gpu.l2_size:
            self.add(Launch("dw GEMM", GEMM, read, cached=out.nbytes, flops=flops))
        else:
            self.add(Launch("dw GEMM", GEMM, read, out.nbytes, flops=flops))

    def rows_of_classes(self, t: Any) -> int:
        """Returns the bytes of a tensor with the rows of classes, 0 of anything else."""
        if isinstance(t, Tensor) and t.ndim == 2 and t.shape[0] != self.shape.n:
            return t.nbytes if t.shape[1] == self.shape.d else 0
        return 0


@contextlib.contextmanager
def recorded(shape: Shape, gpu: Gpu) -> Iterator[Recorder]:
    """Yields a recorder; inside this context nothing is executed, as if on ``gpu``."""
    recorder = Recorder(shape, gpu)

    def run(kernel: JITFunction, *args: Any, **settings: Any) -> None:
        recorder.launch(kernel, *args, **settings)

    target = configs.Target(gpu.table, gpu.multiprocessors)
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "target", lambda _: target),
        mock.patch.object(backends, "select", lambda *_: "triton"),
        mock.patch.object(vendor_gemm, "mm", recorder.gemm),
        mock.patch.object(vendor_gemm, "add_mm", recorder.gemm),
        recorder,
    ):
        yield recorder


def record(shape: Shape, weights: torch.dtype, gpu: Gpu, optimizer: str = "") -> Step:
    """Records a step: forward and backward, and the optimizer "SGD" after it, or "fused" in it."""
    n, c, d = shape
    with torch.device("meta"):
        x, w = torch.empty(n, d), torch.empty(c, d, dtype=weights)
        y, dw, momentum = (
            torch.zeros(n, dtype=torch.int64),
            torch.empty_like(w),
            torch.empty_like(w),
        )
    x.requires_grad_()
    shared: dict[str, Any] = dict(
        margin=ArcFace(0.5), scale=64.0, compute_dtype=torch.bfloat16, backend="triton",
        save_tiles=False,
    )  # fmt: skip
    if optimizer == "fused":
        head = MarginSoftmaxHead(d, c, device="meta", dtype=weights, **shared)
        head_optimizer = optim.SGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(2):  # from the second step on, the last one has left the norms
            with recorded(shape, gpu) as recorder:
                head(x, y).backward()
                head_optimizer.step()
    else:
        w.requires_grad_()
        with recorded(shape, gpu) as recorder:
            torch.autograd.grad(margin_cross_entropy(x, w, y, **shared), (x, w))
            if optimizer:
                torch._fused_sgd_(
                    [w], [dw], [momentum], weight_decay=5e-4, momentum=0.9, lr=0.1, dampening=0.0,
                    nesterov=False, maximize=False, is_first_step=False,
                )  # fmt: skip
    return Step(recorder.launches, recorder.around)
