# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tells what each kernel of a step takes, beside what it has to do and what the model predicts."""

import importlib
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from .contenders import Shape

STEPS = 3
PRODUCT = "GEMMs"  # the vendor's
OTHERS = "torch's kernels"
# kernels with one product of 2 N C D in each launch's share of the classes
PRODUCTS = {"statistics_kernel": 1, "gradient_kernel": 1, PRODUCT: 2}


class Kernel(NamedTuple):
    """Holds the launches of one kernel in a step."""

    calls: float
    ms: float


class Expected(NamedTuple):
    """Holds what the model says of one kernel in a step."""

    ms: float = 0.0
    bytes: int = 0  # to and from memory


def print_table(
    call: Callable[[], object], backend: str, shape: Shape, dtype: torch.dtype, in_backward: bool
) -> dict[str, Kernel]:
    """Prints a line for each kernel, and returns what was measured."""
    found = profiled(call)
    expected = predicted(backend, shape, dtype, in_backward)
    total = sum(kernel.ms for kernel in found.values())
    calls = sum(kernel.calls for kernel in found.values())
    print(f"  {'kernel':<32}{'calls':>7}{'ms':>9}{'rate':>15}{'model ms':>10}")
    for name, kernel in sorted(found.items(), key=lambda item: -item[1].ms):
        model = f"{expected[name].ms:10.3f}" if name in expected else f"{'-':>10}"
        speed = rate(name, kernel, shape, expected.get(name, Expected()).bytes)
        print(f"  {name[:31]:<32}{kernel.calls:7.0f}{kernel.ms:9.3f}{speed:>15}{model}")
    sums = f"{sum(e.ms for e in expected.values()):10.3f}" if expected else f"{'-':>10}"
    print(f"  {'all':<32}{calls:7.0f}{total:9.3f}{'':>15}{sums}", flush=True)
    return found


def profiled(call: Callable[[], object]) -> dict[str, Kernel]:
    """Returns the kernels of a step, by name."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    found: dict[str, Kernel] = {}
    for event in profile.key_averages():
        if event.self_device_time_total > 0:
            name = short(event.key)
            before = found.get(name, Kernel(0, 0))
            ms = event.self_device_time_total / STEPS / 1e3
            found[name] = Kernel(before.calls + event.count / STEPS, before.ms + ms)
    return found


def short(name: str) -> str:
    """Returns the name of a kernel of this library, or what kind another is."""
    if re.search(r"nvjet|gemm|cutlass|splitK|xmma", name):
        return PRODUCT
    own = re.search(r"(?:marginkernels::cuda::|^)(\w+_kernel)\b", name)
    return own[1] if own and "at::native" not in name else OTHERS


def rate(name: str, kernel: Kernel, shape: Shape, moved: int) -> str:
    """Returns TFLOP/s of kernels with products, of others GB/s by the bytes that they move."""
    if kernel.ms == 0:
        return ""
    if name in PRODUCTS:
        flops = 2 * PRODUCTS[name] * shape.n * shape.c * shape.d
        return f"{flops / kernel.ms * 1e-9:.0f} TFLOP/s"
    return f"{moved / kernel.ms * 1e-6:.0f} GB/s" if moved else ""


def predicted(
    backend: str, shape: Shape, dtype: torch.dtype, in_backward: bool
) -> dict[str, Expected]:
    """Returns the model's times and bytes by kernel; none where it does not know the GPU."""
    try:
        model = importlib.import_module("tools.model")
        gpus = importlib.import_module("tools.model.gpus").GPUS
        gpu = next(name for name in gpus if name in torch.cuda.get_device_name())
        optimizer = "fused" if in_backward else ""
        rows = model.predict_step(tuple(shape), dtype, backend, gpu, optimizer).rows
    except Exception as error:  # a report without a prediction is still one
        print(f"  no prediction: {type(error).__name__}: {error}")
        return {}
    found: dict[str, Expected] = {}
    for row in rows:
        name = row.name if row.name.endswith("_kernel") else OTHERS
        name = PRODUCT if "GEMM" in row.name else name
        before = found.get(name, Expected())
        found[name] = Expected(before.ms + row.ms, before.bytes + row.bytes)
    return found
