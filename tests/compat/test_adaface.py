# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the drop-ins for AdaFace's heads with its formulas on the dense logits."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from marginkernels.compat import adaface as head
from marginkernels.optim import SGD

C, D, F64 = 11, 6, torch.float64
TYPES = ("adaface", "arcface", "cosface")
SETTINGS = dict(embedding_size=D, class_num=C, m=0.4, t_alpha=0.3, h=0.333, s=64.0)


def build(kind):
    torch.manual_seed(0)
    return head.build_head(head_type=kind, **SETTINGS).double()


def batch(n=9, seed=1):
    """Returns what the project's backbone gives: unit embeddings, norms, labels, and features."""
    generator = torch.Generator().manual_seed(seed)
    f = 12 * torch.rand(n, 1, generator=generator) * torch.randn(n, D, generator=generator)
    f = f.to(F64).requires_grad_()
    norms = torch.norm(f, 2, 1, True)
    return f / norms, norms, torch.randint(C, (n,), generator=generator), f


class Dense:
    """Has the project's formulas and statistics."""

    def __init__(self, kind):
        self.kind, self.eps = kind, 1e-3 if kind == "adaface" else 1e-4
        self.mean, self.std = torch.full((1,), 20.0, dtype=F64), torch.full((1,), 100.0, dtype=F64)

    def __call__(self, embeddings, norms, kernel, y):
        m, q = 0.4, torch.zeros(len(y), 1, dtype=F64)
        cosine = embeddings @ (kernel / torch.norm(kernel, 2, 0, True))
        cosine = cosine.clamp(-1 + self.eps, 1 - self.eps)
        c = cosine.gather(1, y[:, None])
        if self.kind == "adaface":
            norms = norms.detach().clip(0.001, 100)
            self.mean = 0.3 * norms.mean() + 0.7 * self.mean
            self.std = 0.3 * norms.std() + 0.7 * self.std
            q = (0.333 * (norms - self.mean) / (self.std + 1e-3)).clip(-1, 1)
        turn, drop = {
            "adaface": (-m * q, m + m * q), "arcface": (m, 0), "cosface": (0, m),
        }[self.kind]  # fmt: skip
        angle = (c.acos() + turn).clip(self.eps, math.pi - self.eps)
        return 64 * cosine.scatter(1, y[:, None], angle.cos() - drop)


@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_of_the_trainers_lines_has_the_same_gradients_and_statistics(kind):
    module, dense, cross_entropy = build(kind), Dense(kind), nn.CrossEntropyLoss()
    for seed in range(3):
        embeddings, norms, y, f = batch(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cos_thetas = module(embeddings, norms, y)
            assert not isinstance(cos_thetas, tuple) and cos_thetas.shape == (9, C)
            loss = cross_entropy(cos_thetas, y)
        expected = F.cross_entropy(dense(embeddings, norms, module.kernel, y), y)
        leaves = [f, module.kernel]
        torch.testing.assert_close(loss, expected)
        got = torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(expected, leaves))
        if kind == "adaface":
            statistics = module.batch_mean, module.batch_std
            torch.testing.assert_close(statistics, (dense.mean, dense.std))


@pytest.mark.parametrize("kind", TYPES)
def test_whoever_asks_for_logits_gets_them_with_a_warning(kind):
    module, dense = build(kind), Dense(kind)
    embeddings, norms, y, _ = batch()
    expected = dense(embeddings, norms, module.kernel, y)
    logits = module(embeddings, norms, y)
    with pytest.warns(UserWarning, match="Logits: argmax needs all"):
        assert torch.equal(logits.argmax(1), expected.argmax(1))
    torch.testing.assert_close(logits.tensor(), expected)
    torch.testing.assert_close(torch.softmax(logits, dim=1), expected.softmax(1))
    torch.testing.assert_close(F.cross_entropy(logits, y), F.cross_entropy(expected, y))
    torch.testing.assert_close(logits[2:4], expected[2:4])
    if kind == "adaface":  # all that has moved the statistics once
        torch.testing.assert_close(module.batch_mean, dense.mean)
        module(embeddings, norms, y).tensor()
        assert module.batch_mean != dense.mean


def test_options_of_the_cross_entropy_are_those_of_torch():
    module, weight = build("cosface"), torch.rand(C, dtype=F64)
    embeddings, norms, y, _ = batch()
    expected = Dense("cosface")(embeddings, norms, module.kernel, y)
    y[2] = y[3] = -100  # the trainer leaves rows out so, in place
    for options in (dict(label_smoothing=0.1), dict(weight=weight), dict(reduction="none")):
        loss = F.cross_entropy(module(embeddings, norms, y), y, **options)
        torch.testing.assert_close(loss, F.cross_entropy(expected, y, **options))
    others = torch.randint(C, (9,))
    _, _, labels, _ = batch()
    with pytest.warns(UserWarning, match="Logits: a cross-entropy of other labels"):
        loss = F.cross_entropy(module(embeddings, norms, labels), others)
    torch.testing.assert_close(loss, F.cross_entropy(expected, others))


