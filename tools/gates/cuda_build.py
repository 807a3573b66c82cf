# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks an installed extension with CUDA kernels where there is no GPU.

python cuda_build.py
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import marginkernels
from marginkernels import ArcFace, backends, margin_cross_entropy, ops
from marginkernels.backends import native


def head(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Returns a loss over the native backend."""
    return margin_cross_entropy(
        x, w, y, margin=ArcFace(0.5), scale=64.0, backend="native", label_smoothing=0.1
    )


def gradients(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Calls the ops as the Function's forward and backward pass do; returns dx and dw."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.ones((), dtype=wide, device=x.device)
    settings = dict(
        normalize_x=True, normalize_w=True, compute_dtype=x.dtype, transform="identity",
        row_parameter=None, constants=None,
    )  # fmt: skip
    lse, *_, x_inv, w_inv, tiles, _ = ops.head_fwd("native")(
        x, w, y, scale, None, save_tiles=False, want_sum=False, want_max=False, **settings
    )
    dx, dw, _, _ = ops.head_bwd("native")(
        x, w, y, scale, None, None, lse, x_inv, w_inv, tiles, lse, lse, None, None, need_x=True,
        need_w=True, need_bias=False, need_scale=False, **settings,
    )  # fmt: skip
    return dx, dw


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, w and y on a GPU."""
    x, w = (
        torch.randn(rows, 64, dtype=dtype, device="cuda", requires_grad=True) for rows in (8, 100)
    )
    return x, w, torch.zeros(8, dtype=torch.int64, device="cuda")


def ops_are_registered() -> None:
    """Checks that each op has kernels for the CPU and for CUDA."""
    assert native.extension is not None
    info = native.extension.build_info()
    print(f"CUDA {info['cuda']} for {', '.join(info['cuda_architectures'])}")
    assert info["cuda"] and info["cuda_architectures"]
    for op in ("head_fwd_native", "head_bwd_native", "head_step_native"):
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"marginkernels::{op}", device)


def a_call_says_that_there_is_no_gpu() -> None:
    """Checks the error of a call on CUDA tensors, and that a call on the CPU still works."""
    with FakeTensorMode():
        try:
            head(*operands(torch.bfloat16))
        except RuntimeError as error:
            print(error)
            assert "backend: 'native' cannot run here: " in str(error) and "no GPU" in str(error)
        else:
            raise AssertionError("it ran")
    # what does not need one still works
    x, w = (torch.randn(rows, 64, requires_grad=True) for rows in (8, 100))
    assert head(x, w, torch.zeros(8, dtype=torch.int64)).isfinite()


class NativeOnAnyDevice(native.NativeBackend):
    """Takes CUDA tensors where there is no GPU: nothing may be executed."""

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        """Returns none."""
        return []


def compilation_traces_cuda_tensors() -> None:
    """Traces fake tensors by Dynamo and by AOT autograd as if there were a GPU.

    Dynamo follows the backward pass of the Function too. AOT autograd traces only the op of the
    backward pass, since the autograd engine itself asks for a driver. Nothing is executed.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        with FakeTensorMode():
            x, w, y = operands(dtype)
            for tracer, grad in (("eager", True), ("aot_eager", False)):
                with torch.set_grad_enabled(grad):
                    loss = torch.compile(head, backend=tracer, fullgraph=True)(x, w, y)
                    assert loss.device.type == "cuda" and loss.dtype == wide
            with torch.no_grad():
                dx, dw = torch.compile(gradients, backend="aot_eager", fullgraph=True)(x, w, y)
        for gradient, operand in ((dx, x), (dw, w)):
            assert gradient.device.type == "cuda" and gradient.dtype == dtype
            assert gradient.shape == operand.shape


if __name__ == "__main__":
    print(marginkernels.__file__)
    ops_are_registered()
    if torch.cuda.is_available():
        print("here is a GPU: the tests themselves run on it")
    else:
        a_call_says_that_there_is_no_gpu()
        with backends.registered(NativeOnAnyDevice(native.extension, [])):
            compilation_traces_cuda_tensors()
    print("the CUDA build is sound")
