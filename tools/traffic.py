# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Counts the bytes over C x D that a training step of the Triton backend moves on a GPU.

    python -m tools.traffic               # at a million classes, plain and fused

The launchers run on tensors without memory, at full size. Every launch, GEMM and operation of
PyTorch is recorded and not executed, and what it reads and writes of the classes' rows is added up.
What is as small as the batch, and G, whose rows are not the classes', are left out. No GPU is
involved: the count says what the kernels ask for, not what a cache gives them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from marginkernels import rules
from marginkernels.backends.triton import configs, vendor_gemm
from marginkernels.backends.triton.backward import head_bwd
from marginkernels.backends.triton.forward import head_fwd
from marginkernels.backends.triton.step import head_step

PASS, MATRIX, RAW = "passes", "matrix products", "dw before its projection"
TARGET = configs.Target("sm_90", 132)


class Setting(NamedTuple):
    """Describes a training step with SGD and momentum."""

    name: str
    compute: torch.dtype
    weights: torch.dtype  # and their gradient and momentum
    fused: bool  # whether the update is part of backward
    n: int = 1024
    c: int = 1_000_000
    d: int = 512


class Kernel(NamedTuple):
    """Names the operands of a kernel that have the rows of classes."""

    kind: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()  # reads a row for each row of the batch


class Access(NamedTuple):
    """Holds what one kernel, GEMM or operation moves."""

    name: str
    kind: str
    read: int  # bytes
    written: int


SETTINGS = [
    Setting("fp32 weights, SGD after backward", torch.bfloat16, torch.float32, False),
    Setting("fp32 weights, fused", torch.bfloat16, torch.float32, True),
    Setting("fp32 weights and arithmetic, fused", torch.float32, torch.float32, True),
    Setting("bf16 weights, SGD after backward", torch.bfloat16, torch.bfloat16, False),
    Setting("bf16 weights, fused", torch.bfloat16, torch.bfloat16, True),
]

KERNELS = {
    "prepare_rows_kernel": Kernel(PASS, reads=("given",), writes=("rows",)),
    "statistics_kernel": Kernel(MATRIX, reads=("w",)),
    "gradient_kernel": Kernel(MATRIX, reads=("w",)),
    "project_kernel": Kernel(PASS, reads=("rows",), writes=("out",), gathers=("table",)),
    "update_kernel": Kernel(PASS, reads=("w", "first", "second"), writes=("w", "first", "second")),
    "finish_rows_kernel": Kernel(PASS, gathers=("w",)),
    "target_kernel": Kernel(PASS),
    "flag_kernel": Kernel(PASS),
    "held_kernel": Kernel(PASS),
    "loss_kernel": Kernel(PASS),
    "saved_rows_kernel": Kernel(PASS),
}
RAW_GRADIENT = "gradient"  # the operand of project_kernel and update_kernel
# operations of PyTorch, with the positions of what they read and write
OPERATIONS = {"copy_": ((1,), (0,)), "zero_": ((), (0,)), "_fused_sgd_": ((0, 1, 2), (0, 2))}
GATHERS = ("index", "index_select")
ALLOCATIONS = ("empty", "empty_like", "new_empty")


