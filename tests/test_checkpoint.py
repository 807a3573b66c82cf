# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Moves checkpoints between world sizes and kinds of heads."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from marginkernels import ArcFace, CosFace, CurricularFace, MarginSoftmaxHead, PartialFC
from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint
from tests.support import workers

N, C, D = 12, 7, 4
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP2": fully_shard,
    "compile": lambda module: torch.compile(module, backend="eager"),
}


def make(kind, seed, wrapper="DDP", **settings):
    """Makes a model and an optimizer. The wrapper is put around the backbone.

    Wrappers that need a group are left out where there is none.
    """
    torch.manual_seed(seed)
    group = dist.group.WORLD if dist.is_initialized() else None
    settings = dict(margin=CosFace(0.3), scale=8.0, sharding=group) | settings
    backbone = torch.nn.Linear(3, D)
    if group is not None or wrapper == "compile":
        backbone = WRAPPERS[wrapper](backbone)
    model = torch.nn.ModuleDict({"backbone": backbone, "head": MarginSoftmaxHead(D, C, **settings)})
    return model, OPTIMIZERS[kind](model.parameters())


def step(model, optimizer, seed, num_classes=C):
    """Trains on this rank's part of the batch of a seed, and returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(N, 3, generator=generator)
    labels = torch.randint(num_classes, (N,), generator=generator)
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        views, labels = views.chunk(world)[rank], labels.chunk(world)[rank]
    loss = model["head"](model["backbone"](views), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def plain(name):
    return name.replace("module.", "").replace("_orig_mod.", "")


def state(model, optimizer):
    """Collects everything that has to be the same, whatever the number of ranks."""
    names = {p: plain(name) for name, p in model.named_parameters()}
    found = {plain(name): whole(t.detach()).clone() for name, t in model.state_dict().items()}
    for p, values in optimizer.state.items():
        for key, value in values.items():
            found[f"{names[p]} {key}"] = whole(value).clone()
    return found | {"lr": optimizer.param_groups[0]["lr"]}


def train_and_save(kind, path, settings):
    model, optimizer = make(kind, 0, **settings)
    for seed in range(3):
        step(model, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 0.03
    save_checkpoint(path, model, optimizer)
    saved = state(model, optimizer)
    return saved, [step(model, optimizer, seed) for seed in (3, 4)]


def load_and_train(kind, path, settings):
    model, optimizer = make(kind, 99, **settings)
    load_checkpoint(path, model, optimizer)
    return state(model, optimizer), [step(model, optimizer, seed) for seed in (3, 4)]


def run(world, function, *args):
    return function(*args) if world == 1 else workers.run(world, function, *args)[0]


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("sgd", dict(margin=CurricularFace(0.3))),
        ("adamw", dict(margin=ArcFace(0.2), bias=True)),
        ("sgd", dict(margin=CosFace(0.2), sampling=PartialFC(0.5))),
    ],
    ids=["sgd", "adamw", "sampled"],
)
@pytest.mark.parametrize("before, after", [(3, 2), (3, 1), (1, 2)])
def test_state_moves_between_world_sizes(before, after, kind, settings, tmp_path):
    path = str(tmp_path / "step_3")
    saved, losses = run(before, train_and_save, kind, path, settings)
    loaded, others = run(after, load_and_train, kind, path, settings)
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
    if "sampling" in settings:  # each rank draws a sample, from one state
        assert saved["head.sampler._extra_state"][1] == 3
    else:
        torch.testing.assert_close(others, losses, rtol=1e-5, atol=0)
    assert os.listdir(tmp_path) == ["step_3"]
    assert "path: expected a new directory" in run(after, save_there, kind, path, settings)


@pytest.mark.parametrize(
    "before, after", [(("FSDP2", 3), ("compile", 1)), (("compile", 1), ("DDP", 2)),
                      (("DDP", 2), ("FSDP2", 3))]
)  # fmt: skip
def test_wrappers_leave_no_trace(before, after, tmp_path):
    path = str(tmp_path / "saved")
    saved, losses = run(before[1], train_and_save, "adamw", path, dict(wrapper=before[0]))
    loaded, others = run(after[1], load_and_train, "adamw", path, dict(wrapper=after[0]))
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)
    torch.testing.assert_close(others, losses, rtol=1e-5, atol=0)


def save_there(kind, path, settings):
    with pytest.raises(FileExistsError) as error:
        save_checkpoint(path, *make(kind, 99, **settings))
    return str(error.value)


def test_torch_reads_it_too(tmp_path):
    saved, _ = train_and_save("sgd", tmp_path / "whole", {})
    model, _ = make("sgd", 99)
    weight = {"model": {"head.weight": model["head"].weight.detach()}}
    dcp.load(weight, checkpoint_id=tmp_path / "whole", no_dist=True)
    assert torch.equal(model["head"].weight, saved["head.weight"])


def make_with(head, seed):
    torch.manual_seed(seed)
    if head == "compat":
        made = PartialFC_V2(CombinedMarginLoss(8.0, 1.0, 0.0, 0.3), D, C)
    else:
        group = dist.group.WORLD if dist.is_initialized() else None
        made = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0, sharding=group)
    backbone = torch.nn.Linear(3, D)
    if dist.is_initialized():
        backbone = DistributedDataParallel(backbone)
    model = torch.nn.ModuleDict({"backbone": backbone, "head": made})
    return model, OPTIMIZERS["sgd"](model.parameters())


def all_classes(head, tensor):
    """Gathers the rows of all ranks of a tensor like the weight."""
    if hasattr(tensor, "full_tensor") or not dist.is_initialized():
        return whole(tensor)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, tensor)
    return torch.cat(every)


def weight_and_momentum(model, optimizer):
    weight = model["head"].weight
    momentum = optimizer.state[weight]["momentum_buffer"]
    return [all_classes(model["head"], t.detach()) for t in (weight.clone(), momentum.clone())]


def train_and_save_with(head, path):
    model, optimizer = make_with(head, 0)
    for seed in range(2):
        step(model, optimizer, seed)
    save_checkpoint(path, model, optimizer)
    return weight_and_momentum(model, optimizer), step(model, optimizer, 3)


def load_and_train_with(head, path, stepped):
    model, optimizer = make_with(head, 99)
    if stepped:
        step(model, optimizer, 7)
    load_checkpoint(path, model, optimizer)
    return weight_and_momentum(model, optimizer), step(model, optimizer, 3)


@pytest.mark.parametrize(
    "head, before, other, after",
    [
        ("compat", 3, "compat", 2),
        ("compat", 3, "compat", 1),
        ("compat", 3, "native", 2),
        ("compat", 4, "native", 1),
        ("native", 2, "compat", 3),
    ],
)
def test_classes_move_between_heads_and_world_sizes(head, before, other, after, tmp_path):
    """Loads into insightface's split, which has 3, 2, 2 of 7 classes where DTensor has 3, 3, 1."""
    path = str(tmp_path / "saved")
    saved, loss = run(before, train_and_save_with, head, path)
    for stepped in (False, True):
        loaded, same_loss = run(after, load_and_train_with, other, path, stepped)
        for ours, theirs in zip(loaded, saved, strict=True):
            assert ours.shape == (C, D)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)


def save_factored(path):
    model, _ = make_with("compat", 0)
    optimizer = torch.optim.Adafactor(model["head"].parameters())
    step(model, optimizer, 0)
    with pytest.raises(ValueError, match=r"optimizer: expected state of head\.weight.*col_var"):
        save_checkpoint(path, model, optimizer)


def test_state_that_cannot_be_split_is_refused(tmp_path):
    workers.run(3, save_factored, str(tmp_path / "saved"))
    assert not os.listdir(tmp_path)
