# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes heads on the meta device, and resets them after ``to_empty``."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from marginkernels import (
    AdaMSoftmax,
    ArcFace,
    CosFace,
    InterClassFilter,
    MarginSoftmaxHead,
    NSoftmax,
    PartialFC,
)
from marginkernels.compat import insightface
from tests.support import workers
from tests.support.losses import C
from tests.support.stateful import STATEFUL, batches, same, state_of

GIVEN = {
    "number": lambda: dict(margin=ArcFace(torch.tensor(0.3)), scale=torch.tensor(16.0)),
    "learnable": lambda: dict(
        margin=InterClassFilter(CosFace(torch.nn.Parameter(torch.tensor(0.2)))),
        scale=torch.nn.Parameter(torch.tensor(16.0)),
    ),
    "table": lambda: dict(margin=ArcFace(torch.linspace(0.1, 0.4, C)), scale=16.0),
}


def emptied(head):
    """Moves a head to memory with any content: here NaN, and numbers that no counter has."""
    head = head.to_empty(device="cpu")
    for t in (*head.parameters(), *head.buffers()):
        t.data.fill_(math.nan if t.is_floating_point() else -(2**40))
    return head


@pytest.mark.parametrize("name", [*STATEFUL, *GIVEN])
def test_what_is_remembered_or_given_is_restored(name):
    """Puts the head alone on meta, or everything that has no value of the user's."""
    make = (STATEFUL | GIVEN)[name]
    expected = state_of(MarginSoftmaxHead(8, C, **make()))
    heads = [MarginSoftmaxHead(8, C, **make(), device="meta")]
    if name in STATEFUL:
        with torch.device("meta"):
            heads.append(MarginSoftmaxHead(8, C, **make()))
    for head in heads:
        assert head.weight.is_meta
        head = emptied(head)
        head.reset_parameters()
        assert same(expected, state_of(head)) and head.weight.detach().std() == pytest.approx(
            0.01, rel=0.2
        )
        assert all(head(x, y).isfinite() for x, y in batches())
        head.reset_parameters()  # restores the state after training too
        assert same({k: v for k, v in expected.items() if "extra" not in k}, state_of(head))


def test_margins_that_are_drawn_are_drawn_again():
    with torch.device("meta"):
        head = MarginSoftmaxHead(8, C, margin=AdaMSoftmax(C), scale=16.0, bias=True)
    head = emptied(head)
    head.reset_parameters()
    assert 0.3 <= head.margin.m.min() < head.margin.m.max() <= 0.4 and not head.bias.any()


def test_values_that_never_were_are_not_made_up():
    with torch.device("meta"):
        head = MarginSoftmaxHead(8, C, margin=ArcFace(torch.rand(C)), scale=torch.tensor(16.0))
    head = emptied(head)
    with pytest.warns(UserWarning, match="meta device") as warned:
        head.reset_parameters()
    assert {str(w.message).split(" NaN")[0] for w in warned} == {"scale:", "ArcFace: m:"}
    with pytest.raises(ValueError, match=r"scale: .*nan"):
        head(*batches()[0])
    head.scale.fill_(16.0)
    with pytest.raises(ValueError, match=r"margin: .*nan"):
        head(*batches()[0])
    head.margin.m.fill_(0.2)
    assert head(*batches()[0]).isfinite()


@pytest.mark.parametrize(
    "kind", [float, torch.tensor, lambda v: torch.nn.Parameter(torch.tensor(v))]
)
def test_what_took_the_place_of_the_given_is_restored(kind):
    head = MarginSoftmaxHead(8, C, margin=ArcFace(kind(0.3)), scale=kind(16.0))
    head.margin.m, head.scale = (torch.nn.Parameter(torch.tensor(v)) for v in (0.2, 3.0))
    before = state_of(head)
    assert before["margin.m"] == 0.2 and before["scale"] == 3
    head = emptied(head)
    head.reset_parameters()
    assert same(before, state_of(head))


def whole_again():
    """Returns the margin of a head that fully_shard split and put together, after a reset."""
    margin = ArcFace(torch.nn.Parameter(torch.linspace(0.1, 0.4, C)))
    head = MarginSoftmaxHead(8, C, margin=margin, scale=16.0)
    fully_shard(head, mesh=dist.init_device_mesh("cpu", (2,)))
    head.reshard()
    with torch.no_grad():
        margin.m.fill_(0.0)
    head.unshard()
    head.reset_parameters()
    return margin.m.tolist()


def test_the_parts_of_fully_shard_are_not_given():
    for m in workers.run(2, whole_again):
        assert m == torch.linspace(0.1, 0.4, C).tolist()


def test_a_sampling_head_on_meta():
    with torch.device("meta"):
        head = MarginSoftmaxHead(8, C, margin=NSoftmax(), scale=16.0, sampling=PartialFC(0.7))
        assert head.sampler.get_extra_state().device.type == "cpu"
    head = emptied(head)
    head.reset_parameters()
    first, second = (head(*batches()[0]) for _ in range(2))
    assert first.isfinite() and first != second


def test_the_heads_of_insightface_on_meta():
    margin = insightface.ArcFace()
    with torch.device("meta"):
        head = insightface.PartialFC_V2(margin, 8, C, sample_rate=0.5)
    trained = insightface.PartialFC_V2(margin, 8, C, sample_rate=0.5).state_dict()
    head.to_empty(device="cpu").load_state_dict(trained)
    assert head(*batches()[0]).isfinite()


def on_meta(margin, context):
    torch.manual_seed(dist.get_rank())
    settings = dict(scale=16.0, sampling=PartialFC(0.7), sharding=dist.group.WORLD)
    if context:
        with torch.device("meta"):
            head = MarginSoftmaxHead(8, C, margin=margin(), **settings)
    else:
        head = MarginSoftmaxHead(8, C, margin=margin(), device="meta", **settings)
    head = emptied(head)
    head.reset_parameters()
    loss = head(*batches()[0])
    loss.backward()
    return loss.item(), {k: v.tolist() for k, v in head.full_state_dict().items()}


def adam():
    return AdaMSoftmax(C)


@pytest.mark.parametrize("context", [False, True])
def test_sharded_heads_agree_on_what_they_draw(context):
    first, second = workers.run(2, on_meta, adam, context)
    assert first == second and math.isfinite(first[0])
    weight = torch.tensor(first[1]["weight"])
    assert len(weight.unique(dim=0)) == C and weight.std() == pytest.approx(0.01, rel=0.2)
