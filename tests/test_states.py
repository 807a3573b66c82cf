# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the state of losses: it moves in training, rests in evaluation, and is saved.

Margin schedules, adaptive scales and tables of margins are tested too.
"""

import copy
import itertools
import math

import pytest
import torch

from marginkernels import (
    AdaCos,
    AdaFace,
    AdaMSoftmax,
    ArcFace,
    ASoftmax,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    MarginSchedule,
    MarginSoftmaxHead,
    NSoftmax,
    Rows,
    margin_cross_entropy,
    margins_from_counts,
)
from tests.support.losses import C, operands
from tests.support.stateful import STATEFUL, batches, head_of, same, state_of

F64 = torch.float64


EACH = pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)


@EACH
def test_state_moves_rests_and_is_saved(make):
    head = head_of(make())
    fresh = state_of(head)
    for x, y in batches():
        head(x, y)
    trained = state_of(head)
    assert trained.keys() and not same(fresh, trained)

    head.eval()
    first, second = (head(*batches()[0]) for _ in range(2))
    assert torch.equal(first, second) and same(trained, state_of(head))

    resumed = head_of(make())
    resumed.load_state_dict(copy.deepcopy(head.state_dict()))
    head.train()
    for x, y in batches():
        assert torch.equal(head(x, y), resumed(x, y))
    assert same(state_of(head), state_of(resumed))


@EACH
def test_backward_after_the_next_forward(make):
    """Sums two losses: the second forward moves a state that the first graph must not see."""
    together, apart = head_of(make()), head_of(make())
    (together(*batches()[0]) + together(*batches()[1])).backward()
    for x, y in batches()[:2]:
        apart(x, y).backward()
    torch.testing.assert_close(together.weight.grad, apart.weight.grad)


@EACH
def test_ignored_rows_and_empty_batches_leave_statistics_alone(make):
    with_them, without = head_of(make()), head_of(make())
    if any("iteration" in name for name in state_of(with_them)) or isinstance(
        with_them.margin, ElasticFace
    ):
        pytest.skip("it counts steps, or draws")
    x, y = batches()[0]
    more = torch.cat([x, 100 * torch.randn(9, 8)]), torch.cat([y, torch.full((9,), -100)])
    with_them(*more), without(x, y)
    for name, value in state_of(with_them).items():
        torch.testing.assert_close(value, state_of(without)[name])
    before = state_of(with_them)
    with_them(more[0], torch.full_like(more[1], -100))
    with_them(more[0][:0], more[1][:0])
    assert same(before, state_of(with_them))


@EACH
def test_modules_pickled_before_an_attribute_existed(make):
    head = head_of(make())
    newer = ("_looked_for_replicas", "_split", "_given_scale", "_given_m", "_initial")
    for module in head.modules():
        for name in newer:
            module.__dict__.pop(name, None)
    (x, y), twin = batches()[0], head_of(make())
    assert torch.equal(head(x, y), twin(x, y))
    assert head.double()(x.double(), y).dtype == F64
    head.reset_parameters()


def test_curricular_t_is_the_average_of_the_target_cosines():
    margin, (x, w, y) = CurricularFace(alpha=0.25).double(), operands()
    cosine = torch.nn.functional.cosine_similarity(x, w[y])
    for _ in range(2):
        margin_cross_entropy(x, w, y, margin=margin, scale=16.0)
    torch.testing.assert_close(margin.t, 0.25 * cosine.mean() * (1 + 0.75))


def test_adaface_statistics():
    margin, (x, w, y) = AdaFace(t_alpha=1.0).double(), operands()
    margin_cross_entropy(x, w, y, margin=margin, scale=16.0)
    norm = x.norm(dim=1)
    torch.testing.assert_close(margin.batch_mean, norm.mean())
    torch.testing.assert_close(margin.batch_std, norm.std())
    before = [b.clone() for b in margin.buffers()]
    loss = margin_cross_entropy(x[:1], w, y[:1], margin=margin, scale=16.0)
    assert loss.isfinite() and all(map(torch.equal, before, margin.buffers()))


@pytest.mark.parametrize("make", [CurricularFace, AdaFace, lambda: AdaCos(C)])
def test_a_call_that_fails_spoils_no_state(make):
    (x, w, y), module = operands(dtype=torch.float32), make()
    is_scale = isinstance(module, AdaCos)
    margin, scale = (NSoftmax(), module) if is_scale else (module, 16.0)
    fresh = copy.deepcopy(module.state_dict())
    of_nobody = w.clone()
    of_nobody[min(set(range(C)) - set(y.tolist()))] = torch.nan
    bad_x = torch.cat([x[:-1], x[-1:] * torch.nan])
    for wrong in ((bad_x, w, y), (x, w * torch.nan, y), (x, of_nobody, y)):
        with pytest.raises(ValueError, match="finite"):
            margin_cross_entropy(*wrong, margin=margin, scale=scale)
    assert same(fresh, module.state_dict())


@pytest.mark.parametrize("make", [CurricularFace, AdaFace, lambda: AdaCos(C)])
def test_averages_stay_wide_when_a_head_is_cast(make):
    """Keeps averages in fp32, because bf16 would round their small steps away."""
    module = make().bfloat16()
    assert module.state_dict() and all(b.dtype == torch.float32 for b in module.buffers())
    assert all(b.dtype == F64 for b in module.double().buffers())
    assert ArcFace(torch.rand(C)).bfloat16().m.dtype == torch.bfloat16
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(b.dtype == torch.float32 for b in make().buffers())
    finally:
        torch.set_default_dtype(torch.float32)


def test_annealing_falls_to_its_floor():
    margin, (x, w, y) = ASoftmax(2, base=100, gamma=0.5, power=2, low=5), operands()
    for step in range(1, 12):
        margin_cross_entropy(x, w, y, margin=margin, scale=1.0, normalize="weight")
        expected = max(5, 100 * (1 + 0.5 * step) ** -2)
        assert margin.annealing().item() == pytest.approx(expected)
    assert expected == 5


def test_elastic_plus_deals_large_margins_to_small_cosines():
    c = torch.linspace(0.9, -0.9, 50, dtype=F64)[torch.randperm(50)]
    kept = torch.arange(50) % 5 != 0
    label = torch.zeros(50, dtype=torch.int64)
    margin = ElasticFace(std=0.1, plus=True, seed=3)
    m = margin.of_rows(c, Rows(label, c, None, None, kept))
    assert (m[kept][c[kept].argsort()].diff() <= 0).all()
    assert (m[~kept] == 0.5).all() and m[kept].std() == pytest.approx(0.1, rel=0.4)


def adacos_step(x, w, y, s):
    """Computes the paper's formula, in fp64 and without logarithms."""
    c = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
    target = torch.nn.functional.one_hot(y, len(w)).bool()
    b = torch.exp(s * c).masked_fill(target, 0).sum(1).mean()
    return math.log(b) / math.cos(min(math.pi / 4, torch.acos(c[target]).median().item()))


