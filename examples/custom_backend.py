# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Registers a backend of its own: the two ops with all (N, C) logits, checked against another.

It is the contract of ``marginkernels/ops.py`` in its shortest form. A real backend never holds the
logits.

    python examples/custom_backend.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marginkernels import ArcFace, CurricularFace, MarginSoftmaxHead, SphereFace2, backends, ops
from marginkernels.numerics import least_norm
from marginkernels.transforms import TRANSFORMS, checked


class DenseBackend(backends.Backend):
    """Computes both sweeps in one piece."""

    name = "dense"
    priority = 0  # backend="auto" takes any other that runs

    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        """Lists nothing: plain PyTorch runs everywhere."""
        return []

    def register_kernels(self) -> None:
        """Registers the functions below for every device."""
        ops.implement_head(self.name, head_fwd, head_bwd, "CompositeExplicitAutograd")


class Logits:
    """Holds the operands of a sweep as rounded, and its logits (N, C)."""

    def __init__(self, x: Tensor, w: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, *,
                 normalize_x: bool, normalize_w: bool, compute_dtype: torch.dtype, transform: str,
                 row_parameter: Tensor | None, constants: Tensor | None, sub_centers: int = 1,
                 **_: Any):  # fmt: skip
        self.least = least_norm(compute_dtype)
        self.x, self.w = ops.rounded(x, compute_dtype), ops.rounded(w, compute_dtype)
        self.w_inv = 1 / self.w.norm(dim=1).clamp_min(self.least)  # (C,)
        self.x_inv = 1 / self.x.norm(dim=1).clamp_min(self.least)  # (N,)
        self.x_inv = self.x_inv if normalize_x else torch.ones_like(self.x_inv)
        self.unit_x = self.x * self.x_inv[:, None]
        self.unit_w = self.w * self.w_inv[:, None] if normalize_w else self.w
        self.cosine = self.unit_x @ self.unit_w.T
        name, *operands = checked(
            "dense", TRANSFORMS, transform, row_parameter, constants, rows=len(x),
            has_bias=bias is not None,
        )  # fmt: skip
        self.value, self.slope = TRANSFORMS[name].function(self.cosine, *operands)
        shift = 0 if bias is None else bias
        self.z, self.f = scale * self.cosine + shift, scale * self.value + shift
        self.one_versus_rest = TRANSFORMS[transform].one_versus_rest
        self.targets = y if y.ndim == 2 else y[:, None]  # (N, L)
        self.is_out = self.pairs_left_out(sub_centers)

    def pairs_left_out(self, k: int) -> Tensor:
        """Marks the classes of the targets, and all centres of a class but the nearest, (N, C)."""
        of_class = self.cosine.unflatten(1, (-1, k))
        nearest = of_class.argmax(2, keepdim=True)
        is_out = torch.ones_like(of_class, dtype=torch.bool).scatter(2, nearest, False).flatten(1)
        classes = torch.arange(is_out.shape[1], device=is_out.device) // k
        return is_out | (classes == (self.targets // k)[:, :, None]).any(1)

    def projected(self, gradient: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        """Turns the gradient of unit rows into one of the rows; zero rows get none."""
        unit = rows * inverse[:, None]
        tangent = gradient - (gradient * unit).sum(1, keepdim=True) * unit
        is_zero = rows.norm(dim=1, keepdim=True) < self.least
        return (tangent * inverse[:, None]).masked_fill(is_zero, 0)


def head_fwd(x: Tensor, w: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None,
             index: Tensor | None = None, known_w_inv: Tensor | None = None, *, want_sum: bool,
             want_max: bool, **settings: Any) -> ops.Forward:  # fmt: skip
    """Sweeps forward."""
    of = Logits(x, w if index is None else w[index], y, scale, bias, **settings)
    others, total = of.f.masked_fill(of.is_out, -torch.inf), of.f
    if of.one_versus_rest:
        lse, total = -F.logsigmoid(-others).sum(1), of.f.sigmoid()
    else:
        lse = others.logsumexp(1)
    places = of.targets.clamp_min(0)
    return ops.Forward(
        lse=lse,
        target_cosine=torch.where(y >= 0, of.cosine.gather(1, places).view(y.shape), 0),
        w_norm=torch.where(y >= 0, 1 / of.w_inv[y.clamp_min(0)], 0),
        logit_sum=total.masked_fill(of.is_out, 0).sum(1) if want_sum else of.f.new_empty(0),
        logit_max=of.z.masked_fill(of.is_out, -torch.inf).amax(1)
        if want_max
        else of.z.new_empty(0),
        x_inv=of.x_inv,
        w_inv=of.w_inv,
        tiles=of.z.new_empty(0),
        w_rounded=x.new_empty(0, dtype=settings["compute_dtype"]),
    )


def head_bwd(x: Tensor, w: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None,
             index: Tensor | None, lse: Tensor, x_inv: Tensor, w_inv: Tensor, tiles: Tensor,
             grad_lse: Tensor, grad_target: Tensor, grad_w_norm: Tensor | None,
             grad_sum: Tensor | None, *, need_x: bool, need_w: bool, need_bias: bool,
             need_scale: bool, **settings: Any) -> tuple[Tensor, ...]:  # fmt: skip
    """Sweeps backward."""
    of = Logits(x, w if index is None else w[index], y, scale, bias, **settings)
    finite_lse = lse.masked_fill(lse.isinf(), 0)  # a row without other classes has -inf
    p = of.f.sigmoid() if of.one_versus_rest else torch.exp(of.f - finite_lse[:, None])
    g = grad_lse[:, None] * p
    g = g if grad_sum is None else g + grad_sum[:, None]
    g = g.masked_fill(of.is_out, 0)  # dL/df
    dbias, dscale = g.sum(0), (g * of.value).sum()
    of_targets = torch.where(y >= 0, grad_target, 0).view(of.targets.shape)
    # dL/d(scale cosine)
    g = (g * of.slope).scatter_add(1, of.targets.clamp_min(0), of_targets)
    dx, dw = scale * (g @ of.unit_w), scale * (g.T @ of.unit_x)
    if settings["normalize_x"]:
        dx = of.projected(dx, of.x, of.x_inv)
    if settings["normalize_w"]:
        dw = of.projected(dw, of.w, of.w_inv)
    if grad_w_norm is not None:
        has_class = y >= 0
        radial = torch.zeros_like(of.w_inv).index_add_(0, y[has_class], grad_w_norm[has_class])
        dw = dw + (radial * of.w_inv)[:, None] * of.w
    if index is not None:
        dw = torch.zeros(w.shape, dtype=dw.dtype, device=w.device).index_copy_(0, index, dw)
    return (
        dx.to(x.dtype) if need_x else x.new_empty(0),
        dw.to(w.dtype) if need_w else w.new_empty(0),
        dbias if need_bias else g.new_empty(0),
        dscale if need_scale else g.new_empty(0),
    )


def main() -> None:
    backends.register(DenseBackend())
    torch.manual_seed(0)
    x = torch.randn(128, 64, requires_grad=True)
    one, three = torch.randint(1000, (128,)), torch.randint(1000, (128, 3))
    for margin, y, sub_centers in (
        (ArcFace(0.5), one, 1), (CurricularFace(), one, 1), (SphereFace2(), one, 1),
        (ArcFace(0.5), three, 2),
    ):  # fmt: skip
        head = MarginSoftmaxHead(
            64, 1000, margin=margin, scale=32.0, sub_centers=sub_centers
        ).eval()
        results = []
        for backend in ("dense", "auto"):
            head.backend = backend
            loss = head(x, y)
            results.append((loss, *torch.autograd.grad(loss, (x, head.weight))))
        kind = f"{type(margin).__name__}, labels {tuple(y.shape)}, centres {sub_centers}"
        for name, a, b in zip(("loss", "dx", "dw"), *results, strict=True):
            difference = ((a - b).norm() / b.norm()).item()
            print(f"{kind}, {name}: relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
