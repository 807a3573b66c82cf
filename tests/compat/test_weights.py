# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests class weights that are kept as (D, C)."""

import copy
import io

import pytest
import torch
from torch import nn

from marginkernels import CosFace, margin_cross_entropy
from marginkernels.compat.weights import FusedHead

C, D = 11, 6


class Columns(FusedHead):
    """Keeps its weights as (D, C) under the name W."""

    weight_name, transposed = "W", True

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(D, C))

    def forward(self, embeddings, labels):
        return self.fused_loss(embeddings, labels, margin=CosFace(0.3), scale=16.0)


def batch(n=9):
    return torch.randn(n, D), torch.randint(C, (n,))


def test_the_parameter_is_a_view_of_rows_and_trains_as_a_copy_would():
    torch.manual_seed(0)
    head = Columns()
    assert head.W.shape == (D, C) and head.rows().is_contiguous()
    assert head.rows().data_ptr() == head.W.data_ptr()
    w = nn.Parameter(head.W.detach().t().clone())
    optimizers = [torch.optim.AdamW([p], lr=0.1) for p in (head.W, w)]
    for _ in range(3):
        x, y = batch()
        losses = head(x, y), margin_cross_entropy(x, w, y, margin=CosFace(0.3), scale=16.0)
        assert torch.equal(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.equal(head.W.grad, w.grad.t()) and head.W.grad.stride() == head.W.stride()
    torch.testing.assert_close(head.W, w.t())
    assert head.rows().is_contiguous()


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_either_order_load_and_rows_stay_contiguous(assign):
    head, value = Columns(), torch.randn(D, C)
    head.load_state_dict({"W": value.clone()}, assign=assign)
    assert torch.equal(head.W, value) and head.rows().is_contiguous()
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    again = Columns()
    again.load_state_dict(torch.load(file), assign=assign)
    for other in (again, copy.deepcopy(head), head.double(), head.to(torch.bfloat16)):
        assert other.rows().is_contiguous() and other.W.shape == (D, C)
    assert torch.equal(again.W, value)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first, then", [(False, True), (True, False), (True, True)])
def test_optimizers_go_on_from_a_state_of_either_order(first, then, fused):
    def train(by_columns, value, gradients, state=None):
        p = nn.Parameter(value.clone(memory_format=torch.contiguous_format))
        if by_columns:
            head = Columns()
            head.W = p
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
        if state is not None:
            optimizer.load_state_dict(state)
        for gradient in gradients:
            p.grad = torch.empty_like(p).copy_(gradient)
            optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        return p.detach(), torch.load(file)

    value, gradients = torch.randn(D, C), torch.randn(4, D, C)
    expected, _ = train(False, value, gradients)
    half, state = train(first, value, gradients[:2])
    torch.testing.assert_close(train(then, half, gradients[2:], state)[0], expected)


def test_a_label_that_is_no_class_is_an_error_and_not_left_out():
    head, (x, y) = Columns(), batch()
    y[2] = -100
    with pytest.raises(ValueError, match=r"y: expected labels in \[0, 11\), got -100 in row 2"):
        head(x, y)
    assert head.fused_loss(x, y, margin=CosFace(0.3), scale=16.0, ignore_index=-100).isfinite()
