# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Saves every optimizer, which changes nothing, and loads all of its state or nothing."""

import copy
import warnings

import pytest
import torch

from marginkernels import CosFace, MarginSoftmaxHead, PartialFC
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint

C, D = 5, 4
CLASSES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
}
OPTIMIZERS = {
    name: (kind, {}) for name, kind in CLASSES.items() if name not in ("Optimizer", "LBFGS")
} | {
    "SGD, momentum": (torch.optim.SGD, dict(momentum=0.9)),
    "SGD, nesterov": (torch.optim.SGD, dict(momentum=0.9, nesterov=True)),
    "SGD, dampening": (torch.optim.SGD, dict(momentum=0.9, dampening=0.5)),
    "Adam, amsgrad": (torch.optim.Adam, dict(amsgrad=True)),
    "Adam, tensor lr": (torch.optim.Adam, dict(lr=torch.tensor(0.01), foreach=False)),
    "AdamW, fused": (torch.optim.AdamW, dict(fused=True)),
    "RMSprop, centered": (torch.optim.RMSprop, dict(momentum=0.5, centered=True)),
}


def make(name, seed=0, device="cpu"):
    torch.manual_seed(seed)
    kind, settings = OPTIMIZERS[name]
    head = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0)
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, D), "head": head}).to(device)
    parameters = [p for p in model.parameters() if p.ndim == 2 or name != "Muon"]
    return model, kind(parameters, **dict(dict(lr=0.01), **copy.deepcopy(settings)))


def give_gradients(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator).to(p.device)
        sparse = isinstance(optimizer, torch.optim.SparseAdam)
        p.grad = gradient.to_sparse() if sparse else gradient


def step(model, optimizer, seed):
    give_gradients(model, optimizer, seed)
    optimizer.step()


