# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes problems to solve with a backend, with the plain path in the same type, and with fp64."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from marginkernels import margin_cross_entropy
from marginkernels.margins import Rows
from marginkernels.testing import assert_within_budget, plain_margin_cross_entropy


@dataclass
class Problem:
    """Holds the operands of one call; ``compute_dtype`` None is x's own."""

    x: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    compute_dtype: torch.dtype | None = None
    bias: torch.Tensor | None = None
    settings: dict = field(default_factory=dict)  # margin, scale, normalize, ...

    def solve(
        self, function: Callable, dtype: torch.dtype | None = None, **more: Any
    ) -> list[Tensor]:
        """Returns row losses from ``function``, and the gradients of a weighted sum of them."""
        leaves = [
            t if t is None else t.detach().to(dtype or t.dtype) for t in (self.x, self.w, self.bias)
        ]
        leaves = [t if t is None else t.requires_grad_() for t in leaves]
        settings = {
            k: v.to(dtype) if dtype and isinstance(v, torch.Tensor) else v
            for k, v in self.settings.items()
        }
        settings = dict(reduction="none", bias=leaves[2]) | settings | more
        loss = function(leaves[0], leaves[1], self.y, **settings)
        # uneven upstream gradients: an error that cancels in the mean does not cancel here
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
        wanted = [t for t in leaves if t is not None]
        return [loss, *torch.autograd.grad((loss * upstream).sum(), wanted)]

    def solve_fused(self, backend: str, **more: Any) -> list[Tensor]:
        return self.solve(
            margin_cross_entropy, backend=backend, compute_dtype=self.compute_dtype, **more
        )

    def solve_exact(self) -> list[Tensor]:
        return self.solve(margin_cross_entropy, torch.float64, backend="reference")

    def solve_plain(self, draws: int = 12) -> list[list[Tensor]]:
        """Solves several times by today's path in the same type, under autocast where x is wider.

        An orthogonal map of the features changes nothing but the rounding errors: a permutation,
        and a reflection too where the operands are wider than the type they are rounded to.
        In fp32 every second draw adds the features up in sequence, as a GEMM does that has enough
        rows and classes. A library that splits a small product has a fraction of that error.
        """
        d, device = self.x.shape[1], self.x.device
        compute = self.compute_dtype or self.x.dtype
        autocast = contextlib.nullcontext()
        if compute != self.x.dtype:
            autocast = torch.autocast(device.type, compute)
        solutions = []
        for draw in range(draws):
            order = torch.randperm(d).to(device)
            normal = torch.zeros(d, dtype=torch.float64, device=device)
            if compute.itemsize < min(self.x.itemsize, self.w.itemsize):
                random = torch.randn(d, dtype=torch.float64).to(device)
                normal = torch.nn.functional.normalize(random, dim=0)
            in_sequence = compute == torch.float32 and draw % 2 == 1

            def reflect(t: Tensor, normal: Tensor = normal) -> Tensor:
                return t.double() - 2 * (t.double() @ normal)[:, None] * normal

            x, w = (reflect(t[:, order]).to(t.dtype) for t in (self.x, self.w))
            with autocast, AddedInSequence() if in_sequence else contextlib.nullcontext():
                loss, dx, dw, *dbias = replace(self, x=x, w=w).solve(plain_margin_cross_entropy)
            dx, dw = (reflect(t)[:, order.argsort()] for t in (dx, dw))
            solutions.append([loss, dx, dw, *dbias])
        return solutions

    def check(
        self,
        backend: str,
        exact: list[Tensor] | None = None,
        plain: list[list[Tensor]] | None = None,
        conditioning: float = 1.0,
        **more: Any,
    ) -> None:
        """Checks that loss and gradients of ``backend`` are finite and within the budget.

        Easy rows, whose loss the plain path cannot resolve, are judged apart, and so are the
        classes that are targets.
        """
        got = self.solve_fused(backend, **more)
        exact, plain = exact or self.solve_exact(), plain or self.solve_plain()
        is_target = torch.zeros(len(self.w), dtype=torch.bool, device=self.w.device)
        is_target[self.y[self.y >= 0]] = True
        easy = exact[0].detach() < 1e-2
        names = ("loss", "dx", "dw", "dbias")[: len(got)]
        for index, (name, value) in enumerate(zip(names, got, strict=True)):
            assert value.isfinite().all(), f"{name} is not finite"
            subset, label = (easy, "easy") if name in ("loss", "dx") else (is_target, "target")
            for rows, group in (
                (subset, f"{label} rows of {name}"),
                (~subset, f"other rows of {name}"),
            ):
                draws = [solution[index][rows] for solution in plain]
                assert_within_budget(group, value[rows], draws, exact[index][rows], conditioning)


class AddedInSequence(TorchFunctionMode):
    """Makes F.linear add up the features one by one, with one accumulator for each result."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            return _LinearInSequence.apply(*args)
        return func(*args, **(kwargs or {}))


class _LinearInSequence(torch.autograd.Function):
    """Computes x w^T by one update of rank 1 for each feature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        out = x.new_zeros(len(x), len(w))
        for of_rows, of_classes in zip(x.unbind(1), w.unbind(1), strict=True):
            out.addr_(of_rows, of_classes)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return upstream[0] @ w, upstream[0].T @ x


def random_problem(
    n: int,
    c: int,
    d: int,
    *,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None] = (
        torch.float32,
        torch.float32,
        None,
    ),
    bias: bool = False,
    **settings: Any,
) -> Problem:
    """Returns a problem whose embeddings lean towards their class: losses from easy to hard.

    It is the same one on every device.
    """
    x_dtype, w_dtype, compute_dtype = dtypes
    w = torch.randn(c, d)
    y = torch.randint(0, c, (n,))
    lean = torch.linspace(0, 2, max(n, 1))[:n, None]
    x = torch.randn(n, d) + lean * w[y]
    b = torch.randn(c).to(device) if bias else None
    return Problem(
        x.to(device, x_dtype), w.to(device, w_dtype), y.to(device), compute_dtype, b, settings
    )


class MarginOfNorms(torch.nn.Module):
    """Depends on both norms and is differentiable in them, as MagFace is in one."""

    def forward(self, c: Tensor, rows: Rows) -> Tensor:
        given = 0.0 if rows.row_margin is None else rows.row_margin
        return c - 0.1 * torch.tanh(rows.x_norm) - 0.2 * torch.tanh(rows.w_norm) - given