@pytest.mark.parametrize("rows", [39, 40])
@pytest.mark.parametrize("delayed", [False, True])
def test_adacos_follows_the_paper(delayed, rows, backend, device):
    x, w, y = operands(n=200)  # the last rows are within pi / 4 of their class
    x, y = x[-rows:], y[-rows:]
    scale, s = AdaCos(C, delayed=delayed).to(device), math.sqrt(2) * math.log(C - 1)
    operands_ = [t.to(device) for t in (x.float(), w.float(), y)]
    for _ in range(3):
        before, s = s, adacos_step(x, w, y, s)
        loss = margin_cross_entropy(*operands_, margin=NSoftmax(), scale=scale, backend=backend)
        assert scale.s.item() == pytest.approx(s, rel=1e-5)
        used = before if delayed else s
        expected = margin_cross_entropy(x, w, y, margin=NSoftmax(), scale=used)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_adacos_does_not_overflow_and_keeps_a_scale_it_cannot_replace():
    x, w, y = operands(dtype=torch.float32)
    scale = AdaCos(C)
    scale.s.fill_(5000.0)  # exp(5000 cos) exceeds the range of fp64
    margin_cross_entropy(x, w, y, margin=NSoftmax(), scale=scale)
    assert scale.s.isfinite() and scale.s > 100
    opposite = AdaCos(3)  # B < 1: its logarithm is negative, which is no scale
    before = opposite.s.clone()
    w = torch.tensor([[1.0, 0], [-1, 0.01], [-1, -0.01]])
    margin_cross_entropy(
        w[:1], w, torch.zeros(1, dtype=torch.int64), margin=NSoftmax(), scale=opposite
    )
    assert torch.equal(before, opposite.s)