def everything(model, optimizer):
    gradients = {
        name: None if p.grad is None else p.grad.to_dense() for name, p in model.named_parameters()
    }
    found = [model.state_dict(), optimizer.state_dict(), gradients, torch.get_rng_state()]
    return copy.deepcopy(found)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("steps, gradients", [(0, False), (0, True), (2, True)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_run_and_a_loaded_one_go_on_as_an_undisturbed_one(
    name, steps, gradients, tmp_path, device
):
    model, optimizer = make(name, device=device)
    for seed in range(steps):
        step(model, optimizer, seed)
    optimizer.zero_grad()
    if gradients:
        give_gradients(model, optimizer, 7)
    before = everything(model, optimizer)
    undisturbed = copy.deepcopy((model, optimizer.state_dict()))
    save_checkpoint(tmp_path / "saved", model, optimizer)
    assert equal(everything(model, optimizer), before)
    runs = [(model, optimizer)]
    for other_steps in (0, 3):  # into an optimizer without state, and into one with another
        other, its_optimizer = make(name, seed=1, device=device)
        for seed in range(other_steps):
            step(other, its_optimizer, 10 + seed)
        if steps:
            give_gradients(other, its_optimizer, 8)
        gradients_before = everything(other, its_optimizer)[2:]
        load_checkpoint(tmp_path / "saved", other, its_optimizer)
        now = everything(other, its_optimizer)
        assert equal(now[:2], before[:2]) and equal(now[2:], gradients_before)
        runs.append((other, its_optimizer))
    for run in runs:
        for seed in (2, 3):
            step(*run, seed)
    expected, its_optimizer = make(name, device=device)
    if steps:
        expected.load_state_dict(undisturbed[0].state_dict())
        its_optimizer.load_state_dict(undisturbed[1])
    for seed in (2, 3):
        step(expected, its_optimizer, seed)
    for run in runs:
        assert equal(everything(*run)[:2], everything(expected, its_optimizer)[:2])


def test_lbfgs_is_refused_by_name(tmp_path):
    model = make("SGD")[0]
    optimizer = torch.optim.LBFGS(model.parameters())
    save_checkpoint(tmp_path / "saved", model)
    for act in (save_checkpoint, load_checkpoint):
        with pytest.raises(TypeError, match=r"optimizer: expected one .*, got LBFGS"):
            act(tmp_path / ("saved" if act is load_checkpoint else "new"), model, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def saved_partly(path, part, in_optimizer):
    """Saves after two steps in which a part was frozen, inside the optimizer or not."""
    model, _ = make("Adam")
    model[part].requires_grad_(False)
    parameters = [p for p in model.parameters() if in_optimizer or p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for seed in range(2):
        step(model, optimizer, seed)
        optimizer.zero_grad()
    save_checkpoint(path, model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("in_optimizer", [False, True])
@pytest.mark.parametrize("part", ["backbone", "head"])
def test_frozen_then_resumed(part, in_optimizer, tmp_path):
    """Resumes with a part that was frozen, and freezes a part that was trained."""
    _, optimizer = saved_partly(tmp_path / "saved", part, False)
    model, resumed = make("Adam", seed=1)
    step(model, resumed, 9)
    with pytest.warns(UserWarning, match=rf"no optimizer state of .*{part}\.weight.* afresh"):
        load_checkpoint(tmp_path / "saved", model, resumed)
    trained = [p for name, p in model.named_parameters() if not name.startswith(part)]
    assert set(resumed.state) == set(trained)
    assert equal([resumed.state[p] for p in trained], list(optimizer.state.values()))
    assert resumed.param_groups[0]["lr"] == 0.05
    step(model, resumed, 3)
    assert {int(s["step"]) for s in resumed.state.values()} == {1, 3}
    # the opposite: freeze a part that was trained
    save_checkpoint(tmp_path / "all", model, resumed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, _ = make("Adam", seed=2)
        other[part].requires_grad_(False)
        parameters = [p for p in other.parameters() if in_optimizer or p.requires_grad]
        frozen = torch.optim.Adam(parameters)
        load_checkpoint(tmp_path / "all", other, frozen)
    assert equal(other.state_dict(), model.state_dict())
    names = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if in_optimizer or not name.startswith(part):
            assert equal(frozen.state[names[name]], resumed.state[p])


def two_groups(model, **settings):
    groups = [{"params": m.parameters(), **settings} for m in (model["backbone"], model["head"])]
    return torch.optim.Adam(groups, lr=0.02)


def test_parameter_groups_may_differ_as_long_as_settings_do_not(tmp_path):
    model, optimizer = make("Adam")
    step(model, optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.3
    save_checkpoint(tmp_path / "one", model, optimizer)
    other = make("Adam", seed=1)[0]
    optimizer = two_groups(other)
    load_checkpoint(tmp_path / "one", other, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
    optimizer.param_groups[1]["lr"] = 0.7
    save_checkpoint(tmp_path / "two", other, optimizer)
    model, optimizer = make("Adam", seed=2)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"optimizer: expected the settings .*'lr': 0\.7"):
        load_checkpoint(tmp_path / "two", model, optimizer)
    assert equal(everything(model, optimizer), before)


def of_another_class(model, optimizer):
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def of_another_model(model, optimizer):
    return model, torch.optim.Adam(torch.nn.Linear(3, D).parameters())


def with_more_classes(model, optimizer):
    head = MarginSoftmaxHead(D, C + 1, margin=CosFace(0.3), scale=8.0)
    return torch.nn.ModuleDict({"backbone": model["backbone"], "head": head}), None


def with_a_bias(model, optimizer):
    head = MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0, bias=True)
    return torch.nn.ModuleDict({"backbone": model["backbone"], "head": head}), None


def without_a_head(model, optimizer):
    return torch.nn.ModuleDict({"backbone": model["backbone"]}), None


@pytest.mark.parametrize(
    "change, match",
    [
        (of_another_class, "optimizer: expected one with .*'betas'.*got SGD"),
        (of_another_model, "optimizer: expected parameters of the model"),
        (with_more_classes, r"model: expected head\.weight \(5, 4\).*got \(6, 4\)"),
        (with_a_bias, r"model: .*has no \['head\.bias'\]"),
        (without_a_head, r"model: .*has a \['head\.weight'\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, match, tmp_path):
    model, optimizer = make("Adam")
    step(model, optimizer, 0)
    save_checkpoint(tmp_path / "saved", model, optimizer)
    model, optimizer = change(*make("Adam", seed=1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path / "saved", model, optimizer)
    assert equal(model.state_dict(), before) and not (optimizer and optimizer.state)


def test_what_is_no_model_or_optimizer(tmp_path):
    model, optimizer = make("SGD")
    for arguments in ((model.state_dict(),), (model, [optimizer, model])):
        for act, path in ((save_checkpoint, tmp_path / "new"), (load_checkpoint, tmp_path)):
            with pytest.raises(TypeError, match=r"(model|optimizer): expected .*, got (Ord|Mod)"):
                act(path, *arguments)


def test_settings_that_are_numpy_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    model, optimizer = make("SGD")
    optimizer.param_groups[0]["lr"] = numpy.float64(0.25)
    save_checkpoint(tmp_path / "saved", model, optimizer)
    load_checkpoint(tmp_path / "saved", *(loaded := make("SGD", seed=1)))
    assert loaded[1].param_groups[0]["lr"] == 0.25


def test_a_sampler_may_be_on_one_side_only(tmp_path):
    for rates in ((0.5, 1.0), (1.0, 0.5)):
        heads = [
            MarginSoftmaxHead(D, C, margin=CosFace(0.3), scale=8.0, sampling=PartialFC(rate))
            for rate in rates
        ]
        path = tmp_path / str(rates[0])
        save_checkpoint(path, heads[0])
        load_checkpoint(path, heads[1])
        assert torch.equal(heads[0].weight, heads[1].weight)
