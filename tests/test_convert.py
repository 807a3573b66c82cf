# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Converts checkpoints between formats, numbers of ranks and sets of classes, and loads them."""

import zipfile

import pytest
import torch
from torch import nn

import marginkernels as mk
from marginkernels.convert import FORMATS, convert, files, rows, zips
from marginkernels.convert.formats.insightface import split_evenly
from marginkernels.convert.trees import leaves
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint
from tests.support.trained import SGD, C, D, Trainer, loaded, same, weights


@pytest.mark.parametrize("name", ["checkpoint_gpu_{}.pt", "checkpoint_step_40_gpu_{}.pt"])
@pytest.mark.parametrize("optimizer", [SGD, torch.optim.AdamW])
def test_eight_files_of_insightface_train_on_as_three_and_as_one(tmp_path, name, optimizer):
    first = Trainer(optimizer).steps(3, seed=1)
    files = first.save(tmp_path / "8", 8, name)
    convert(files, tmp_path / "3", "insightface", world_size=3)
    on_three = sorted((tmp_path / "3").iterdir())
    assert [file.name for file in on_three] == [name.format(rank) for rank in range(3)]
    start = 0
    for file, size in zip(on_three, split_evenly(C, 3), strict=True):
        assert same(loaded(file), first.content(start, start + size))
        start += size
    convert([tmp_path / "3"], tmp_path / "1", "insightface")
    [one] = (tmp_path / "1").iterdir()
    second = Trainer(optimizer, seed=9).load(loaded(one))
    assert same(first.steps(2, seed=2).content(), second.steps(2, seed=2).content())


def test_insightface_and_folders_of_ours_load_each_others_momentum(tmp_path):
    first = Trainer().steps(3, seed=1)
    lines = convert(first.save(tmp_path / "8", 8), tmp_path / "ours", "distributed")
    assert any("left out" in line for line in lines)
    head = Trainer(seed=9).head
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9)
    load_checkpoint(tmp_path / "ours", head, optimizer)
    assert torch.equal(head.weight, first.head.weight)
    [state] = optimizer.state_dict()["state"].values()
    content = first.content()["state_optimizer"]["state"]
    assert same(state, content[2])
    assert optimizer.param_groups[0]["lr"] == 0.1

    save_checkpoint(tmp_path / "again", head, optimizer)
    convert([tmp_path / "again"], tmp_path / "2", "insightface", world_size=2)
    start = 0
    for rank, size in enumerate(split_evenly(C, 2)):
        tree = loaded(tmp_path / "2" / f"checkpoint_gpu_{rank}.pt")
        stop = start + size
        assert torch.equal(tree["state_dict_softmax_fc"]["weight"], head.weight[start:stop])
        momentum = tree["state_optimizer"]["state"][0]["momentum_buffer"]
        assert torch.equal(momentum, state["momentum_buffer"][start:stop])
        start = stop


FLAT = ["metric-learning", "transformers", "wespeaker"]


@pytest.mark.parametrize(
    "to, file",
    [*((to, "a.pt") for to in sorted(FORMATS)), *((to, "a.safetensors") for to in FLAT)],
)
def test_every_format_comes_back_as_it_went(tmp_path, to, file):
    w = weights()
    torch.save({"head": {"weight": w}}, tmp_path / "head.pt")
    out = tmp_path / ("out" if FORMATS[to].folder else file)
    convert([tmp_path / "head.pt"], out, to)
    convert([out], tmp_path / "back.pt", "marginkernels")
    assert same(loaded(tmp_path / "back.pt"), {"head": {"weight": w}})
    with zipfile.ZipFile(tmp_path / "back.pt") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("to", sorted(FORMATS))
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_pass_in_small_blocks_arrive_in_their_places(
    tmp_path, monkeypatch, to, transposed
):
    for module in (rows, files, zips):
        monkeypatch.setattr(module, "BLOCK", 100)  # 4 rows
    w = weights()
    new = torch.randperm(C, generator=torch.Generator().manual_seed(0))
    new[new == 7] = -1
    new[new > 7] -= 1
    torch.save(new, tmp_path / "table.pt")
    torch.save({"W": w.t().contiguous()} if transposed else {"weight": w}, tmp_path / "in.pt")
    out = tmp_path / ("out" if FORMATS[to].folder else "out.pt")
    convert([tmp_path / "in.pt"], out, to, classes=tmp_path / "table.pt")
    convert([out], tmp_path / "back.pt", "marginkernels")
    [back] = [t for _, t in leaves(loaded(tmp_path / "back.pt"))]
    assert torch.equal(back[new[new >= 0]], w[new >= 0])


