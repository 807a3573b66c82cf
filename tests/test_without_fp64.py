# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that fp32 input makes no fp64 tensor, so that devices without fp64 (MPS) run all losses."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marginkernels import AdaCos, NSoftmax, PartialFC, TripletLoss, margin_cross_entropy
from marginkernels.backends import reference
from tests.support.losses import LOSSES, C, fused, operands, solve


class NoFloat64(TorchDispatchMode):
    """Fails on an op that makes an fp64 tensor, which a device may not have."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("marginkernels::")
        if name in ("head_fwd_reference", "head_bwd_reference"):  # look at the ops inside too
            with self:
                out = getattr(reference, name.removesuffix("_reference"))(*args, **kwargs)
        else:
            out = op(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            assert not isinstance(t, torch.Tensor) or t.dtype != torch.float64, f"{op} makes fp64"
        return out


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_needs_no_fp64(name, backend, device):
    x, w, y = (t.to(device) for t in operands(dtype=torch.float32))
    margin = LOSSES[name].make().to(device)
    loss = replace(LOSSES[name], make=lambda: margin)
    settings = loss.accepted(label_smoothing=0.1, z_loss=0.01, focal_gamma=2.0, backend=backend)
    with NoFloat64():
        solve(lambda x, w: fused(loss, x, w, y, **settings), x, w)


def test_fp32_needs_no_fp64_around_the_losses(device):
    x, w, y = (t.to(device) for t in operands(dtype=torch.float32))
    each = [
        dict(scale=AdaCos(C).to(device)),
        dict(scale=16.0, sampling=PartialFC(0.7, logq=True)),
        dict(scale=16.0, normalize="weight", bias=torch.ones(C, device=device)),
    ]
    with NoFloat64():
        for settings in each:
            leaf = x.clone().requires_grad_()
            loss, _ = margin_cross_entropy(
                leaf, w, y, margin=NSoftmax(), return_stats=True, **settings
            )
            (loss + TripletLoss()(leaf, y)).backward()
