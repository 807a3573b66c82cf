# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Saves and loads the state of optimizers that move the head inside backward."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_checkpoint import all_classes, run
from torch.nn.parallel import DistributedDataParallel

from marginkernels import CosFace, MarginSoftmaxHead, optim
from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint
from tests.support.sharding import my_rows

N, C, D = 12, 7, 4
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
OWN = {
    "SGD": (optim.SGD, dict(lr=0.5, momentum=0.9, weight_decay=1e-2)),
    "AdamW": (optim.AdamW, dict(lr=0.05, weight_decay=0.1)),
    "RowwiseAdagrad": (optim.RowwiseAdagrad, dict(lr=0.1)),
}


def make(name, seed=0, kind="ours", head_optimizer=None, own=None, **settings):
    """Makes a model, and the optimizers of the backbone and of the head.

    Sums are in float64, so that bfloat16 is rounded alike on any number of ranks.
    """
    torch.manual_seed(seed)
    if kind == "insightface":
        head = PartialFC_V2(CombinedMarginLoss(8.0, 1.0, 0.0, 0.3), D, C, backend="reference")
    else:
        group = dist.group.WORLD if dist.is_initialized() else None
        settings = dict(dtype=F64) | settings
        head = MarginSoftmaxHead(
            D, C, margin=CosFace(0.3), scale=8.0, sharding=group, backend="reference", **settings
        )
    backbone = torch.nn.Linear(3, D).double()
    if dist.is_initialized():
        backbone = DistributedDataParallel(backbone)
    model = torch.nn.ModuleDict({"backbone": backbone, "head": head})
    if head_optimizer is not None:
        return model, [head_optimizer([*backbone.parameters(), *head.parameters()])]
    kind, rule = OWN[name]
    rest = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    return model, [rest, kind(head, **rule, **(own or {}))]


def train(model, optimizers, seeds):
    """Takes a step for each seed, on this rank's part of the batch, and returns the losses."""
    losses = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        views = torch.randn(N, 3, generator=generator, dtype=F64)
        labels = torch.randint(C, (N,), generator=generator)
        if dist.is_initialized():
            rows = my_rows(N, even=True)
            views, labels = views[rows], labels[rows]
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model["head"](model["backbone"](views), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def found(model, optimizers):
    """Collects the head's weights and bias, and their states and settings, of all classes."""
    head, optimizer = model["head"], optimizers[-1]
    parts = {key: all_classes(head, p.detach()).clone() for key, p in head.named_parameters()}
    for key, p in head.named_parameters():
        for name, value in optimizer.state[p].items():
            parts[f"{key} {name}"] = (all_classes(head, value) if value.ndim else value).clone()
    return parts


def train_and_save(path, *made, **settings):
    model, optimizers = make(*made, **settings)
    train(model, optimizers, range(3))
    save_checkpoint(path, model, optimizers)
    saved, seed = found(model, optimizers), optimizers[-1].param_groups[0].get("seed")
    return saved, seed, train(model, optimizers, (3, 4)), found(model, optimizers)


def load_and_train(path, *made, **settings):
    model, optimizers = make(*made, seed=99, **settings)
    train(model, optimizers, (7,))
    load_checkpoint(path, model, optimizers)
    loaded, seed = found(model, optimizers), optimizers[-1].param_groups[0].get("seed")
    return loaded, seed, train(model, optimizers, (3, 4)), found(model, optimizers)


def called(world, function, *args, **settings):
    return run(world, with_settings, function, args, settings)


def with_settings(function, args, settings):
    return function(*args, **settings)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("name", OWN)
def test_a_run_in_bfloat16_goes_on_with_the_same_bits_on_another_number_of_ranks(
    name, before, after, tmp_path
):
    path = str(tmp_path / "saved")
    settings = dict(dtype=BF16, bias=True, own=dict(state_dtype=BF16))
    saved = called(before, train_and_save, path, name, **settings)
    loaded = called(after, load_and_train, path, name, **settings)
    assert saved[0].keys() == loaded[0].keys() and saved[0]["weight step"] == 3
    for ours, theirs in zip(loaded, saved, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OWN)
def test_weights_and_states_are_loaded_into_other_types(name, tmp_path):
    wide, narrow = dict(dtype=F32), dict(dtype=BF16, own=dict(state_dtype=BF16))
    saved = train_and_save(tmp_path / "wide", name, **wide)[0]
    loaded = train_and_save(tmp_path / "narrow", name, **narrow)[0]
    for path, given, settings in (("wide", saved, narrow), ("narrow", loaded, wide)):
        model, optimizers = make(name, seed=9, **settings)
        types = {key: t.dtype for key, t in found(model, optimizers).items()}
        load_checkpoint(tmp_path / path, model, optimizers)
        now = found(model, optimizers)
        assert {key: t.dtype for key, t in now.items()} == types
        expected = {key: given[key].to(kind) for key, kind in types.items()}
        torch.testing.assert_close(now, expected, rtol=0, atol=0)
        train(model, optimizers, (3,))


OF_TORCH = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.5, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.1),
}


