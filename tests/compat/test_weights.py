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
