# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests how the CUDA kernels read x, w and y: rows of any stride and type, kept, by index, sorted.

Sizes of chunks on the host are 1/4096 of those on a GPU, and labels of more than 32 rows are
sorted: one sweep has several chunks here.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from marginkernels import ops
from tests.emulation import host

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SETTINGS: dict[str, Any] = dict(
    normalize_x=True, normalize_w=True, transform="identity", row_parameter=None, constants=None
)


@pytest.fixture(autouse=True)
def executed():
    with host.executed():
        yield


def forward(x: Tensor, w: Tensor, y: Tensor, compute: torch.dtype, **options: Any) -> ops.Forward:
    """Sweeps forward with a scale of 8."""
    settings = SETTINGS | dict(save_tiles=False, want_sum=False, want_max=True) | options
    return ops.Forward(
        *ops.head_fwd(host.NAME)(x, w, y, _scale(compute), None, compute_dtype=compute, **settings)
    )


def backward(
    x: Tensor, w: Tensor, y: Tensor, compute: torch.dtype, seen: ops.Forward, index: Tensor | None,
    grad_lse: Tensor, grad_target: Tensor, w_rounded: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Returns dx and dw."""
    return ops.head_bwd(host.NAME)(
        x, w, y, _scale(compute), None, index, seen.lse, seen.x_inv, seen.w_inv, seen.tiles,
        grad_lse, grad_target, None, None, compute_dtype=compute, need_x=True, need_w=True,
        need_bias=False, need_scale=False, w_rounded=w_rounded, **SETTINGS,
    )[:2]  # fmt: skip


def _scale(compute: torch.dtype) -> Tensor:
    return torch.tensor(8.0, dtype=ops.statistics_dtype(compute))


def random_rows(n: int, c: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x, w and labels, a tenth of them -1 and some shared."""
    torch.manual_seed(0)
    y = torch.randint(0, c, (n,)) // 3
    y[::10] = -1
    return torch.randn(n, d), torch.randn(c, d), y


@pytest.mark.parametrize("sampled", [False, True])
def test_backward_reads_only_the_rows_that_forward_kept(sampled):
    """Gives backward a w of NaN, in several chunks of both sweeps."""
    x, w, y = random_rows(40, 1500, 64)
    index = None
    if sampled:
        index = torch.randperm(3000)[:1500].sort().values
        w = torch.randn(3000, 64).index_copy(0, index, w)
    up = torch.rand(40), torch.rand(40) * (y >= 0)
    plain = forward(x, w, y, BF16, index=index)
    kept = forward(x, w, y, BF16, index=index, keep_rounded=True)
    swept = w if index is None else w[index]
    assert torch.equal(kept.w_rounded, swept.to(BF16)) and plain.w_rounded.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], kept[:-1], strict=True))
    expected = backward(x, w, y, BF16, plain, index, *up)
    got = backward(x, w * torch.nan, y, BF16, kept, index, *up, kept.w_rounded)
    for ours, theirs in zip(got, expected, strict=True):
        # without rounding chunks are larger, and sums of dx have another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"w_rounded: expected \(1500, 64\), got \[1499, 64\]"):
        backward(x, w, y, BF16, kept, index, *up, kept.w_rounded[1:])


def test_rows_that_the_kernels_cannot_read_are_not_kept():
    x, w, y = random_rows(8, 20, 40)
    for compute in (BF16, F32):
        with pytest.raises(ValueError, match="keep_rounded: expected a 16-bit compute_dtype and D"):
            forward(x, w, y, compute, keep_rounded=True)


@pytest.mark.parametrize("compute", [BF16, F16, F32, F64])
@pytest.mark.parametrize("d", [64, 37])
def test_rows_of_any_stride_and_type(compute, d):
    """Compares columns of a wider tensor, transposed and shifted rows with a copy of them."""
    n, c = 20, 150
    y = torch.randint(0, c, (n,))
    for dtype in (F32, BF16, F64) if compute != F64 else (F64, F32):
        wide, tall = torch.randn(c, d + 5, dtype=dtype), torch.randn(d, 2 * c, dtype=dtype)
        for w in (wide[:, :d], wide[:, 1 : d + 1], tall[:, :c].T, tall.T.contiguous()[::2]):
            x = w[:n]
            assert not w.is_contiguous()
            seen = forward(x, w, y, compute)
            copied = forward(x.contiguous(), w.contiguous(), y, compute)
            assert all(torch.equal(a, b) for a, b in zip(seen, copied, strict=True))
            up = torch.rand(n, dtype=seen.lse.dtype), torch.rand(n, dtype=seen.lse.dtype)
            for ours, theirs in zip(
                backward(x, w, y, compute, seen, None, *up),
                backward(x.contiguous(), w.contiguous(), y, compute, seen, None, *up),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compute", [BF16, F64])
def test_targets_by_a_sort_have_the_bits_of_those_by_a_scan(compute):
    """Adds a row without a target: 33 rows are sorted."""
    x, w, y = random_rows(32, 18, 160)
    more_x, more_y = torch.cat([x, x[:1]]), torch.cat([y, torch.tensor([-1])])
    assert len(y[y >= 0].unique()) < 7
    results = []
    for rows, labels in ((x, y), (more_x, more_y)):
        seen = forward(rows, w, labels, compute)
        of_target = torch.linspace(-1, 1, 33, dtype=seen.lse.dtype)[: len(labels)] * (labels >= 0)
        dx, dw = backward(
            rows, w, labels, compute, seen, None, torch.zeros_like(of_target), of_target
        )
        results.append((dx[:32], dw))
    for scanned, is_sorted in zip(*results, strict=True):
        assert scanned.any() and torch.equal(scanned, is_sorted)
