# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests cosines that nobody computes until someone asks."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from marginkernels import LazyCosine, evaluation, margin_cross_entropy
from marginkernels.compat.weights import FusedHead
from marginkernels.optim import SGD
from tests.support import workers
from tests.support.cosines import LOSS, C, D, N, dense, operands, same


class Layer(FusedHead):
    """Returns lazy cosines."""

    def __init__(self, sub_centers=1):
        super().__init__()
        self.sub_centers = sub_centers
        self.weight = nn.Parameter(torch.randn(C * sub_centers, D))

    def forward(self, x):
        return LazyCosine(x, self.weight, sub_centers=self.sub_centers, update=self._update)


class Sizes(TorchDispatchMode):
    """Collects the sizes of all results."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen += [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result

    seen: list


ANSWERS = {
    "topk": lambda t: t.topk(3),
    "torch.topk": lambda t: torch.topk(t, 2, dim=1),
    "max": lambda t: tuple(t.max(1)),
    "argmax": lambda t: t.argmax(dim=-1, keepdim=True),
    "of a middle dimension": lambda t: t.unsqueeze(1).argmax(dim=-1),
    "and without it": lambda t: tuple(t.unsqueeze(-2).squeeze(1).max(1, keepdim=True)),
    "of rows": lambda t: (t[2:5].argmax(1), t[0].argmax(0), t[[4, 4, 1]].topk(2).values),
    "of masked rows": lambda t: t[torch.arange(N) % 2 == 0][:, None].argmax(2),
    "in another type": lambda t: t.float().detach().cpu().to("cpu", torch.float32).topk(2),
    "shape": lambda t: torch.tensor([*t.shape, len(t), t.ndim, t.numel(), t.size(1)]),
    "others like it": lambda t: (t.new_zeros(3), t.float().new_tensor([1, 2])),
    "whose it is": lambda t: torch.tensor([t.requires_grad, t.is_leaf, torch.is_tensor(t)]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("ask", ANSWERS.values(), ids=ANSWERS)
def test_answers_are_those_of_the_tensor(ask, k, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 4)  # several blocks of classes
    x, w, _ = operands(k)
    same(tree_leaves(tuple(ask(LazyCosine(x, w, sub_centers=k)))), [*ask(dense(x, w, k))])


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_of_all_that_was_asked_add_up(k):
    x, w, y = operands(k)
    lazy, exact = LazyCosine(x, w, sub_centers=k), dense(x, w, k)
    loss = margin_cross_entropy(x, w, y, sub_centers=k, **LOSS)
    upstream = torch.linspace(0.5, 1.5, N * C, dtype=torch.float64).view(N, C)

    def total(t, loss):
        some = (t.topk(2).values ** 2).sum() + t[1:4].unsqueeze(1).max(2).values.sum()
        return some + loss

    with pytest.warns(UserWarning, match="mul needs all"):
        product = (lazy * upstream).sum()
    # what is asked of the tensor that it has become, and of another that is lazy still
    other = LazyCosine(x, w, sub_centers=k)
    ours = total(lazy, lazy.loss(y, **LOSS)) + total(other, other.loss(y, **LOSS)) + product
    theirs = 2 * total(exact, loss) + (exact * upstream).sum()
    same(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, (x, w)))


def test_an_op_below_python_meets_the_tensor_and_its_gradient():
    x, w, _ = operands()
    with torch._C.DisableTorchFunctionSubclass(), pytest.warns(UserWarning, match="needs all"):
        ours = torch.autograd.grad((LazyCosine(x, w).view(-1) ** 2).sum(), (x, w))
    same(ours, torch.autograd.grad((dense(x, w) ** 2).sum(), (x, w)))


@pytest.mark.filterwarnings("error")
def test_nothing_of_the_size_of_the_cosines_is_made(monkeypatch):
    n, c = 1024, 512
    monkeypatch.setattr(evaluation, "CHUNK", 64)
    x, w, y = operands(n=n, c=c)
    mode = Sizes()
    mode.seen = []
    with mode:
        lazy = LazyCosine(x, w)
        lazy.loss(y, **LOSS).backward()
        lazy.argmax(1), lazy.topk(2), lazy.accuracy(y), lazy.detach().cpu(), repr(lazy), f"{lazy}"
    # the wrapper itself has the shape, and no values
    assert max(size for size in mode.seen if size != n * c) < n * c / 4
    assert mode.seen.count(n * c) == 0


def test_the_gradient_of_the_weights_is_not_copied_on_its_way():
    x, w, y = operands()
    seen = []
    w.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    LazyCosine(x, w).unsqueeze(1).squeeze(1).loss(y, **LOSS).backward()
    assert seen == [w.grad.data_ptr()]


def test_to_another_device_moves_the_answers_and_not_the_weights():
    x, w, _ = operands()
    there = LazyCosine(x, w).to("meta", torch.float32)
    assert (there.device.type, there.dtype, there.is_meta) == ("meta", torch.float32, True)
    assert there.factors.w.data_ptr() == w.data_ptr()
    for t in (there.argmax(1), there.topk(2).values, there[1:3].tensor()):
        assert t.is_meta
    assert there.to("cpu").device.type == "cpu"


def test_a_warning_says_who_asked_and_then_it_is_the_tensor():
    x, w, _ = operands()
    lazy = LazyCosine(x.detach(), w.detach())
    assert "shape=(9, 13)" in repr(lazy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            other = LazyCosine(x, w)
            other.sum(), other.mean(), LazyCosine(x, w).detach().exp()
    names = [str(c.message).split()[1] for c in caught]
    assert names == ["sum", "exp"]  # once it is the tensor, nobody has to ask
    exact = dense(x, w).detach()
    same(lazy.tensor().topk(3), exact.topk(3))
    assert repr(lazy) == repr(exact)
    same(lazy.topk(3), exact.topk(3))


def gather_into(t):
    torch.ops.c10d._allgather_base_(t, torch.zeros(1), torch.distributed.ProcessGroup(0, 1))


WRITES = {
    "mul_": lambda t: t.mul_(2),
    "augmented assignment": lambda t: t.__iadd__(1),
    "an item": lambda t: t.__setitem__(0, 0.0),
    "a row": lambda t: t[0].zero_(),
    "rows": lambda t: t[1:3].mul_(2),
    "another shape": lambda t: t.unsqueeze(1).mul_(2),
    "detached": lambda t: t.detach().zero_(),
    "data": lambda t: t.data.zero_(),
    "out": lambda t: torch.mul(torch.ones(N, C).double(), 2, out=t),
    "inplace": lambda t: F.relu(t, inplace=True),
    "many": lambda t: torch._foreach_mul_([t], 2.0),
    "requires_grad_": lambda t: t.detach().requires_grad_(),
    "a collective": gather_into,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_refused_and_changes_nothing(write):
    x, w, _ = operands()
    lazy = LazyCosine(x.detach(), w.detach())
    with pytest.raises(RuntimeError, match=r"cannot be written to. tensor\(\) gives a tensor"):
        write(lazy)
    same(lazy.tensor(), dense(x, w).detach())


@pytest.mark.filterwarnings("ignore:LazyCosine")
def test_after_a_write_to_its_tensor_it_answers_no_more():
    x, w, y = operands()
    for write in (lambda t: t.tensor().mul_(2), lambda t: t[:, 0].zero_()):
        lazy = LazyCosine(x.detach(), w.detach())
        write(lazy)
        for ask in (lambda t: t.argmax(1), lambda t: t.loss(y, **LOSS), lambda t: t.tensor()):
            with pytest.raises(RuntimeError, match="changed in place"):
                ask(lazy)


def test_c_code_gets_no_address_of_values_that_are_not_there():
    x, w, y = operands()
    seen = []
    lazy = LazyCosine(x, w)
    lazy.register_hook(seen.append)
    lazy.loss(y, **LOSS).backward()
    for t in (lazy.detach(), *seen):
        with pytest.raises(RuntimeError, match="data pointer"):
            torch.utils.dlpack.to_dlpack(t)


@pytest.mark.filterwarnings("ignore:LazyCosine")
def test_copies_are_plain_tensors():
    x, w, _ = operands()
    with torch.no_grad():
        lazy = LazyCosine(x, w)
    exact = dense(x, w).detach()
    for other in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy)), lazy.tensor()):
        same(other, exact)
    same(torch.from_numpy(lazy.numpy()), exact)
    same(torch.cat([lazy, lazy]), torch.cat([exact, exact]))


def test_accuracy_is_that_of_the_loss_and_counts_near_ones():
    x, w, y = operands()
    lazy = LazyCosine(x, w)
    _, seen = lazy.loss(y, return_stats=True, **LOSS)
    assert lazy.accuracy(y) == seen.correct.float().mean()
    nearest = dense(x, w).topk(4).indices
    assert (
        lazy.unsqueeze(1).accuracy(y[:, None], k=4) == (nearest == y[:, None]).any(1).float().mean()
    )
    with pytest.raises(ValueError, match=r"labels: expected shape \(9,\), got \(9, 1\)"):
        lazy.accuracy(y[:, None])


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast"])
def test_modes_are_those_in_which_the_layer_ran(mode):
    x, w, y = (t.float().detach() if t.is_floating_point() else t for t in operands())
    w.requires_grad_()
    context = {
        "no_grad": torch.no_grad(), "inference_mode": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }[mode]  # fmt: skip
    with context:
        lazy, exact = LazyCosine(x, w), F.linear(F.normalize(x), F.normalize(w))
        loss = margin_cross_entropy(x, w, y, **LOSS)
    assert (lazy.dtype, lazy.requires_grad) == (exact.dtype, exact.requires_grad)
    assert torch.equal(lazy.loss(y, **LOSS).detach(), loss.detach())
    assert torch.equal(lazy.argmax(1), lazy.tensor().argmax(1))
    torch.testing.assert_close(lazy.tensor(), exact.clone())
    assert lazy.tensor().requires_grad == exact.requires_grad


def test_after_the_step_of_an_optimizer_it_is_too_late():
    torch.manual_seed(0)
    layer, plain = Layer(), Layer()
    plain.load_state_dict(layer.state_dict())
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    optimizers = SGD(layer, lr=0.1), torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        outputs = layer(x), plain(x)
        for out, optimizer in zip(outputs, optimizers, strict=True):
            out.loss(y, **LOSS).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(layer.weight, plain.weight)
    for out in outputs:
        with pytest.raises(RuntimeError, match=r"w has changed since.*optimizer\.step"):
            out.argmax(1)


def test_factors_that_do_not_fit_are_refused():
    x, w, y = operands()
    with pytest.raises(ValueError, match=r"w: expected shape \(C, 6\)"):
        LazyCosine(x, w[:, 1:])
    with pytest.raises(ValueError, match="w: expected 2 rows for each class"):
        LazyCosine(x, w, sub_centers=2)
    with pytest.raises(ValueError, match=r"k: expected an integer in \[1, 13\], got 14"):
        LazyCosine(x, w).topk(14)
    with pytest.raises(ValueError, match=r"loss: expected cosines \(N, C\)"):
        LazyCosine(x, w)[None].loss(y, **LOSS)


def averaged(options):
    """Trains a step on each rank, and returns the gradients and what the layer's hook saw."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(D, D), Layer())
    unused = nn.Linear(2, 2) if options.get("find_unused_parameters") else None
    if unused is not None:
        module[0].register_module("unused", unused)
    seen = []
    module[1].register_full_backward_hook(lambda _, __, out: seen.append(tuple(out[0].shape)))
    model = DistributedDataParallel(module, **options)
    x, y = torch.randn(2 * N, D), torch.randint(C, (2 * N,))
    rows = slice(rank * N, (rank + 1) * N)
    for _ in range(2):
        module.zero_grad()
        out = model(x[rows])
        assert isinstance(out, LazyCosine)
        out.loss(y[rows], **LOSS).backward()
    found = [p.grad.clone() for p in (module[0].weight, module[1].weight)]
    loss = margin_cross_entropy(module[0](x), module[1].weight, y, **LOSS)
    exact = torch.autograd.grad(loss, (module[0].weight, module[1].weight))
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)
    return seen


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp_averages_gradients_that_go_through_it(options):
    for seen in workers.run(2, averaged, options):
        assert seen == [(N, C)] * 2


def test_a_compiled_frame_breaks_and_is_right():
    torch.manual_seed(0)
    layer, x, y = Layer(), torch.randn(N, D), torch.randint(C, (N,))

    def step(x, y):
        out = layer(2 * x)
        return out.loss(y, **LOSS), out.argmax(1), out.accuracy(y), (3 * out).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = torch.compile(step, backend="eager")(x, y), step(x, y)
    same(ours, theirs)
    gradients = [torch.autograd.grad(r[0] + r[3], layer.weight) for r in (ours, theirs)]
    same(*gradients)
