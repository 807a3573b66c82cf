# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests options of the CUDA kernels that heads reach in few types.

Every transform runs in every type, beside sums, maxima, biases, un-normalised sides and gradients
of norms and of the scale.
"""

import pytest
import torch
from test_transforms import operands

from marginkernels import ops
from marginkernels.testing import row_errors
from marginkernels.transforms import TRANSFORMS
from tests.emulation import host

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# a unit in the last place of the type, since G is rounded once
ROUNDING = {F16: 2e-3, BF16: 1.6e-2, F32: 1e-5, F64: 1e-12}
SIDES = {
    "both": dict(normalize_x=True, normalize_w=True),
    "weight": dict(normalize_x=False, normalize_w=True),
}


@pytest.fixture(autouse=True)
def executed():
    with host.executed():
        yield


@pytest.mark.parametrize("normalize, sub_centers", [("both", 1), ("weight", 1), ("both", 3)])
@pytest.mark.parametrize("compute", ROUNDING, ids=["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("name", [*TRANSFORMS, "identity with bias"])
def test_all_options_at_once(name, compute, normalize, sub_centers):
    name, _, bias = name.partition(" ")
    # two tiles of rows, several tiles of classes with a ragged last one, two steps of features
    n, c, d = 70, 300 * sub_centers, 40
    stats = F64 if compute == F64 else F32
    x, w = (torch.nn.functional.normalize(torch.randn(k, d)).to(compute) for k in (n, c))
    y = torch.randint(0, c, (n,))
    y[::4], y[5], x[3], w[7] = -1, y[6], 0, 0
    row_parameter, constants = operands(name, n, stats)
    owned = y >= 0
    scale = torch.tensor(8.0, dtype=stats)
    b = torch.randn(c, dtype=stats) if bias else None
    upstream = [
        torch.rand(n, dtype=stats),
        -torch.rand(n, dtype=stats) * owned,
        torch.randn(n, dtype=stats) * owned,
        torch.randn(n, dtype=stats) / c,
    ]

    def solve(backend, dtype, stats):
        def as_stats(t):
            return None if t is None else t.to(stats)

        settings = dict(SIDES[normalize], compute_dtype=dtype, transform=name)
        settings |= dict(sub_centers=sub_centers)
        settings |= dict(row_parameter=as_stats(row_parameter), constants=as_stats(constants))
        args = (x.to(dtype), w.to(dtype), y, as_stats(scale), as_stats(b))
        wanted = dict(save_tiles=False, want_sum=True, want_max=True)
        lse, d_, w_norm, *more, x_inv, w_inv, tiles, _ = ops.head_fwd(backend)(
            *args, **wanted, **settings
        )
        needs = dict(need_x=True, need_w=True, need_bias=bool(bias), need_scale=True)
        gradients = ops.head_bwd(backend)(
            *args, None, lse, x_inv, w_inv, tiles, *map(as_stats, upstream), **needs, **settings
        )
        return [lse, d_, w_norm, *more], gradients

    forward, gradients = solve(host.NAME, compute, stats)
    exact, exact_gradients = solve("reference", F64, F64)
    least = 0.0 if compute != F16 else 1e-4  # a zero row's norm is the least of its type
    for ours, reference in zip(forward, exact, strict=True):
        tolerance = 1e-12 if compute == F64 else 1e-5
        atol = max(tolerance * reference.abs().max().item(), least)
        torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=atol)
    for ours, reference in zip(gradients, exact_gradients, strict=True):
        if reference.numel() == 0:
            continue
        matrices = (t.reshape(len(t) if t.dim() == 2 else 1, -1) for t in (ours, reference))
        error, norm = row_errors(*matrices)
        # errors are relative to the terms of a sum, of which the projection may leave little
        assert (error <= ROUNDING[compute] * (norm + norm.mean())).all()