@pytest.mark.parametrize(
    "to, path",
    [
        ("metric-learning", ["W"]),
        ("transformers", ["objective.weight"]),
        ("adaface", ["state_dict", "head.kernel"]),
    ],
)
def test_transposed_weights_have_their_columns_in_the_order_of_the_classes(tmp_path, to, path):
    w = weights().bfloat16()
    torch.save({"projection.weight": w}, tmp_path / "model.pt")
    convert([tmp_path / "model.pt"], tmp_path / "out.pt", to)
    tree = loaded(tmp_path / "out.pt")
    for key in path:
        tree = tree[key]
    assert torch.equal(tree, w.t())
    assert tree.is_contiguous()


def test_safetensors_reads_what_is_written_and_the_rest_is_carried(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = {
        "objective.weight": weights().t().contiguous(),
        "wav2vec2.feature_projection.projection.weight": torch.randn(4, 4),
        "steps": torch.tensor(3),
        "half": torch.ones(3).half(),
    }
    safetensors.save_file(model, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "t.csv").write_text("old,new\n" + "\n".join(f"{c},{C - 1 - c}" for c in range(C)))
    convert(
        [tmp_path / "model.safetensors"],
        tmp_path / "out.safetensors",
        "transformers",
        classes=tmp_path / "t.csv",
    )
    out = safetensors.load_file(tmp_path / "out.safetensors")
    assert same(out, model | {"objective.weight": model["objective.weight"].flip(1)})


def test_an_optimizer_of_ours_goes_along_with_weight_and_bias(tmp_path):
    head = mk.MarginSoftmaxHead(
        D, C, margin=mk.CosFace(0.3), scale=16.0, bias=True, normalize="none", backend="reference"
    )
    optimizer = mk.optim.AdamW(head, lr=0.1)
    for seed in range(3):
        head(weights(seed=seed), torch.arange(C)).backward()
        optimizer.step()
    save_checkpoint(tmp_path / "run", head, optimizer)
    table = torch.arange(C) - 1  # drops class 0
    torch.save(table, tmp_path / "table.pt")
    convert([tmp_path / "run"], tmp_path / "a.pt", "marginkernels", classes=tmp_path / "table.pt")
    convert([tmp_path / "a.pt"], tmp_path / "b", "distributed")
    small = mk.MarginSoftmaxHead(
        D, C - 1, margin=mk.CosFace(0.3), scale=16.0, bias=True, normalize="none"
    )
    theirs = torch.optim.AdamW(small.parameters(), lr=0.2)
    load_checkpoint(tmp_path / "b", small, theirs)
    assert torch.equal(small.weight, head.weight[1:])
    assert torch.equal(small.bias, head.bias[1:])
    for p, q in ((small.weight, head.weight), (small.bias, head.bias)):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(theirs.state[p][key], optimizer.state[q][key][1:])
        assert theirs.state[p]["step"] == 3


def test_a_folder_keeps_the_backbone_its_state_and_what_is_extra(tmp_path):
    first = Trainer().steps(3, seed=1)
    model = nn.ModuleDict({"backbone": first.backbone, "head": first.head})
    save_checkpoint(tmp_path / "run", model, first.optimizer, extra={"epoch": 3})
    torch.save(torch.arange(C).flip(0), tmp_path / "table.pt")
    convert([tmp_path / "run"], tmp_path / "out", "distributed", classes=tmp_path / "table.pt")
    second = Trainer(seed=9)
    model = nn.ModuleDict({"backbone": second.backbone, "head": second.head})
    assert load_checkpoint(tmp_path / "out", model, second.optimizer, extra={}) == {"epoch": 3}
    old, new = first.content(), second.content()
    assert same(old["state_dict_backbone"], new["state_dict_backbone"])
    for tree in (old["state_dict_softmax_fc"], old["state_optimizer"]["state"][2]):
        tree.update({key: value.flip(0) for key, value in tree.items()})
    assert same(old, new)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_number_per_class_of_row_wise_adagrad_goes_along(tmp_path, transposed):
    w, total = weights(), torch.rand(C, 1)
    key = "head.kernel" if transposed else "weight"
    state = {0: {"step": torch.tensor(3.0), "sum": total.t() if transposed else total}}
    tree = {
        "state_dict": {key: w.t() if transposed else w, "head.t": torch.zeros(C)},
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    }
    torch.save(tree, tmp_path / "in.ckpt")
    torch.save(torch.arange(C).where(torch.arange(C) < C - 1, -1), tmp_path / "t.pt")
    to = "adaface" if transposed else "marginkernels"
    lines = convert([tmp_path / "in.ckpt"], tmp_path / "o.ckpt", to, classes=tmp_path / "t.pt")
    assert any("head.t (21,)" in line for line in lines)
    out = loaded(tmp_path / "o.ckpt")
    got, total_of = out["state_dict"][key], out["optimizer_states"][0]["state"][0]["sum"]
    if transposed:
        got, total_of = got.t(), total_of.t()
    assert torch.equal(got, w[:-1])
    assert torch.equal(total_of, total[:-1])


def test_a_table_drops_merges_and_renumbers_rows_and_their_momentum(tmp_path):
    first = Trainer().steps(3, seed=1)
    files = first.save(tmp_path / "8", 8)
    table = [-1, 0, 0, 1, *range(2, C - 2)]
    (tmp_path / "table.txt").write_text("\n".join(map(str, table)))
    lines = convert(
        files, tmp_path / "2", "insightface", world_size=2, classes=tmp_path / "table.txt"
    )
    assert any("1 dropped, 2 merged into 1" in line for line in lines)
    trees = [loaded(tmp_path / "2" / f"checkpoint_gpu_{rank}.pt") for rank in range(2)]
    w = torch.cat([tree["state_dict_softmax_fc"]["weight"] for tree in trees])
    momentum = torch.cat([t["state_optimizer"]["state"][2]["momentum_buffer"] for t in trees])
    old = first.head.weight.detach()
    direction = nn.functional.normalize(nn.functional.normalize(old[1:3]).mean(0), dim=0)
    merged = direction * old[1:3].norm(dim=1).mean()
    torch.testing.assert_close(w[0], merged)
    assert torch.equal(w[1:], old[3:])
    before = first.optimizer.state[first.head.weight]["momentum_buffer"]
    torch.testing.assert_close(momentum[0], before[1:3].mean(0))
    assert torch.equal(momentum[1:], before[3:])


def test_sub_centers_are_kept_and_reduced(tmp_path):
    k = 3
    w = weights(k)
    torch.save({"projection.weight": w}, tmp_path / "model.pt")
    inputs = [tmp_path / "model.pt"]
    convert(inputs, tmp_path / "kept.pt", "metric-learning", sub_centers=k)
    assert torch.equal(loaded(tmp_path / "kept.pt")["W"], w.t())

    torch.save(torch.arange(C) - 1, tmp_path / "table.pt")
    drop = {"classes": tmp_path / "table.pt", "sub_centers": k}
    convert(inputs, tmp_path / "dropped.pt", "metric-learning", **drop)
    assert torch.equal(loaded(tmp_path / "dropped.pt")["W"], w[k:].t())

    counts = torch.randint(100, (C, k), generator=torch.Generator().manual_seed(0))
    torch.save(counts, tmp_path / "counts.pt")
    reduced = {"reduce": str(tmp_path / "counts.pt"), "sub_centers": k}
    convert(inputs, tmp_path / "counted.pt", "wespeaker", **reduced)
    expected = w.view(C, k, D)[torch.arange(C), counts.argmax(1)]
    assert torch.equal(loaded(tmp_path / "counted.pt")["projection.weight"], expected)

    convert(inputs, tmp_path / "mean", "insightface", reduce="mean", sub_centers=k)
    got = loaded(tmp_path / "mean" / "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]["weight"]
    mean = nn.functional.normalize(w).view(C, k, D).mean(1)
    norm = w.norm(dim=1).view(C, k).mean(1, keepdim=True)
    torch.testing.assert_close(got, nn.functional.normalize(mean) * norm)
