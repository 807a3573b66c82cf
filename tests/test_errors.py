# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that bad input is refused with the argument's name, what was expected and what came."""

import pytest
import torch

from marginkernels import (
    CosFace,
    backends,
    margin_cross_entropy,
    set_device_checks,
)
from tests.support.backends import StandIn
from tests.support.bad_calls import BAD, C, D, N, operands


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case):
    change, error, words = BAD[case]
    arguments = operands()
    arguments.update(change(arguments))
    with pytest.raises(error) as raised:
        margin_cross_entropy(**arguments)
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


def test_values_on_an_accelerator_are_checked_on_request(device):
    if device == "cpu":
        pytest.skip("values on the CPU are always checked")
    changes = ("y too large", "x nan", "w nan", "scale tensor nan", "row_margin range")
    set_device_checks(True)
    try:
        for case in changes:
            change, error, _ = BAD[case]
            arguments = operands()
            arguments.update(change(arguments))
            tensors = {k: v.to(device) for k, v in arguments.items() if isinstance(v, torch.Tensor)}
            with pytest.raises(error):
                margin_cross_entropy(**(arguments | tensors))
    finally:
        set_device_checks(False)


def test_unavailable_backend_lists_all_reasons():
    expected = "'native' cannot run here: one reason; another reason"
    native = StandIn("native", "one reason", "another reason")
    with backends.registered(native), pytest.raises(RuntimeError, match=expected):
        margin_cross_entropy(**operands(), backend="native")


@pytest.mark.parametrize("normalize", ["both", "none"])
def test_second_derivatives_are_refused_and_first_ones_are_right(normalize, backend, device):
    """Covers gradients of chosen leaves too: autograd skips the nodes that lead to no such leaf."""
    x = torch.randn(N, D, device=device, requires_grad=True)
    w = torch.randn(C, D, device=device, requires_grad=True)
    scale = torch.tensor(8.0, device=device, requires_grad=True)
    y = torch.zeros(N, dtype=torch.int64, device=device)
    leaves = (x, w, scale)

    def loss(x=x, w=w, scale=scale):
        settings = dict(margin=CosFace(0.5), scale=scale, normalize=normalize, backend=backend)
        return margin_cross_entropy(x, w, y, **settings)

    expected = torch.autograd.grad(loss(), leaves)
    gradients = torch.autograd.grad(loss(), leaves, create_graph=True)
    assert all(map(torch.equal, gradients, expected))
    refused = pytest.raises(RuntimeError, match="no second derivative")
    for gradient in gradients:
        with refused:
            gradient.square().sum().backward(retain_graph=True)
        for leaf in leaves:
            with refused:
                torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)
    with refused:
        torch.autograd.functional.hessian(loss, x)
    with refused:
        torch.autograd.functional.vhp(loss, x, torch.ones_like(x))
