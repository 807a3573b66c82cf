# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Converts checkpoints between formats, numbers of ranks and sets of classes, and loads them."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import marginkernels as mk
from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2
from marginkernels.convert import FORMATS, convert
from marginkernels.convert.__main__ import main
from marginkernels.convert.formats.insightface import split_evenly
from marginkernels.distributed.checkpoint import load_checkpoint, save_checkpoint

C, D = 21, 6
SGD = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)


class Trainer:
    """Trains a small network and PartialFC_V2 in one process, as insightface's trainer does."""

    def __init__(self, optimizer=SGD, seed=0):
        torch.manual_seed(seed)
        self.backbone = nn.Linear(4, D)
        loss = CombinedMarginLoss(64, 1.0, 0.0, 0.4)
        self.head = PartialFC_V2(loss, D, C, backend="reference")
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        self.optimizer = optimizer(groups, lr=0.1)

    def steps(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            x = torch.randn(16, 4, generator=generator)
            y = torch.randint(C, (16,), generator=generator)
            self.optimizer.zero_grad()
            self.head(self.backbone(x), y).backward()
            self.optimizer.step()
        return self

    def content(self, start=0, stop=C):
        """Returns what train_v2.py saves on the rank with these classes."""
        state = copy.deepcopy(self.optimizer.state_dict())
        last = state["state"].get(state["param_groups"][-1]["params"][-1], {})
        for key, value in last.items():
            if value.ndim:
                last[key] = value[start:stop].clone()
        return {
            "epoch": 3,
            "global_step": 40,
            "state_dict_backbone": self.backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": self.head.weight.detach()[start:stop].clone()},
            "state_optimizer": state,
            "state_lr_scheduler": {"last_epoch": 40, "_last_lr": [0.1]},
        }

    def save(self, folder: Path, ranks: int, name="checkpoint_gpu_{}.pt"):
        folder.mkdir(exist_ok=True)
        start, files = 0, []
        for rank, size in enumerate(split_evenly(C, ranks)):
            files.append(folder / name.format(rank))
            torch.save(self.content(start, start + size), files[-1])
            start += size
        return files

    def load(self, content):
        self.backbone.load_state_dict(content["state_dict_backbone"])
        self.head.load_state_dict(content["state_dict_softmax_fc"])
        self.optimizer.load_state_dict(content["state_optimizer"])
        return self


def loaded(file):
    return torch.load(file, weights_only=True)


def weights(k=1, seed=1):
    return torch.randn(C * k, D, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Returns whether two trees have the same values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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


def wrong_calls(folder: Path):
    """Returns calls that must fail, with a part of the error's text."""
    files = Trainer().steps(1, seed=1).save(folder / "8", 8)
    (folder / "7").mkdir()
    for rank in range(7):  # the first ranks have fewer classes
        (folder / "7" / files[rank].name).write_bytes(files[7 - rank].read_bytes())
    (folder / "steps").mkdir()
    for step in (1, 2):
        (folder / "steps" / f"checkpoint_step_{step}_gpu_0.pt").write_bytes(files[0].read_bytes())
    other = loaded(files[3])
    torch.save(other | {"global_step": 41}, folder / "checkpoint_gpu_3.pt")
    mixed = [*files[:3], folder / "checkpoint_gpu_3.pt", *files[4:]]
    torch.save({"a.W": weights(), "loss.W": weights()}, folder / "unclear.pt")
    torch.save({"W": weights().t()}, folder / "loss.pt")
    torch.save({"W": weights(), "projection.weight": weights()}, folder / "two.pt")
    torch.save({"weight": weights(), "bias": torch.zeros(C)}, folder / "bias.pt")
    (folder / "code.pt").write_bytes(b"PK")
    (folder / "short.txt").write_text("0\n1\n")
    (folder / "gap.txt").write_text("\n".join(map(str, [*range(C - 1), C])))
    (folder / "merge.txt").write_text("\n".join(["0"] * C))
    (folder / "twice.csv").write_text("\n".join(["0,0", *(f"{c},{c}" for c in range(C - 1))]))
    ours, loss = {"to": "marginkernels"}, [folder / "loss.pt"]
    insight = {"to": "insightface"}
    return [
        (files[:3] + files[4:], insight, "rank 3"),
        (files[:7], insight, "checkpoint_gpu_7.pt"),
        ([folder / "7"], insight, "of another run"),
        ([folder / "steps"], insight, "expected one set of files"),
        (mixed, insight, "global_step 40 as in"),
        (files, insight | {"world_size": C + 1}, "--world-size"),
        (files, ours | {"world_size": 2}, "--world-size"),
        (files, insight | {"num_classes": C + 1}, "--num-classes"),
        (files, {"to": "face"}, "--to: expected one of"),
        ([folder / "none.pt"], ours, "no such file"),
        ([folder / "code.pt"], ours, "expected a file of tensors"),
        ([folder / "two.pt"], ours, "--from chooses"),
        (loss, ours | {"source": "wespeaker"}, "--key names another"),
        (loss, ours | {"key": "V"}, "--key the name"),
        ([folder / "bias.pt"], insight, "no bias"),
        (loss, ours | {"sub_centers": 2}, "--sub-centers"),
        (loss, insight | {"sub_centers": 3}, "--reduce makes one"),
        (loss, ours | {"reduce": "mean"}, "--reduce"),
        (loss, ours | {"sub_centers": 3, "classes": folder / "merge7.txt"}, "no such file"),
        (loss, ours | {"classes": folder / "short.txt"}, "expected a new class for each of 21"),
        (loss, ours | {"classes": folder / "gap.txt"}, "got none for 20"),
        (loss, ours | {"classes": folder / "twice.csv"}, "with class 0 2 times"),
    ]


def test_what_does_not_fit_is_named_and_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for inputs, options, text in wrong_calls(tmp_path / "in"):
        with pytest.raises((ValueError, OSError)) as error:
            convert(inputs, tmp_path / "out" / "x.pt", **options)
        assert text in str(error.value), options
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "out").iterdir())


