# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares steps of a backend on a GPU with fp64, and a step with its repetition.

python -m benchmarks.gpu_check triton bfloat16           # three shapes
python -m benchmarks.gpu_check --small native float32    # one, for compute-sanitizer
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from marginkernels import ArcFace, SphereFace2, margin_cross_entropy
from marginkernels.backends import get

SHAPES = [(300, 5000, 512), (33, 1003, 100), (1, 77, 64)]
SMALL = [(70, 300, 72)]
SAVED, NO_TILES = "saved", dict(save_tiles=False)
WHATS = ["recomputed", SAVED, "sub-centres", "labels", "one versus rest"]
# of the norm of each result: what rounding of the operands explains, with room
MOST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def main() -> None:
    """Prints the errors of each call, and fails where one is large."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("backend")
    parser.add_argument("dtype", choices=[str(t).removeprefix("torch.") for t in MOST_ERROR])
    options = parser.parse_args()
    good = True
    dtype = getattr(torch, options.dtype)
    for shape in SMALL if options.small else SHAPES:
        for what in WHATS if get(options.backend).keeps_tiles else [w for w in WHATS if w != SAVED]:
            good &= check(options.backend, dtype, shape, what)
    torch.cuda.synchronize()
    raise SystemExit(0 if good else 1)


def check(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], what: str) -> bool:
    """Prints relative errors of loss, dx and dw, and returns whether all is as it should be."""
    n, c, d = shape
    if what == SAVED and dtype == torch.float16:
        return True  # refused by design
    torch.manual_seed(0)
    centers = 3 if what == "sub-centres" else 1
    # rounded, because another rounding of a cosine may choose another centre
    x, w = (t.to(dtype).float() for t in (torch.randn(n, d), torch.randn(c * centers, d)))
    y = torch.randint(c, (n, 8) if what == "labels" else (n,))
    more: dict[str, Any] = dict(save_tiles=what == SAVED, sub_centers=centers)
    if what == "one versus rest":
        more |= dict(margin=SphereFace2(), scale=32.0)
    exact = step("reference", x.double(), w.double(), y, torch.float64, **more | NO_TILES)
    x, w, y = (t.cuda() for t in (x, w, y))
    first, again = (step(backend, x, w, y, dtype, **more) for _ in range(2))
    errors = [
        float((got.double().cpu() - want).norm() / want.norm())
        for got, want in zip(first, exact, strict=True)
    ]
    same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    good = same and all(error < MOST_ERROR[dtype] for error in errors)
    print(
        f"{shape} {what}: relative errors of loss, dx, dw",
        *(f"{error:.1e}" for error in errors),
        f"same bits twice: {same}{'' if good else '  WRONG'}",
        flush=True,
    )
    return good


def step(
    backend: str, x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype, **more: Any
) -> list[Tensor]:
    """Returns loss, dx and dw of a step."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    settings: dict[str, Any] = dict(margin=ArcFace(0.5), scale=64.0) | more
    settings["margin"].to(x.device)
    loss = margin_cross_entropy(x, w, y, compute_dtype=dtype, backend=backend, **settings)
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


if __name__ == "__main__":
    main()
