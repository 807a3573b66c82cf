# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that a step does not wait for its device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marginkernels import AdaCos, ArcFace, MarginSoftmaxHead, NSoftmax, PartialFC, device_checks
from tests.support.losses import LOSSES, C, operands

# operators that read a value of a tensor on the host, or whose size depends on one
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}


class RefuseWaits(TorchDispatchMode):
    """Raises where an operator would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        assert name not in WAITS, f"{func} waits for the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [t for t in args[1] if t is not None and t.dtype == torch.bool]
            assert not masks, f"{func} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def heads():
    """Yields settings of a head for each loss, and for each option that has code of its own."""
    for name, loss in LOSSES.items():
        settings = dict(margin=loss.make(), scale=loss.scale, normalize=loss.normalize)
        yield name, settings
    arcface = dict(margin=ArcFace(), scale=16.0)
    yield "AdaCos", dict(margin=NSoftmax(), scale=AdaCos(C))
    yield "AdaCos delayed", dict(margin=NSoftmax(), scale=AdaCos(C, delayed=True))
    yield (
        "smoothing, z-loss, focal",
        arcface | dict(label_smoothing=0.1, z_loss=1e-3, focal_gamma=2.0, bias=True),
    )
    yield "table", dict(margin=ArcFace(torch.rand(C)), scale=torch.nn.Parameter(torch.tensor(8.0)))
    yield "sample", arcface | dict(sampling=PartialFC(0.5, logq=True))


HEADS = dict(heads())


@pytest.mark.parametrize("name", HEADS)
def test_a_step_does_not_wait_for_the_device(name, device, monkeypatch):
    monkeypatch.setattr(device_checks, "checks_values", lambda tensor: False)  # as on a GPU
    head = MarginSoftmaxHead(8, C, **HEADS[name]).to(device)
    x, _, y = (t.to(device) for t in operands(dtype=torch.float32))
    y[::7] = -100
    x.requires_grad_()
    weights = torch.rand(len(x), device=device)
    with RefuseWaits():
        loss, _ = head(x, y, sample_weight=weights, return_stats=True)
        loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
