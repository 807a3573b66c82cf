# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Gives the classes new numbers, and looks for what did not go along with them."""

import pytest
import torch
from torch import nn

from marginkernels.convert import convert
from marginkernels.distributed.checkpoint import load_checkpoint
from tests.support.trained import C, D, Trainer, loaded, same, weights


@pytest.fixture
def reversal(tmp_path):
    """Returns the options that put the classes in the opposite order."""
    torch.save(torch.arange(C).flip(0), tmp_path / "table.pt")
    return {"classes": tmp_path / "table.pt"}


def trained(groups):
    """Returns a layer with a bias, and the state of its optimizer with these groups."""
    layer = nn.Linear(D, C)
    optimizer = torch.optim.SGD(groups(layer), lr=0.1, momentum=0.9, weight_decay=0.01)
    layer(weights()).square().sum().backward()
    optimizer.step()
    return layer, optimizer.state_dict()


def no_decay(layer):
    return [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}]


@pytest.mark.parametrize(
    "groups, weight, bias",
    [
        (lambda layer: layer.parameters(), 0, 1),
        (lambda layer: [layer.bias, layer.weight], 1, 0),
        (no_decay, 0, 1),
    ],
)
def test_momentum_of_the_bias_goes_along_wherever_it_stands(
    tmp_path, reversal, groups, weight, bias
):
    layer, optimizer = trained(groups)
    tree = {"head": layer.state_dict(), "optimizer": optimizer}
    torch.save(tree, tmp_path / "in.pt")
    convert([tmp_path / "in.pt"], tmp_path / "out.pt", "marginkernels", **reversal)
    out = loaded(tmp_path / "out.pt")
    assert torch.equal(out["head"]["bias"], layer.bias.flip(0))
    for index in (weight, bias):
        old = optimizer["state"][index]["momentum_buffer"]
        assert torch.equal(out["optimizer"]["state"][index]["momentum_buffer"], old.flip(0))
    assert out["optimizer"]["param_groups"] == optimizer["param_groups"]


def test_a_bias_without_weight_decay_has_none_in_another_format_either(tmp_path):
    layer, optimizer = trained(no_decay)
    torch.save({"head": layer.state_dict(), "optimizer": optimizer}, tmp_path / "in.pt")
    convert([tmp_path / "in.pt"], tmp_path / "folder", "distributed")
    other = nn.Linear(D, C)
    loaded_into = torch.optim.SGD(no_decay(other), lr=0.3, weight_decay=0.5)
    load_checkpoint(tmp_path / "folder", other, loaded_into)
    assert same(loaded_into.state_dict(), optimizer)
    convert([tmp_path / "folder"], tmp_path / "back.pt", "marginkernels")
    assert same(loaded(tmp_path / "back.pt")["optimizer"], optimizer)


def unclear(case):
    """Returns a checkpoint in which a state may be the classes', or another parameter's."""
    layer, optimizer = trained(no_decay)
    tree = {"head": layer.state_dict(), "optimizer": optimizer}
    if case == "a bias without state":
        del optimizer["state"][1]
    elif case == "two states of the bias's shape":
        optimizer["state"][2] = optimizer["state"][1]
        optimizer["param_groups"][0]["params"].append(2)
    else:  # the state is the backbone's
        tree = {"head": {"weight": weights()}, "backbone": {"fc": layer.weight.data}}
        del optimizer["state"][1]
        tree["optimizer"] = optimizer
    return tree


@pytest.mark.parametrize(
    "case, text",
    [
        ("a bias without state", r"classes' bias, \(21,\), got 0"),
        ("two states of the bias's shape", r"classes' bias, \(21,\), got 2"),
        ("a layer of the weight's shape", r"weight, \(21, 6\), got 1, and backbone.fc"),
    ],
)
def test_state_that_may_be_another_parameters_is_refused(tmp_path, reversal, case, text):
    torch.save(unclear(case), tmp_path / "in.pt")
    arguments = [tmp_path / "in.pt"], tmp_path / "out.pt", "marginkernels"
    with pytest.raises(ValueError, match=rf"{text}.*--drop-state"):
        convert(*arguments, **reversal)
    lines = convert(*arguments, **reversal, drop_state=True)
    assert any(line.startswith("optimizer state left out: optimizer.state.0") for line in lines)
    assert not loaded(tmp_path / "out.pt")["optimizer"]["state"]


def test_what_has_a_number_for_each_class_is_named_and_tied_weights_go_along(tmp_path, reversal):
    w = weights()
    head = {"head.weight": w, "head.count": torch.arange(C), "ema.weight": w.clone(), "fc": w}
    torch.save({"state_dict": head, "epoch": 3}, tmp_path / "in.pt")
    lines = convert([tmp_path / "in.pt"], tmp_path / "out.pt", "marginkernels",
                    key="state_dict.head.weight", **reversal)  # fmt: skip
    out = loaded(tmp_path / "out.pt")["state_dict"]
    new = head | {"head.weight": w.flip(0), "fc": w.flip(0)}
    assert same(out, new)
    named = [line for line in lines if line.startswith("look at")]
    assert [line.split()[2] for line in named] == ["state_dict.head.count", "state_dict.ema.weight"]


@pytest.mark.parametrize(
    "rest",
    [
        torch._neg_view(torch.arange(3.0)),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.arange(3.0)[:, None].expand(3, 4),
        torch.arange(3.0).expand(4, 3).t(),
        torch.empty(0, 3),
    ],
)
def test_views_that_are_carried_along_keep_their_values(tmp_path, rest):
    torch.save({"weight": weights(), "rest": rest}, tmp_path / "in.pt")
    convert([tmp_path / "in.pt"], tmp_path / "out.pt", "marginkernels")
    assert torch.equal(loaded(tmp_path / "out.pt")["rest"], rest)


def test_state_without_a_place_is_said_to_be_dropped_and_not_to_be_written(tmp_path):
    [file] = Trainer().steps(1, seed=1).save(tmp_path, 1)
    lines = convert([file], tmp_path / "loss.pt", "metric-learning")
    assert any("dropped: the optimizer's state" in line for line in lines)
    assert any(line.endswith("with no optimizer state") for line in lines)
