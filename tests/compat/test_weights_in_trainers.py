# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests what trainers do with weights that are kept as (D, C): optimizers, wrappers, files."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import marginkernels.optim
from marginkernels import CosFace
from marginkernels.compat.weights import FusedHead
from tests.support import workers

C, D, N, STEPS = 11, 6, 8, 3


class Rows(FusedHead):
    """Keeps its weights as (C, D) under the usual name."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        setattr(self, self.weight_name, nn.Parameter(self.drawn(generator)))

    def drawn(self, generator):
        return torch.randn(C, D, generator=generator)

    def forward(self, embeddings, labels):
        return self.fused_loss(embeddings, labels, margin=CosFace(0.3), scale=16.0)


class Columns(Rows):
    """Keeps the same weights as (D, C) under the name W."""

    weight_name, transposed = "W", True

    def drawn(self, generator):
        return super().drawn(generator).t()


def batches():
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        yield torch.randn(N, D, generator=generator), torch.randint(C, (N,), generator=generator)


def trained(model, optimizer, rows=slice(None)):
    """Takes a step on some rows of each batch, and returns the losses."""
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        losses.append(model(x[rows], y[rows]))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


FUSED = {
    "SGD": dict(lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": dict(lr=0.1),
    "RowwiseAdagrad": dict(lr=0.1),
}


@pytest.mark.parametrize("name", FUSED)
def test_the_step_inside_backward_is_bit_for_bit_that_of_rows(name):
    heads = Rows(), Columns()
    optimizers = [getattr(marginkernels.optim, name)(head, **FUSED[name]) for head in heads]
    by_rows, by_columns = (trained(*pair) for pair in zip(heads, optimizers, strict=True))
    assert torch.equal(by_rows, by_columns)
    assert torch.equal(heads[0].weight, heads[1].W.t()) and heads[1].W.grad is None
    of_rows, of_columns = (next(iter(optimizer.state.values())) for optimizer in optimizers)
    for key, value in of_rows.items():
        assert torch.equal(value, of_columns[key].t())
    again = getattr(marginkernels.optim, name)(copy.deepcopy(heads[1]), **FUSED[name])
    again.load_state_dict(optimizers[1].state_dict())
    assert torch.equal(trained(again.update.head, again), trained(heads[1], optimizers[1]))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_state_of_torch_optim_loads_and_goes_back(name):
    heads = Columns(), Columns()
    theirs = getattr(torch.optim, name)(heads[0].parameters(), **FUSED[name])
    trained(heads[0], theirs)
    heads[1].load_state_dict(heads[0].state_dict())
    ours = getattr(marginkernels.optim, name)(heads[1], **FUSED[name])
    ours.load_state_dict(theirs.state_dict())
    trained(heads[0], theirs)
    trained(heads[1], ours)
    torch.testing.assert_close(heads[0].W, heads[1].W)
    back = getattr(torch.optim, name)(heads[0].parameters(), **FUSED[name])
    back.load_state_dict(ours.state_dict())
    for key, value in ours.state[heads[1].W].items():
        if torch.is_tensor(value) and value.ndim:
            kept = back.state[heads[0].W][key]
            assert torch.equal(value, kept) and value.stride() == heads[0].W.stride()


def test_errors_of_an_optimizer_name_the_parameter():
    head = Columns()
    optimizer = marginkernels.optim.SGD(head, lr=0.1)
    head.W.data = head.W.data.contiguous()
    with pytest.raises(RuntimeError, match=r"^head\.W: .*contiguous rows.*\.t\(\)\.contiguous"):
        trained(head, optimizer)
    head.W.data = head.W.data.t().contiguous().t()
    trained(head, optimizer)


def alone():
    """Returns the weights after training without other ranks."""
    head = Columns()
    trained(head, torch.optim.SGD(head.parameters(), lr=0.1))
    return head.W.detach()


def in_ddp():
    head = DistributedDataParallel(Columns())
    half = slice(dist.get_rank(), None, 2)
    trained(head, torch.optim.SGD(head.parameters(), lr=0.1), half)
    assert head.module.rows().is_contiguous()
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        marginkernels.optim.SGD(head.module, lr=0.1)
    return head.module.W.detach()


def fully_sharded():
    head, mesh = Columns(), dist.init_device_mesh("cpu", (2,))
    with pytest.raises(NotImplementedError, match="non-contiguous"):
        fully_shard(Columns(), mesh=mesh)
    head.W.data = head.W.data.contiguous()
    fully_shard(head, mesh=mesh)
    half = slice(dist.get_rank(), None, 2)
    trained(head, torch.optim.SGD(head.parameters(), lr=0.1), half)
    return head.W.full_tensor().detach()


@pytest.mark.parametrize("wrapped", [in_ddp, fully_sharded])
def test_two_ranks_train_what_one_does(wrapped):
    for weight in workers.run(2, wrapped):
        torch.testing.assert_close(weight, alone())


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_torch_optim_steps_as_on_contiguous_columns(name, how):
    head, w = Columns(), nn.Parameter(Columns().W.detach().contiguous())
    make = getattr(torch.optim, name)
    optimizers = [make([p], **FUSED[name], **{how: True}) for p in (head.W, w)]
    for x, y in batches():
        head.W.grad = None
        head(x, y).backward()
        w.grad = head.W.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(head.W, w, rtol=1e-6, atol=1e-7)  # vectors end elsewhere
    assert head.rows().is_contiguous()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_gradient_in_another_order_is_paired_with_its_weights(name):
    heads = Columns(), Columns()
    optimizers = [
        getattr(torch.optim, name)([head.W], **FUSED[name], fused=fused)
        for head, fused in zip(heads, (True, False), strict=True)
    ]
    for x, y in batches():
        for head, optimizer in zip(heads, optimizers, strict=True):
            optimizer.zero_grad()
            head(x, y).backward()
            head.W.grad = head.W.grad.contiguous()
            optimizer.step()
    torch.testing.assert_close(heads[0].W, heads[1].W)


def test_copies_averages_loss_scaling_and_torch_compile():
    head, (x, y) = Columns(), next(batches())
    average = AveragedModel(head)
    for _ in range(2):
        average.update_parameters(head)
    for copied in (average.module, pickle.loads(pickle.dumps(head))):
        assert torch.equal(copied.W, head.W) and copied.rows().is_contiguous()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    compiled, scaled = torch.compile(copy.deepcopy(head), backend="aot_eager"), copy.deepcopy(head)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    scaler.scale(scaled(x, y)).backward()
    scaler.step(optimizer)
    for model in (head, compiled):
        model(x, y).backward()
    torch.testing.assert_close(compiled.W.grad, head.W.grad)
    torch.testing.assert_close(scaled.W, head.W - 0.1 * head.W.grad)


def test_safetensors_takes_the_model_and_says_what_a_dictionary_lacks(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    head, again = Columns(), Columns()
    with pytest.raises(ValueError, match=r"`W`.*\.contiguous\(\)"):
        safetensors.save_file(head.state_dict(), tmp_path / "refused")
    contiguous = {name: t.contiguous() for name, t in head.state_dict().items()}
    safetensors.save_file(contiguous, tmp_path / "dictionary")
    safetensors.save_model(head, str(tmp_path / "model"))
    nn.init.zeros_(again.W)
    again.load_state_dict(safetensors.load_file(tmp_path / "dictionary"))
    assert torch.equal(again.W, head.W) and again.rows().is_contiguous()
    nn.init.zeros_(again.W)
    safetensors.load_model(again, str(tmp_path / "model"))
    assert torch.equal(again.W, head.W) and head.rows().is_contiguous()
