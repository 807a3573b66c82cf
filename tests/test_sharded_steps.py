# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Moves class weights inside backward where ranks split the classes, or a step samples them."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from marginkernels import CosFace, CurricularFace, MarginSoftmaxHead, PartialFC, Sharding
from marginkernels.backends import reasons
from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2
from marginkernels.distributed.shard import local
from marginkernels.optim import SGD, AdamW, RowwiseAdagrad
from tests.support import workers
from tests.support.sharding import my_rows

F64, BF16 = torch.float64, torch.bfloat16
N, C, D = 12, 7, 6
OPTIMIZERS = {
    "SGD": (SGD, torch.optim.SGD, dict(lr=0.5, momentum=0.9, weight_decay=1e-2, nesterov=True)),
    "AdamW": (AdamW, torch.optim.AdamW, dict(lr=0.05, weight_decay=0.1)),
    "RowwiseAdagrad": (RowwiseAdagrad, None, dict(lr=0.1, weight_decay=1e-2)),
}


# the type of numbers by backend, and how near to each other two ways of a step come in it
DTYPES = {"reference": F64, "native": torch.float32}
NEAR = {"reference": {}, "native": dict(rtol=1e-3, atol=1e-5)}


def skip_without(kernels):
    if why_not := reasons(kernels, "cpu"):
        pytest.skip("; ".join(why_not))


def make(classes=C, sharding=None, **settings):
    settings = dict(margin=CosFace(0.2), scale=8.0, backend="reference") | settings
    settings = dict(dtype=DTYPES[settings["backend"]]) | settings
    return MarginSoftmaxHead(D, classes, sharding=sharding, **settings)


def batches(steps, classes=C, dtype=F64):
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(N, D, generator=generator, dtype=dtype)
        yield x, torch.randint(classes, (N,), generator=generator)


def whole(t):
    return t.detach().full_tensor() if isinstance(t, DTensor) else t.detach().clone()


def parameters(head):
    return {name: p for name in ("weight", "bias") if (p := getattr(head, name)) is not None}


def found(head, optimizer):
    """Returns the weights, the bias and their states, of all classes."""
    parts = {}
    for name, p in parameters(head).items():
        parts[name] = whole(p)
        parts |= {f"{name} {key}": whole(value) for key, value in optimizer.state[p].items()}
    return parts


def step_beside_others(name, classes, settings, sharding):
    """Compares each step with those of an unsharded head and of torch's optimizer."""
    fused, of_torch, rule = OPTIMIZERS[name]
    head = make(classes, Sharding(dist.group.WORLD, **sharding), **copy.deepcopy(settings))
    others = make(classes, **copy.deepcopy(settings)), copy.deepcopy(head)
    others[0].load_state_dict(head.full_state_dict())
    runs = [(model, fused(model, **rule)) for model in (head, others[0])]
    if of_torch is not None:
        runs.append((others[1], of_torch(parameters(others[1]).values(), **rule)))
    factor = dist.get_world_size() if sharding.get("grad_scale", "ddp") == "ddp" else 1
    rows, near = my_rows(N), NEAR[head.backend]
    for x, y in batches(3, classes, DTYPES[head.backend]):
        dx = []
        for model, optimizer in runs:
            is_split = model.shard is not None
            own = x[rows] if is_split else x
            own = own.clone().requires_grad_()
            model(own, y[rows] if is_split else y).backward()
            optimizer.step()
            optimizer.zero_grad()
            dx.append(own.grad if is_split else factor * own.grad[rows])
        assert head.weight.grad is None
        states = [found(*run) for run in runs]
        for its_dx, state in zip(dx[1:], states[1:], strict=True):
            torch.testing.assert_close(its_dx, dx[0], **near)
            torch.testing.assert_close(state, {key: states[0][key] for key in state}, **near)
    for p in parameters(head).values():
        for key, value in runs[0][1].state[p].items():
            assert key == "step" or value.placements == (Shard(0),)