def test_files_are_replaced_when_asked_and_folders_never(tmp_path):
    torch.save({"W": weights().t()}, tmp_path / "loss.pt")
    out = tmp_path / "out.pt"
    out.write_text("mine")
    with pytest.raises(ValueError, match="--overwrite"):
        convert([tmp_path / "loss.pt"], out, "marginkernels")
    assert out.read_text() == "mine"
    convert([tmp_path / "loss.pt"], out, "marginkernels", overwrite=True)
    assert torch.equal(loaded(out)["head"]["weight"], weights())
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="expected a new folder"):
        convert([tmp_path / "loss.pt"], tmp_path / "run", "insightface", overwrite=True)


def test_state_of_a_sample_is_refused_and_can_be_left_out(tmp_path):
    content = Trainer().steps(1, seed=1).content()
    content["state_optimizer"]["state"][2]["momentum_buffer"] = torch.zeros(5, D)
    torch.save(content, tmp_path / "checkpoint_gpu_0.pt")
    inputs = [tmp_path / "checkpoint_gpu_0.pt"]
    with pytest.raises(ValueError, match=r"expected momentum_buffer \(21, 6\).*--drop-state"):
        convert(inputs, tmp_path / "out", "insightface", world_size=2)
    convert(inputs, tmp_path / "out", "insightface", world_size=2, drop_state=True)
    state = loaded(tmp_path / "out" / "checkpoint_gpu_1.pt")["state_optimizer"]["state"]
    assert list(state) == [0, 1]


def test_the_command_says_what_it_did_and_errors_are_one_line(tmp_path, monkeypatch, capsys):
    torch.save({"W": weights().t()}, tmp_path / "loss.pt")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        return main(), capsys.readouterr()

    code, said = run(tmp_path / "loss.pt", tmp_path / "out", "--to=insightface", "--world-size=2")
    assert code == 0
    assert f"{C} classes of {D}" in said.out
    code, said = run(tmp_path / "loss.pt", tmp_path / "out", "--to", "insightface")
    assert code == 1
    assert said.err.startswith("error: OUT: expected a new folder")
    assert said.err.count("\n") == 1


MEASURED = """
import sys
from pathlib import Path
from marginkernels.convert import convert
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) << 10
small, large, out, *formats = sys.argv[1:]
for to in formats:
    convert([small], f"{out}/small {to}", to)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    convert([large], f"{out}/{to}", to)
    print(resident("VmHWM") - before)
"""


def test_memory_is_that_of_blocks_and_not_of_the_classifier(tmp_path):
    formats = ["wespeaker", "transformers", "insightface", "distributed"]
    torch.save({"W": torch.zeros(8, 512).t()}, tmp_path / "small.pt")
    large = torch.zeros(512, 100_000)
    torch.save({"W": large}, tmp_path / "large.pt")
    arguments = [tmp_path / "small.pt", tmp_path / "large.pt", tmp_path, *formats]
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    freed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # goes back to the system at once
    done = subprocess.run(command, env=freed, check=True, stdout=subprocess.PIPE, text=True)
    for to, beyond in zip(formats, done.stdout.split(), strict=True):
        assert int(beyond) < large.nbytes / 2, to
