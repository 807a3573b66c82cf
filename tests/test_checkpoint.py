# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checkpoints between world sizes, interrupted and forged ones, and heads that get new classes."""

import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import workers
from marginkernels import ArcFace, CosFace, CurricularFace, MarginSoftmaxHead
from marginkernels.checkpoint import load_checkpoint, save_checkpoint

N, C, D = 12, 7, 4
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def make(kind, seed, **settings):
    """A model, an optimizer, and the group's part of a batch."""
    torch.manual_seed(seed)
    group = dist.group.WORLD if dist.is_initialized() else None
    settings = dict(margin=CosFace(0.3), scale=8.0, process_group=group) | settings
    backbone = torch.nn.Linear(3, D)
    if group is not None:
        backbone = DistributedDataParallel(backbone)
    model = torch.nn.ModuleDict({"backbone": backbone, "head": MarginSoftmaxHead(D, C, **settings)})
    return model, OPTIMIZERS[kind](model.parameters())


def step(model, optimizer, seed, num_classes=C):
    """On this rank's part of the batch of a seed; returns the loss."""
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


def state(model, optimizer):
    """Everything that is to be the same, whatever the number of ranks."""
    names = {p: name.replace("module.", "") for name, p in model.named_parameters()}
    found = {
        name.replace("module.", ""): whole(t.detach()).clone()
        for name, t in model.state_dict().items()
    }
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
        ("sgd", dict(margin=CosFace(0.2), sample_rate=0.5)),
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
    if "sample_rate" in settings:  # a sample is drawn by each rank, from one state
        assert saved["head.sampler._extra_state"][1] == 3
    else:
        torch.testing.assert_close(others, losses, rtol=1e-5, atol=0)
    assert not os.path.exists(path + ".partial")
    assert "path: expected a new directory" in run(after, save_there, kind, path, settings)


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


def save_and_die(folder):
    """Rank 1 is killed when its part of the second checkpoint has been written."""
    model, optimizer = make("sgd", 0)
    step(model, optimizer, 0)
    save_checkpoint(f"{folder}/first", model, optimizer)
    saved = state(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(saved, f"{folder}/expected.pt")
    else:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    step(model, optimizer, 1)
    save_checkpoint(f"{folder}/second", model, optimizer)


def test_an_interrupted_save_leaves_the_one_before(tmp_path):
    pool = workers.Pool(2, timeout=20)
    pool.start(save_and_die, str(tmp_path))
    (succeeded, trace), died = pool.outcomes()
    pool.kill()
    assert died == (False, None) and not succeeded and "save_checkpoint" in trace
    assert list((tmp_path / "second.partial").glob("*.distcp"))
    model, optimizer = make("sgd", 99)
    with pytest.raises(FileNotFoundError, match="path: expected a checkpoint"):
        load_checkpoint(tmp_path / "second", model, optimizer)
    load_checkpoint(tmp_path / "first", model, optimizer)
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)
    for name, value in state(model, optimizer).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    save_checkpoint(tmp_path / "second", model, optimizer)
    load_checkpoint(tmp_path / "second", model, optimizer)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["index", "settings"])
def test_loading_runs_no_code(part, tmp_path):
    model, optimizer = make("sgd", 0)
    step(model, optimizer, 0)
    path, trace = tmp_path / "forged", Payload(tmp_path / "trace")
    if part == "settings":
        optimizer.param_groups[0]["dampening"] = trace
    save_checkpoint(path, model, optimizer)
    if part == "index":
        (path / ".metadata").write_bytes(pickle.dumps(trace))
    reason = {"index": "unexpected pathlib.*in the index", "settings": "Weights only load failed"}
    with pytest.raises(dcp.api.CheckpointException, match=reason[part]):
        load_checkpoint(path, *make("sgd", 1))
    assert not trace.path.exists()


def load_and_extend(kind, path, k, init, settings):
    model, optimizer = make(kind, 99, **settings)
    load_checkpoint(path, model, optimizer)
    before = state(model, optimizer)
    model["head"].extend(k, init=init, optimizer=optimizer)
    after = state(model, optimizer)
    losses = [step(model, optimizer, seed, C + k) for seed in (5, 6)]
    return before, after, losses, state(model, optimizer)


@pytest.mark.parametrize("kind, k", [("sgd", 1), ("adamw", 4)])
def test_new_classes_for_a_live_head(kind, k, tmp_path):
    path, settings = str(tmp_path / "before"), dict(margin=CosFace(0.2), bias=True)
    train_and_save(kind, path, settings)
    init = torch.randn(k, D)
    alone, sharded = (run(w, load_and_extend, kind, path, k, init, settings) for w in (1, 3))
    for before, after, *_ in (alone, sharded):
        assert after.keys() == before.keys()
        for name, old in before.items():
            if isinstance(old, torch.Tensor) and name.startswith("head") and old.ndim > 0:
                new = init if name == "head.weight" else torch.zeros(k, *old.shape[1:])
                assert torch.equal(after[name], torch.cat([old, new])), name
            else:
                torch.testing.assert_close(after[name], old, rtol=0, atol=0)
    torch.testing.assert_close(sharded[2], alone[2], rtol=1e-5, atol=0)
    for name, value in alone[3].items():
        torch.testing.assert_close(sharded[3][name], value, msg=lambda m, n=name: f"{n}: {m}")


def random_rows():
    head = make("sgd", 0)[0]["head"]
    head.extend(200)
    held = head.weight.to_local()
    assert len(held) == head.shard.size and head.num_classes == head.shard.total == C + 200
    return whole(head.weight.detach())[C:]


def test_new_classes_start_at_random_and_apart():
    rows = workers.run(3, random_rows)[0]
    assert 0.008 < rows.std() < 0.012
    assert len(rows.unique(dim=0)) == 200


def test_what_extend_refuses():
    model, optimizer = make("sgd", 0, margin=ArcFace(torch.full((C,), 0.2)))
    head, weight = model["head"], model["head"].weight
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k: expected a positive integer, got"):
            head.extend(k)
    with pytest.raises(ValueError, match=rf"init: expected shape \(2, {D}\), got \(3, {D}\)"):
        head.extend(2, init=torch.zeros(3, D))
    with pytest.raises(ValueError, match="optimizer: expected one that holds the head's weight"):
        head.extend(2, optimizer=torch.optim.SGD(model["backbone"].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=f"margin: expected a table of {C + 2} classes, got {C}"):
        head.extend(2, optimizer=optimizer)
    assert head.weight is weight and head.num_classes == C