@pytest.mark.parametrize(
    "kernels, sharding",
    [("reference", {}), ("native", dict(grad_scale="exact", max_local_batch=N))],
    ids=["reference", "native, exact, padded"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_each_rank_is_that_of_one_process_and_of_torch(name, kernels, sharding):
    """Covers rows that differ from rank to rank, and ranks without rows or without classes."""
    skip_without(kernels)
    settings = dict(backend=kernels)
    workers.run(3, step_beside_others, name, C, dict(settings, bias=True), sharding)
    workers.run(3, step_beside_others, name, 4, dict(settings, margin=CurricularFace()), sharding)


def bits(classes, kernels, sharded):
    """Trains in bfloat16, and returns weights and states.

    Sums in float64 are the same on any number of ranks, but for what no bfloat16 tells.
    """
    head = make(classes, dist.group.WORLD if sharded else None, dtype=BF16, backend=kernels)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(classes, D, generator=generator, dtype=BF16)
    head.load_state_dict({"weight": start})
    optimizer = AdamW(head, lr=1e-3, state_dtype=BF16)
    seeds = [None] * dist.get_world_size()
    dist.all_gather_object(seeds, optimizer.param_groups[0]["seed"])
    assert len(set(seeds)) == 1
    optimizer.param_groups[0]["seed"] = 2**40 + 1
    rows = my_rows(N) if sharded and dist.get_world_size() > 1 else slice(0, N)
    for x, y in batches(3, classes, DTYPES[kernels]):
        head(x[rows], y[rows]).backward()
        optimizer.step()
    return start, found(head, optimizer)


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("classes", [C, 4])
def test_rounding_draws_the_same_bits_on_any_number_of_ranks(classes, kernels):
    skip_without(kernels)
    start, alone = workers.run(1, bits, classes, kernels, False)[0]
    assert 0 < (alone["weight"] != start).float().mean() < 1  # steps far below an ulp
    for world in (1, 2, 3):
        for _, split in workers.run(world, bits, classes, kernels, True):
            differ = max((value != alone[key]).float().mean() for key, value in split.items())
            assert differ <= (0 if kernels == "reference" else 0.05)


def seeded_apart():
    torch.manual_seed(dist.get_rank())
    head = make(sharding=dist.group.WORLD)
    x, y = next(batches(1))
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="project: expected the same on all ranks, got False on r"):
        SGD(head, lr=0.1, project=rank == 1)
    with pytest.raises(ValueError, match="optimizer: expected the same on all ranks, got SGD on r"):
        (SGD if rank == 0 else RowwiseAdagrad)(head, lr=0.1)
    optimizer = SGD(head, lr=0.1, momentum=0.9)
    before = found(head, optimizer)

    def refused(match):
        with pytest.raises((ValueError, RuntimeError), match=match):
            head(x, y)

    for key, value in (("lr", 0.2), ("clip_row_norm", 1.0), ("seed", 5)):
        old = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value if rank == 1 else old
        refused(rf"optimizer: expected the same on all ranks, got .*'{key}'.* on rank 0")
        optimizer.param_groups[0][key] = old
    update = head._update
    head._update = update if rank == 1 else None
    refused("optimizer: expected the same on all ranks, got None on rank 0 and sgd")
    head._update = update
    weight = head.weight
    if rank == 1:
        head.weight = torch.nn.Parameter(weight.detach().clone())
    refused("weight: expected .*it has been replaced")
    head.weight = weight
    assert all(torch.equal(value, before[key]) for key, value in found(head, optimizer).items())


def test_what_ranks_do_not_agree_on_is_an_error_on_all():
    workers.run(2, seeded_apart)


class Steep(torch.nn.Module):
    """Is a margin with an infinite slope in the rows of one class."""

    def forward(self, c, rows):
        steep = torch.where(rows.label == C - 1, c, 0.0)
        return c - 0.2 + (steep - steep.detach() + (rows.label != C - 1)).sqrt()


def skip():
    """Skips a step where the infinite gradient arrives at the last rank alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    head = make(sharding=dist.group.WORLD, margin=Steep(), bias=True)
    other = copy.deepcopy(head)
    optimizer = SGD(head, lr=0.5, momentum=0.9, weight_decay=0.1, scaler=scaler)
    its_optimizer = SGD(other, lr=0.5, momentum=0.9, weight_decay=0.1)
    moved = []
    for x, y in batches(4):
        y[:] = y % (C - 1) if len(moved) % 2 else y
        before = found(head, optimizer)
        scaler.scale(head(x, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        after = found(head, optimizer)
        moved.append(not all(torch.equal(after[key], before[key]) for key in after))
        if moved[-1]:
            other(x, y).backward()
            its_optimizer.step()
            torch.testing.assert_close(after, found(other, its_optimizer))
    return moved


def test_a_step_that_the_loss_scale_skips_is_skipped_on_all_ranks():
    for moved in workers.run(3, skip):
        assert moved == [False, True, False, True]


def accumulate(settings):
    """Compares a step of three batches, not all of one size, with one of all rows at once."""
    head = make(4, dist.group.WORLD, reduction="sum", bias=True, **settings)
    other = copy.deepcopy(head)
    optimizer, its_optimizer = (AdamW(h, lr=0.1, weight_decay=0.1) for h in (head, other))
    rows = my_rows(N)
    for seed, (x, y) in enumerate(batches(2, 4)):
        x, y = x[rows], y[rows]
        cuts = [0, seed, len(x) // 2, len(x)]
        for first, end in itertools.pairwise(cuts[:3]):
            with optimizer.accumulate():
                head(x[first:end], y[first:end]).backward()
        head(x[cuts[2] :], y[cuts[2] :]).backward()
        other(x, y).backward()
        for each in (optimizer, its_optimizer):
            each.step()
        torch.testing.assert_close(found(head, optimizer), found(other, its_optimizer))


def test_accumulated_batches_of_ranks_equal_a_large_one():
    workers.run(3, accumulate, {})
    workers.run(2, accumulate, dict(label_smoothing=0.1))


MANY = 60  # of which a step takes some


def make_sampled(kind, backend, rate=0.3):
    """Makes a head that takes a sample of the classes in each step, the same in all processes."""
    if kind == "insightface":
        loss = CombinedMarginLoss(8.0, 1.0, 0.0, 0.3)
        return PartialFC_V2(loss, D, MANY, rate, backend=backend).to(DTYPES[backend])
    group = dist.group.WORLD if dist.is_initialized() else None
    return make(MANY, group, bias=True, sampling=PartialFC(rate, logq=True), backend=backend)


@torch.no_grad()
def step_rows(p, chosen, kind, settings, state):
    """Takes torch's step of some rows of a parameter, with their rows of the state."""
    rows = torch.nn.Parameter(local(p)[chosen])
    rows.grad = local(p.grad)[chosen]
    optimizer = kind([rows], **settings)
    optimizer.state[rows] = {key: t[chosen] if t.ndim else t for key, t in state.items()}
    optimizer.step()
    local(p)[chosen] = rows
    for key, t in optimizer.state[rows].items():
        if not t.ndim:
            state[key] = t
            continue
        state.setdefault(key, torch.zeros_like(local(p)))[chosen] = t
    p.grad = None


def step_a_sample(kind, name, kernels):
    """Compares steps with a loop that moves the rows of the sample, and their states, alone."""
    fused, of_torch, rule = OPTIMIZERS[name]
    head = make_sampled(kind, kernels)
    other = copy.deepcopy(head)
    optimizer = fused(head, **rule)
    states = {key: {} for key in parameters(other)}
    rows = my_rows(N) if dist.is_initialized() else slice(0, N)
    for seed, (x, y) in enumerate(batches(4, MANY, DTYPES[kernels])):
        for model in (head, other):
            torch.manual_seed(seed)  # insightface draws its sample from torch's generator
            model(x[rows], y[rows]).backward()
        optimizer.step()
        chosen = local(other.weight.grad).any(1).nonzero()[:, 0]
        assert 0 < len(chosen) < len(local(other.weight))
        for key, p in parameters(other).items():
            step_rows(p, chosen, of_torch, rule, states[key])
            ours = getattr(head, key)
            torch.testing.assert_close(whole(ours), whole(p), **NEAR[kernels])
            for part, value in states[key].items():
                torch.testing.assert_close(
                    local(optimizer.state[ours][part]), value, check_dtype=False, **NEAR[kernels]
                )


@pytest.mark.parametrize("kind, world", [("ours", 1), ("ours", 3), ("insightface", 2)])
@pytest.mark.parametrize("name, kernels", [("SGD", "reference"), ("AdamW", "reference"),
                                           ("AdamW", "native")])  # fmt: skip
def test_a_sampled_step_moves_the_sample_and_leaves_all_others_as_they_are(
    name, kernels, kind, world
):
    """Covers weight decay and momentum of rows outside, which stay, and biases."""
    skip_without(kernels)
    if world == 1:
        step_a_sample(kind, name, kernels)
    else:
        workers.run(world, step_a_sample, kind, name, kernels)


class NewTensors(TorchDispatchMode):
    """Notes the operators that return a new tensor of at least so many numbers."""

    def __init__(self, numbers, known):
        super().__init__()
        self.numbers, self.names = numbers, set()
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            large = isinstance(t, torch.Tensor) and t.numel() >= self.numbers
            if large and t.untyped_storage().data_ptr() not in self.known:
                self.names.add(func.name())
        return out


def test_a_sampled_step_copies_no_rows_of_the_weights(device, backend):
    names = []
    for fused in (False, True):
        head = MarginSoftmaxHead(
            64, 1000, margin=CosFace(0.2), scale=8.0, sampling=PartialFC(0.1), backend=backend,
            device=device,
        )  # fmt: skip
        held = [head.weight]
        if fused:
            held.append(SGD(head, lr=0.1, momentum=0.9).state[head.weight]["momentum_buffer"])
        x, y = torch.randn(4, 64, device=device), torch.arange(4, device=device)
        with NewTensors(100 * 64, held) as seen:
            head(x, y).backward()
        names.append(seen.names)
    assert any("head_bwd" in name for name in names[0]) and not names[1]


def refuse_a_margin_that_is_not_fused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = PartialFC_V2(lambda cosines, labels: 8 * cosines, D, C)
    SGD(head, lr=0.1)
    with pytest.raises(TypeError, match="margin_loss: expected a MarginLoss for an optimizer of"):
        head(torch.randn(2, D), torch.arange(2))


def test_a_head_of_insightface_with_a_margin_that_is_not_fused_is_refused():
    refuse_a_margin_that_is_not_fused()
    workers.run(2, refuse_a_margin_that_is_not_fused)
