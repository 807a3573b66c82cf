# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks a backend on inputs that break margin heads and fused cross-entropy kernels elsewhere."""

import torch
from torch import Tensor

from marginkernels import ArcFace, CosFace, NSoftmax, margin_cross_entropy
from marginkernels.testing import assert_within_budget, row_errors
from tests.support.problems import MarginOfNorms, Problem, random_problem

F32, F64 = torch.float32, torch.float64


def zero_rows(compute_dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Checks that rows of zeros have gradients of zero and spoil no other row."""
    problem = random_problem(12, 50, 20, device=device, margin=ArcFace(0.5), scale=30.0)
    problem.compute_dtype = compute_dtype
    zero_row, zero_classes = 3, [int(problem.y[4]), int(problem.y[0] + 1) % 50]
    problem.x[zero_row] = 0
    problem.w[zero_classes] = 0
    got, exact, plain = problem.solve_fused(backend), problem.solve_exact(), problem.solve_plain()
    assert (got[1][zero_row] == 0).all() and (got[2][zero_classes] == 0).all()
    rows = torch.arange(12, device=device) != zero_row
    classes = torch.ones(50, dtype=torch.bool, device=device)
    classes[zero_classes] = False
    others = (("loss", slice(None)), ("dx", rows), ("dw", classes))
    for (name, kept), value, reference, *draws in zip(others, got, exact, *plain, strict=True):
        assert_within_budget(name, value[kept], [draw[kept] for draw in draws], reference[kept])


def duplicates(backend: str, device: str = "cpu") -> None:
    """Checks batches in which one class is the target of all rows, or of many."""
    problem = random_problem(130, 600, 32, device=device, margin=ArcFace(0.4), scale=32.0)
    problem.y[:] = 599
    problem.check(backend)
    problem.y[::3] = 0
    problem.check(backend)


def easy_rows(save_tiles: bool | str, backend: str, device: str = "cpu") -> None:
    """Checks for a relative error of 1e-4 where lse - z_y has no correct digit."""
    w = torch.randn(500, 64, device=device)
    y = torch.arange(16, device=device)
    x = w[y] + 0.02 * torch.randn(16, 64, device=device)
    problem = Problem(x, w, y, settings=dict(margin=CosFace(0.1), scale=64.0))
    got, exact = problem.solve_fused(backend, save_tiles=save_tiles), problem.solve_exact()
    assert exact[0].max() < 1e-4 and exact[0].min() > 0
    for index, name in ((0, "loss"), (1, "dx")):
        error, norm = row_errors(got[index], exact[index])
        assert (error / norm).max() < 1e-4, name
    error, norm = row_errors(got[2][y], exact[2][y])
    assert (error / norm).max() < 1e-4


def cosines_of_one_sign(sign: int, scale: float, backend: str, device: str = "cpu") -> None:
    """Checks logits near -s, which underflow an unshifted exp, or near +s, which overflow it."""
    direction = torch.randn(1, 32, device=device)
    x = direction + 0.1 * torch.randn(20, 32, device=device)
    w = sign * direction + 0.1 * torch.randn(333, 32, device=device)
    y = torch.randint(0, 333, (20,), device=device)
    problem = Problem(x, w, y, settings=dict(margin=ArcFace(0.5), scale=scale))
    # lse is one fp32 number near +-s: half a unit in its last place is a relative error of every
    # probability in the row
    problem.check(backend, conditioning=scale / 2)
    problem.check(backend, conditioning=scale / 2, save_tiles=False)


def small_opposite_rows(backend: str, device: str = "cpu") -> None:
    """Checks rows whose factors exp(s), 1 / |x| and s of saved tiles exceed fp32 together."""
    direction = torch.randn(1, 32, device=device)
    x = 1e-10 * (direction + 1e-2 * torch.randn(6, 32, device=device))
    w = -direction + 1e-2 * torch.randn(5, 32, device=device)
    y = torch.arange(6, device=device) % 5
    problem = Problem(x, w, y, settings=dict(margin=NSoftmax(), scale=72.9))
    problem.check(backend, conditioning=72.9 / 2, save_tiles="auto")


def extreme_norms(
    size: float, normalize: str, compute_dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Checks rows and classes of tiny and huge norms, alone and beside usual ones."""
    base = random_problem(21, 130, 40, device=device, margin=ArcFace(0.3), scale=1.0)
    # logits stay of order 10: on un-normalised sides the scale answers for the norms
    norms = {"both": 1.0, "weight": size, "none": size * size}[normalize]
    base.settings.update(scale=10.0 / norms, normalize=normalize)
    base.x, base.w = (torch.nn.functional.normalize(t) for t in (base.x, base.w))
    problem = Problem(base.x * size, base.w * size, base.y, compute_dtype, settings=base.settings)
    problem.check(backend)
    mixed_sizes = torch.ones(21, 1, device=device)
    mixed_sizes[::2] = size
    settings = dict(margin=ArcFace(0.3), scale=10.0)
    mixed = Problem(base.x * mixed_sizes, base.w, base.y, compute_dtype, settings=settings)
    mixed.check(backend)


def smallest_problems(n: int, c: int, backend: str, device: str = "cpu") -> None:
    """Checks shapes and values where there are no rows or no negatives."""
    problem = random_problem(n, c, 3, device=device, margin=ArcFace(0.2), scale=64.0)
    loss, dx, dw = problem.solve_fused(backend)
    assert loss.shape == (n,) and dx.shape == (n, 3) and dw.shape == (c, 3)
    if c == 1:  # no negatives: nothing to lose
        assert (loss == 0).all() and (dx == 0).all() and (dw == 0).all()
    settings = dict(problem.settings, label_smoothing=0.1, return_stats=True, backend=backend)
    loss, stats = margin_cross_entropy(problem.x, problem.w, problem.y, **settings)
    assert loss.isfinite() and stats.row_loss.shape == (n,)
    if n == 0:
        assert loss == 0
    if c == 1:
        assert stats.correct.all()


def nothing_to_average(compute_dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Checks that a mean over no rows, or over weights of zero, is 0 and has gradients of 0."""
    problem = random_problem(6, 9, 5, device=device, margin=ArcFace(0.3), scale=20.0)
    for y, weight in (
        (torch.full_like(problem.y, -100), None),
        (problem.y, torch.zeros(6, device=device)),
    ):
        x, w = problem.x.clone().requires_grad_(), problem.w.clone().requires_grad_()
        loss = margin_cross_entropy(
            x, w, y, sample_weight=weight, backend=backend, compute_dtype=compute_dtype,
            **problem.settings,
        )  # fmt: skip
        loss.backward()
        assert loss == 0 and (x.grad == 0).all() and (w.grad == 0).all()


def large_biases(offset: float, backend: str, device: str = "cpu") -> None:
    """Checks that an offset of a row is harmless: the running maximum takes it out."""
    problem = random_problem(15, 200, 16, device=device, margin=ArcFace(0.3), scale=10.0, bias=True)
    problem.bias += offset
    problem.check(backend)


def gradients_through_the_norms(normalize: str, backend: str, device: str = "cpu") -> None:
    """Checks a margin that depends on the norms of rows and classes."""
    settings = dict(margin=MarginOfNorms(), scale=4.0, normalize=normalize)
    problem = random_problem(20, 70, 3, device=device, **settings)
    problem.x, problem.w = 0.4 * problem.x, 0.4 * problem.w  # where tanh still rises
    problem.check(backend)


def learnable_scale_and_bias(backend: str, device: str = "cpu") -> None:
    """Checks the gradient of a scale, with a bias and label smoothing."""
    problem = random_problem(25, 90, 33, device=device, margin=ArcFace(0.2), scale=None, bias=True)

    def scale_gradient(dtype: torch.dtype, backend: str) -> Tensor:
        scale = torch.tensor(8.0, dtype=dtype, device=device, requires_grad=True)
        problem.settings.update(scale=scale, label_smoothing=0.05)
        operands = [t.to(dtype) for t in (problem.x, problem.w)]
        loss = margin_cross_entropy(
            *operands, problem.y, bias=problem.bias, backend=backend, **problem.settings
        )
        return torch.autograd.grad(loss, scale)[0].double()

    torch.testing.assert_close(
        scale_gradient(F32, backend),
        scale_gradient(F64, "reference"),
        rtol=1e-5,
        atol=1e-7,
    )