def one_kind(name, path, ours_first):
    """Trains with torch's and with ours in turn, beside a run with torch's alone."""
    rest, (kind, rule) = OF_TORCH[name], OWN[name]
    runs = []
    for fused in (ours_first, not ours_first, None):
        model, _ = make("SGD", seed=len(runs), bias=True, head_optimizer=rest)
        optimizers = [rest(model.parameters())]
        if fused:
            settings = dict(lr=9.0) if runs else rule  # which the checkpoint has
            optimizers = [rest(model["backbone"].parameters()), kind(model["head"], **settings)]
        runs.append((model, optimizers))
    first, then, alone = runs
    alone[0].load_state_dict(first[0].state_dict())
    losses = train(*first, range(3))
    save_checkpoint(path, *first)
    load_checkpoint(path, *then)
    losses += train(*then, (3, 4))
    torch.testing.assert_close(losses, train(*alone, range(5)))
    expected, got = found(*alone), found(*then)
    shared = expected.keys() & got.keys()
    torch.testing.assert_close({k: got[k] for k in shared}, {k: expected[k] for k in shared})
    assert expected.keys() ^ got.keys() <= {"weight step", "bias step"}  # torch's SGD has none


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("name", OF_TORCH)
def test_a_run_changes_over_between_torchs_optimizers_and_ours(name, ours_first, world, tmp_path):
    run(world, one_kind, name, str(tmp_path / "saved"), ours_first)


@pytest.mark.parametrize("name", ["SGD", "RowwiseAdagrad"])
@pytest.mark.parametrize("kinds, worlds", [(("insightface", "ours"), (3, 2)),
                                           (("ours", "insightface"), (2, 3))])  # fmt: skip
def test_states_move_between_our_head_and_insightfaces(name, kinds, worlds, tmp_path):
    path, dtype = str(tmp_path / "saved"), dict(dtype=F32)
    saved = called(worlds[0], train_and_save, path, name, kind=kinds[0], **dtype)
    loaded = called(worlds[1], load_and_train, path, name, kind=kinds[1], **dtype)
    assert loaded[0].keys() == saved[0].keys()
    torch.testing.assert_close(loaded[:2], saved[:2], rtol=0, atol=0)
    torch.testing.assert_close(loaded[2:], saved[2:])


OTHERS = {
    "adam": (lambda ps: torch.optim.Adam(ps, lr=0.1), "AdamW", r"\['decoupled_weight_decay'\]"),
    "maximize": (lambda ps: torch.optim.SGD(ps, lr=0.1, maximize=True), "SGD", r"\['maximize'\]"),
    "adagrad": (lambda ps: torch.optim.Adagrad(ps, lr=0.1), "RowwiseAdagrad", "weight .*sum"),
    "sgd": (lambda ps: torch.optim.SGD(ps, lr=0.1), "AdamW", r"without \['betas', 'eps'\]"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_rule_is_refused_before_anything_changes(name, tmp_path):
    of_torch, own, match = OTHERS[name]
    model, optimizers = make(own, head_optimizer=of_torch)
    train(model, optimizers, range(2))
    save_checkpoint(tmp_path / "saved", model, optimizers)
    model, (_, optimizer) = make(own, seed=1)
    train(model, [optimizer], range(1))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    with pytest.raises(ValueError, match=rf"optimizer: expected .*{match}"):
        load_checkpoint(tmp_path / "saved", model, [optimizer])
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()], before)


def test_a_projected_run_does_not_go_on_with_an_optimizer_that_does_not_project(tmp_path):
    model, optimizers = make("SGD", own=dict(project=True))
    save_checkpoint(tmp_path / "saved", model, optimizers)
    model, optimizers = make("SGD", head_optimizer=OF_TORCH["SGD"])
    optimizers = [OF_TORCH["SGD"](model["head"].parameters())]
    with pytest.raises(ValueError, match=r"optimizer: expected one with \['project'\]"):
        load_checkpoint(tmp_path / "saved", model, optimizers)


def test_a_parameter_in_two_optimizers_is_refused(tmp_path):
    model, optimizers = make("SGD")
    optimizers.append(torch.optim.SGD(model["backbone"].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer: .* got backbone\.weight in more"):
        save_checkpoint(tmp_path / "saved", model, optimizers)


def test_the_heads_own_optimizer_is_not_left_out(tmp_path):
    model, optimizers = make("SGD")
    save_checkpoint(tmp_path / "saved", model, optimizers)
    for act, name in ((save_checkpoint, "new"), (load_checkpoint, "saved")):
        with pytest.raises(ValueError, match=r"optimizer: .* none of marginkernels.optim for head"):
            act(tmp_path / name, model, optimizers[0])


def save_plain(path):
    model, optimizers = make("RowwiseAdagrad", bias=True)
    train(model, optimizers, range(2))
    head, optimizer = model["head"], optimizers[-1]
    dcp.save({"head": head.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=path)
    return head.full_state_dict(), found(model, optimizers)


def load_plain(path):
    model, optimizers = make("RowwiseAdagrad", seed=9, bias=True)
    head, optimizer = model["head"], optimizers[-1]
    state = {"head": head.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=path)
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    return head.full_state_dict(), found(model, optimizers)


def test_torchs_checkpoints_of_plain_state_dicts(tmp_path):
    saved, loaded = (run(w, f, str(tmp_path)) for w, f in ((3, save_plain), (2, load_plain)))
    assert list(saved[0]) == ["weight", "bias"]
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)


def save_within_a_step(path):
    model, optimizers = make("SGD")
    with optimizers[1].accumulate():
        model["head"](model["backbone"](torch.ones(2, 3, dtype=F64)), torch.arange(2)).backward()
    with pytest.raises(RuntimeError, match="head_optimizer: expected no step under way"):
        save_checkpoint(path, model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_between_backward_and_step_is_refused(world, tmp_path):
    run(world, save_within_a_step, str(tmp_path / "saved"))
    assert not list(tmp_path.iterdir())