def test_adacos_fixed_is_a_number():
    assert AdaCos(1_000_001, dynamic=False)() == pytest.approx(19.538, abs=1e-3)
    assert not AdaCos(10, dynamic=False).state_dict()


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(scale=AdaCos(C), normalize="weight"), ["normalize:", "both", "AdaCos"]),
        (dict(scale=AdaCos(C), bias=torch.zeros(C)), ["bias:", "AdaCos"]),
        (dict(scale=AdaCos(C), margin=CurricularFace()), ["scale:", "CurricularFace", "AdaCos"]),
        (dict(margin=CurricularFace(), normalize="none"), ["normalize:", "CurricularFace"]),
        (dict(margin=CurricularFace(), bias=torch.zeros(C)), ["bias:", "CurricularFace"]),
        (dict(margin=CurricularFace(), save_tiles=True), ["save_tiles:", "CurricularFace"]),
        (dict(margin=MagFace(), row_margin=torch.zeros(40)), ["row_margin:", "MagFace"]),
        (dict(z_loss=-1.0), ["z_loss:", ">= 0", "-1.0"]),
        (dict(focal_gamma=math.inf), ["focal_gamma:", "inf"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusals(settings, words):
    x, w, y = operands(dtype=torch.float32)
    with pytest.raises(ValueError) as refusal:
        margin_cross_entropy(x, w, y, **(dict(margin=NSoftmax(), scale=16.0) | settings))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_head_refuses_what_its_margin_cannot_do():
    with pytest.raises(ValueError, match=r"normalize: .*CurricularFace"):
        MarginSoftmaxHead(8, C, margin=CurricularFace(), scale=16.0, normalize="none")
    with pytest.raises(ValueError, match=r"bias: .*CurricularFace"):
        MarginSoftmaxHead(8, C, margin=CurricularFace(), scale=16.0, bias=True)


@pytest.mark.parametrize("learnable", [False, True])
def test_adam_margins_grow_and_stay_in_range(learnable):
    x, w, y = operands(dtype=torch.float32)
    margin = AdaMSoftmax(C, weight=70.0)
    margin.m.requires_grad_(learnable)
    loss = margin_cross_entropy(x, w, y, margin=margin, scale=16.0)
    if learnable:
        (slope,) = torch.autograd.grad(loss, margin.m)
        unseen = torch.ones(C, dtype=torch.bool)
        unseen[y] = False
        torch.testing.assert_close(slope[unseen], torch.full((int(unseen.sum()),), -70 / C))
    with torch.no_grad():
        margin.m[:2] = torch.tensor([1.5, -0.5])
    margin_cross_entropy(x, w, y, margin=margin, scale=16.0)
    assert margin.m[:2].tolist() == [1.0, 0.0]


def test_margins_from_counts():
    m = margins_from_counts(torch.tensor([1, 16, 10_000]), low=0.05, high=0.5, power=0.25)
    torch.testing.assert_close(m, torch.tensor([0.5, 0.05 + 0.45 * 0.4 / 0.9, 0.05]))
    assert (margins_from_counts(torch.full((3,), 7)) == 0.5).all()
    with pytest.raises(ValueError, match=r"counts: .*at least 1"):
        margins_from_counts(torch.tensor([3, 0]))
    ArcFace(m).check_range()


@pytest.mark.parametrize("m", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("ramp", ["linear", "exponential"])
def test_margin_schedule(ramp, m):
    margin = ArcFace(m if isinstance(m, float) else m.clone())
    schedule = MarginSchedule(margin, initial=0.1, final=0.5, start=3, finish=13, ramp=ramp)
    values = [float(margin.m)]
    for _ in range(15):
        schedule.step()
        values.append(float(margin.m))
    assert values[:4] == pytest.approx([0.1] * 4) and values[13:] == pytest.approx([0.5] * 3)
    assert all(a <= b for a, b in itertools.pairwise(values))
    halfway = 0.3 if ramp == "linear" else 0.1 + 0.4 * (1 - 1000**-0.5)
    assert values[8] == pytest.approx(halfway)
    resumed = MarginSchedule(ArcFace(0.0), initial=0.1, final=0.5, start=3, finish=13, ramp=ramp)
    schedule.current_step = 8
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.margin.m == pytest.approx(values[8])
    untouched = CosFace(0.1)
    with pytest.raises(ValueError, match=r"final: expected CosFace's m in \[-2, 2\], got 2.5"):
        MarginSchedule(untouched, final=2.5, finish=10)
    assert untouched.m == 0.1