@pytest.mark.filterwarnings("ignore:Logits")
def test_logits_meet_operators_and_lists_as_a_tensor_and_are_not_written_to():
    module, (embeddings, norms, y, _) = build("cosface"), batch()
    expected = module(embeddings, norms, y).tensor()
    for ask in (
        lambda z: torch.cat([z, z]),
        lambda z: torch.stack((expected, z)),
        lambda z: torch.where(z > 0, 2 * z - 1, -z),
        lambda z: (z / expected, expected * z, z @ expected.T, abs(z) ** 2, z == z),
        lambda z: z[y > 3, 1:],
        lambda z: list(z),
    ):
        torch.testing.assert_close(ask(module(embeddings, norms, y)), ask(expected))
    for write in (
        lambda z: z.__setitem__(0, 1.0),
        lambda z: z.__imul__(2),
        lambda z: z.clamp_(0),
        lambda z: torch.relu_(z),
    ):
        logits = module(embeddings, norms, y)
        with pytest.raises(RuntimeError, match=r"^Logits: \w+ writes in place, .* tensor\(\)"):
            write(logits)
        assert torch.equal(logits.tensor(), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_logits_are_those_of_the_forward_pass_or_an_error(kind):
    module = build(kind).eval()
    embeddings, norms, y, f = batch()
    expected = module(embeddings, norms, y).tensor()
    gradients = torch.autograd.grad(F.cross_entropy(expected, y), f, retain_graph=True)
    for ask in (lambda z: F.cross_entropy(z, y), lambda z: F.cross_entropy(z.tensor(), y)):
        module.m, module.s = 0.4, 64.0
        logits = module(embeddings, norms, y)
        module.m, module.s = 0.1, 8.0
        loss = ask(logits)
        torch.testing.assert_close(loss, F.cross_entropy(expected, y))
        torch.testing.assert_close(torch.autograd.grad(loss, f, retain_graph=True), gradients)
        assert (module.m, module.s) == (0.1, 8.0)
    unasked, asked = (module(embeddings, norms, y) for _ in range(2))
    values = asked.tensor().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    F.cross_entropy(unasked, y).backward()
    optimizer.step()
    assert torch.equal(asked.tensor(), values)
    for ask in (lambda z: z.tensor(), lambda z: z.shape and F.cross_entropy(z, y)):
        with pytest.raises(RuntimeError, match=r"^Logits: kernel has changed since"):
            ask(unasked)


def test_logits_of_embeddings_that_were_overwritten_are_an_error():
    module, (embeddings, norms, y, _) = build("cosface"), batch()
    x = embeddings.detach().clone()
    logits = module(x, norms, y)
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"^Logits: embeddings has changed since"):
        F.cross_entropy(logits, y)


@pytest.mark.parametrize("kind", TYPES)
def test_a_compiled_step_has_the_loss_in_one_graph(kind):
    module, (embeddings, norms, y, _) = build(kind).eval(), batch()

    def step(x):
        return F.cross_entropy(module(x, norms, y), y)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(embeddings), step(embeddings))


@pytest.mark.parametrize("kind", TYPES)
def test_the_first_weights_and_checkpoints_are_the_projects(kind):
    module = build(kind).float()
    torch.manual_seed(0)
    kernel = torch.empty(D, C).uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5)
    state = module.state_dict()
    theirs = {"kernel": kernel}
    if kind == "adaface":
        numbers = torch.zeros(1), torch.full((1,), 20.0), torch.full((1,), 100.0)
        theirs |= dict(zip(("t", "batch_mean", "batch_std"), numbers, strict=True))
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], value) for name, value in theirs.items())
    theirs = {name: torch.rand_like(value) for name, value in theirs.items()}
    trainer = nn.ModuleDict({"head": module})
    trainer.load_state_dict({f"head.{name}": value for name, value in theirs.items()})
    for other in (module, copy.deepcopy(module)):
        state = other.state_dict()
        assert all(torch.equal(state[name], value) for name, value in theirs.items())
        assert other.rows().is_contiguous()


def test_an_optimizer_inside_backward_moves_the_kernel_as_torchs_does():
    modules = [build("adaface"), build("adaface")]
    ours = SGD(modules[0], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(modules[1].parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        embeddings, norms, y, _ = batch(seed=seed)
        for module, optimizer in zip(modules, (ours, theirs), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(module(embeddings, norms, y), y).backward(retain_graph=True)
            optimizer.step()
    assert modules[0].kernel.grad is None
    torch.testing.assert_close(modules[0].kernel, modules[1].kernel)


def test_wrong_arguments_are_named():
    module, (embeddings, norms, y, _) = build("adaface"), batch()
    for given, error in (
        ((embeddings[:, 1:], norms, y), r"embbedings: expected shape \(N, 6\), got \(9, 5\)"),
        ((embeddings, norms[1:], y), r"norms: expected shape \(9, 1\), got \(8, 1\)"),
        ((embeddings, None, y), r"norms: expected shape \(9, 1\), got None"),
        ((embeddings, norms, y[1:]), r"label: expected shape \(9,\), got \(8,\)"),
    ):
        with pytest.raises(ValueError, match=f"^{error}"):
            module(*given)
    with pytest.raises(ValueError, match=r"^head_type: expected one of .* got 'sphere'"):
        build("sphere")
    module.m = 0.2
    assert module.m == module.margin.m == 0.2
