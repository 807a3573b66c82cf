# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs the code of docs/recipes.md and docs/which_head.md."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import marginkernels as mk
from marginkernels.distributed import one_gather
from marginkernels.distributed.checkpoint import async_save_checkpoint, load_checkpoint
from marginkernels.distributed.shard import local
from marginkernels.optim import SGD
from tests.support import workers
from tests.support.sharding import Collectives

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "recipes.md"
RECIPES = dict(re.findall(r"<!-- run: ([\w ]+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S))
IN_ONE_PROCESS = ["frozen backbone", "frozen head", "extend", "average", "precision", "compile"]
CLASSES = 50


def batches(count=4, n=12):
    generator = torch.Generator().manual_seed(5)
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = [
        (torch.randn(n, 16, generator=generator), torch.randint(CLASSES, (n,), generator=generator))
        for _ in range(2 * count)
    ]
    return found[rank::2]


def scope(**more):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64))
    (images, labels), *_ = found = batches()
    names = dict(
        torch=torch, nn=nn, dist=dist, mk=mk, SGD=SGD, one_gather=one_gather,
        init_device_mesh=init_device_mesh, fully_shard=fully_shard, AveragedModel=AveragedModel,
        CosineAnnealingLR=CosineAnnealingLR, get_ema_multi_avg_fn=get_ema_multi_avg_fn,
        async_save_checkpoint=async_save_checkpoint, load_checkpoint=load_checkpoint,
        device="cpu", classes=CLASSES, backbone=backbone, batches=found, images=images,
        labels=labels,
    )  # fmt: skip
    return names | more


def test_every_block_of_code_is_run():
    blocks = PAGE.read_text().count("```python")
    assert blocks == len(RECIPES) and set(RECIPES) == {"large", "several", *IN_ONE_PROCESS}


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_recipes_in_one_process_train(name):
    head = mk.MarginSoftmaxHead(64, CLASSES, margin=mk.CosFace(0.4), scale=64.0)
    names = scope(head=head)
    names["optimizer"] = torch.optim.AdamW(
        [*names["backbone"].parameters(), *head.parameters()], lr=1e-3
    )
    names["new_people"] = [images for images, _ in names["batches"][:3]]
    before = [p.detach().clone() for p in (names["backbone"][0].weight, head.weight)]
    exec(RECIPES[name], names)
    moved = [
        not torch.equal(p, q)
        for p, q in zip((names["backbone"][0].weight, head.weight[:CLASSES]), before, strict=True)
    ]
    expected = {
        "frozen backbone": [False, True], "frozen head": [True, False], "extend": [False, False],
        "precision": [False, False],
    }  # fmt: skip
    assert moved == expected.get(name, [True, True])
    if name == "extend":
        assert head.num_classes == CLASSES + 3 and torch.equal(head.weight[-3:], names["means"])


def without_start(code):
    """Leaves out the process group, which the test has."""
    return code.replace("dist.init_process_group()\n", "")


def large(path, narrow, latest):
    given = dict(path=path, latest=latest, narrow=narrow)
    code = without_start(RECIPES["large"])
    names = scope(**given)
    exec(code, names)
    exec(code, other := scope(**given | dict(latest=path / "step_2", path=path / "again")))
    assert (names["step"], other["step"]) == (4, 6)
    for step in names["schedulers"]:
        assert step.last_epoch == 4
    weight = names["head"].weight.full_tensor()
    torch.testing.assert_close(load_and_compare(path / "step_4", narrow), weight, rtol=0, atol=0)
    return local(names["head"].weight).isfinite().all().item()


def load_and_compare(path, narrow):
    """Returns the weight of a head that the recipe has loaded, without a step."""
    names = scope(path=path.parent, latest=path, narrow=narrow, batches=[])
    exec(without_start(RECIPES["large"]).replace("save.result()", ""), names)
    return names["head"].weight.full_tensor()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_large_run_saves_in_the_background_and_goes_on(narrow, tmp_path):
    assert workers.run(2, large, tmp_path, narrow, None) == [True, True]


def several():
    _, labels = batches()[0]
    given = {name: labels % count for name, count in (("image", 50), ("text", 7), ("video", 9))}
    names = scope(labels=given)
    with Collectives() as seen:
        exec(RECIPES["several"], names)
    # of features once; for each head of numbers of rows, labels and sweep results
    moves = ("_allgather_base_", "_reduce_scatter_base_")
    assert [seen.counts[move] for move in moves] == [1 + 3 * 3, 1]
    backbone, heads, images = names["backbone"], names["heads"], names["images"]
    found = [p.grad.clone() for p in backbone.parameters()]
    weights = [local(head.weight.grad).clone() for head in heads.values()]
    backbone.zero_grad()
    heads.zero_grad()
    sum(head(backbone(images), given[name]) for name, head in heads.items()).backward()
    for one, each in zip(found, backbone.parameters(), strict=True):
        torch.testing.assert_close(one, each.grad, rtol=1e-4, atol=1e-6)
    for one, head in zip(weights, heads.values(), strict=True):
        assert torch.equal(one, local(head.weight.grad))
    return True


def test_several_heads_on_one_gather_learn_what_they_would_alone():
    assert workers.run(2, several) == [True, True]


def test_every_head_of_the_page_on_settings_trains():
    names = dict(mk=mk, classes=CLASSES, epoch=100, counts=torch.randint(1, 200, (CLASSES,)))
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "which_head.md").read_text(), re.S):
        exec(code, names)
    heads = [value for value in names.values() if isinstance(value, mk.MarginSoftmaxHead)]
    for head in heads:
        x = torch.randn(4, head.embedding_size, requires_grad=True)
        head(x, torch.arange(4)).backward()
        assert x.grad.isfinite().all() and x.grad.any() and head.weight.grad.any()
    assert len(heads) == 13


def gather_of_changed_rows():
    """Changes the embeddings between two heads on rank 0 alone, and in place on all ranks."""
    torch.manual_seed(0)
    head = mk.MarginSoftmaxHead(8, 5, margin=mk.CosFace(0.3), scale=8.0, sharding=dist.group.WORLD)
    x, y = torch.randn(4, 8), torch.arange(4)
    with torch.inference_mode(), one_gather():
        assert torch.equal(head(x.clone(), y), head(x, y))
    with torch.no_grad(), one_gather():
        first = head(x, y)
        x.mul_(-1)
        assert not torch.equal(head(x, y), first)
        assert torch.equal(head(x, y), head(x.clone(), y))
        if dist.get_rank() == 0:
            x.mul_(2)
        with pytest.raises(ValueError, match="x: expected the same on all ranks"):
            head(x, y)
    return True


def test_one_gather_sees_changes_of_the_embeddings():
    assert workers.run(2, gather_of_changed_rows) == [True, True]