class Recorder(TorchDispatchMode):
    """Records what is moved of tensors with the rows of classes."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.setting = setting
        self.accesses: list[Access] = []

    def add(self, name: str, kind: str, reads: list[Any], writes: list[Any]) -> None:
        """Records an access, if it is one to classes' rows."""
        read, written = (sum(map(self.class_bytes, ts)) for ts in (reads, writes))
        if read or written:
            self.accesses.append(Access(name, kind, read, written))

    def class_bytes(self, operand: Any) -> int:
        """Returns the bytes of a tensor with the rows of classes, 0 of anything else."""
        if isinstance(operand, list):
            return sum(map(self.class_bytes, operand))
        if isinstance(operand, TensorDescriptor):
            operand = operand.base
        if not isinstance(operand, Tensor) or operand.ndim != 2:
            return 0
        rows, columns = operand.shape
        return operand.nbytes if columns == self.setting.d and rows != self.setting.n else 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in OPERATIONS:
            reads, writes = OPERATIONS[name]
            self.add(name, PASS, [args[i] for i in reads], [args[i] for i in writes])
            return args[0] if isinstance(args[0], Tensor) else None
        result = function(*args, **kwargs or {})
        if name not in (*ALLOCATIONS, *GATHERS) and not function.is_view:
            touched = [t for t in (*args, result) if self.class_bytes(t)]
            if touched and name != "new_zeros":
                raise RuntimeError(f"{name}: expected an operation in OPERATIONS, got another")
        return result

    def launch(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        """Records a launch; takes the place of JITFunction.run."""
        name = kernel.__name__
        operands = dict(zip(kernel.arg_names, args, strict=False)) | kw
        if name not in KERNELS:
            raise RuntimeError(f"{name}: expected a kernel in KERNELS, got another")
        kind, reads, writes, gathers = KERNELS[name]
        if operands.get("taken") is not None:
            reads, gathers = (), reads
        rows_of_classes = {k for k, operand in operands.items() if self.class_bytes(operand)}
        if unknown := rows_of_classes.difference(reads, writes, gathers, (RAW_GRADIENT,)):
            raise RuntimeError(f"{name}: KERNELS does not say what it does with {unknown}")
        self.add(name, kind, [operands[k] for k in reads], [operands[k] for k in writes])
        self.add(name, RAW, [operands.get(RAW_GRADIENT)], [])

    def mm(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Records a GEMM for dw, or the first one for dx; takes the place of vendor_gemm.mm."""
        if len(out) == self.setting.n:
            self.add_mm(out, a, b)
        else:
            self.add("dw", RAW, [], [out])

    def add_mm(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Records a GEMM for dx; takes the place of vendor_gemm.add_mm."""
        self.add("dx", MATRIX, [b], [])


@contextlib.contextmanager
def recorded(setting: Setting) -> Iterator[list[Access]]:
    """Yields a list of what is moved inside this context, where nothing is executed."""
    recorder = Recorder(setting)

    def run(kernel: JITFunction, *args: Any, **settings: Any) -> None:
        recorder.launch(kernel, *args, **settings)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "target", lambda _: TARGET),
        mock.patch.object(vendor_gemm, "mm", recorder.mm),
        mock.patch.object(vendor_gemm, "add_mm", recorder.add_mm),
        recorder,
    ):
        yield recorder.accesses


def count(setting: Setting) -> list[Access]:
    """Returns all accesses of a step: forward, backward and the update of the weights."""
    n, c, d = setting.n, setting.c, setting.d
    with torch.device("meta"):
        x, w = torch.empty(n, d), torch.empty(c, d, dtype=setting.weights)
        y, scale, row = torch.empty(n, dtype=torch.int64), torch.empty(()), torch.empty(n)
        w_inv, dw, momentum = torch.empty(c), torch.empty_like(w), torch.empty_like(w)
        numbers, random = torch.empty(rules.NUMBERS), torch.empty(2, dtype=torch.int64)
    shared: dict[str, Any] = dict(
        normalize_x=True, normalize_w=True, compute_dtype=setting.compute, transform="identity",
        row_parameter=None, constants=None,
    )  # fmt: skip
    needed: dict[str, Any] = dict(need_x=True, need_bias=False, need_scale=False)
    with recorded(setting) as accesses:
        known = w_inv if setting.fused else None
        lse, _, _, _, _, x_inv, w_inv, tiles, _ = head_fwd(
            x, w, y, scale, None, None, known, save_tiles=False, want_sum=False, want_max=False,
            **shared,
        )  # fmt: skip
        given: list[Any] = [x, w, y, scale, None, None, lse, x_inv, w_inv, tiles, row, row]
        given += [None, None]  # gradients that do not arrive
        if setting.fused:
            step: Callable[..., Any] = head_step
            given += [[momentum], numbers, random]
            step(*given, rule="sgd", project=False, first_class=0, **needed, **shared)
        else:
            sweep: Callable[..., Any] = head_bwd
            sweep(*given, need_w=True, **needed, **shared)
            torch._fused_sgd_(
                [w], [dw], [momentum], weight_decay=5e-4, momentum=0.9, lr=0.1, dampening=0.0,
                nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
    return accesses


def total(accesses: list[Access], kind: str) -> int:
    """Returns the bytes of one kind."""
    return sum(a.read + a.written for a in accesses if a.kind == kind)


def main() -> None:
    """Prints what each kernel moves, in GB."""
    for setting in SETTINGS:
        accesses = count(setting)
        print(f"\n{setting.name}: (N, C, D) = {setting[-3:]}, {setting.compute} arithmetic")
        for name, kind in dict.fromkeys((a.name, a.kind) for a in accesses):
            own = [a for a in accesses if (a.name, a.kind) == (name, kind)]
            read, written = (1e-9 * sum(column) for column in list(zip(*own, strict=True))[2:])
            launches = f"{len(own):5} times"
            print(f"  {name:<20}{kind:<18}{launches}  reads {read:6.2f}  writes {written:6.2f}")
        for kind in (PASS, MATRIX, RAW):
            print(f"  all {kind:<34}{1e-9 * total(accesses, kind):31.2f}")


if __name__ == "__main__":
    main()
