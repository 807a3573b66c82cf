# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs the training script for insightface's configurations, on tiny networks and generated images.

Most tests replace the network by a linear map, whose batches add up, unlike those of a network with
batch normalisation.
"""

import importlib
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import workers

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES, IMAGES, SIZE, D = 13, 52, 16, 8
CONSTANT = dict(num_epoch=10**7)  # the learning rate does not move in a few steps
Image = pytest.importorskip("PIL.Image")


def module(name):
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(f"insightface_{name}")


def linear(name, embedding_size, channels, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, embedding_size))


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Writes noise that its mirror image equals, four images of each class, as PNG."""
    root, generator = tmp_path_factory.mktemp("faces"), torch.Generator().manual_seed(0)
    for label in range(CLASSES):
        (root / f"person_{label:02}").mkdir()
        for number in range(4):
            half = torch.randint(256, (SIZE, SIZE // 2, 3), generator=generator, dtype=torch.uint8)
            pixels = torch.cat([half, half.flip(1)], 1).numpy()
            Image.fromarray(pixels).save(root / f"person_{label:02}" / f"{number}.png")
    return root


def trainer(faces, output, **changes):
    values = dict(
        rec=str(faces), output=str(output), num_classes=CLASSES, num_image=IMAGES, num_epoch=3,
        network="linear", embedding_size=D, image_size=SIZE, batch_size=8, lr=0.02, num_workers=0,
        margin_list=(1.0, 0.0, 0.2), save_all_states=True,
    )  # fmt: skip
    config = module("config").checked(values | changes)
    networks = module("networks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "make", linear)
        return module("train").Trainer(config, torch.device("cpu"))


def run(trainer, steps=None):
    """Trains some steps of one epoch, or all epochs that are left with checkpoints."""
    if steps is not None:
        return [loss.item() for loss, _ in zip(trainer.train_epoch(), range(steps), strict=False)]
    losses = []
    while trainer.epoch < trainer.config.num_epoch:
        losses += [loss.item() for loss in trainer.train_epoch()]
        trainer.save()
    return losses


def weights(trainer):
    return [p.detach().clone() for m in (trainer.backbone, trainer.head) for p in m.parameters()]


def close(ours, theirs):
    """Allows for rounding, which grows from step to step."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


VARIANTS = [
    dict(),
    dict(optimizer="adamw", lr=1e-3, sample_rate=0.5, gradient_acc=2),
    dict(fused_optimizer=True, fp16=True, sample_rate=0.5),
    dict(fused_optimizer=True, fp16=True, gradient_acc=3),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_run_that_goes_on_ends_with_the_weights_of_one_that_was_not_interrupted(
    faces, tmp_path, variant
):
    whole = trainer(faces, tmp_path, **variant)
    losses = run(whole)
    assert len(losses) == whole.total_steps and losses[-1] < losses[0]
    parts = trainer(faces, tmp_path / "parts", **variant)
    list(parts.train_epoch())
    (tmp_path / "parts").mkdir()
    parts.save()
    rest = trainer(faces, tmp_path / "parts", resume=True, **variant)
    assert (rest.epoch, rest.global_step) == (1, parts.global_step)
    assert run(rest) == losses[parts.global_step :]
    assert all(map(torch.equal, weights(rest), weights(whole)))
    saved = torch.load(tmp_path / "checkpoint_gpu_0.pt", weights_only=True)
    assert {
        "epoch", "global_step", "state_dict_backbone", "state_dict_softmax_fc", "state_optimizer",
        "state_lr_scheduler",
    } <= saved.keys()  # fmt: skip
    alone = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(alone["1.weight"], whole.backbone[1].weight)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_accumulated_batches_take_the_steps_of_larger_ones(faces, tmp_path, fused):
    common = dict(fused_optimizer=fused, **CONSTANT)
    large = trainer(faces, tmp_path, batch_size=12, **common)
    small = trainer(faces, tmp_path, batch_size=4, gradient_acc=3, **common)
    parts = torch.tensor(run(small, 12)).view(4, 3).mean(1)
    close(parts, torch.tensor(run(large, 4)))
    close(weights(small), weights(large))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_fused_optimizer_takes_the_steps_of_torch_and_goes_on_from_its_checkpoints(
    faces, tmp_path, optimizer
):
    settings = dict(optimizer=optimizer, lr=0.02 if optimizer == "sgd" else 1e-3)
    plain, fused = (trainer(faces, tmp_path, fused_optimizer=f, **settings) for f in (False, True))
    losses = run(plain)
    close(run(fused), losses)
    assert fused.head.weight.grad is None
    for first, then in ((False, True), (True, False)):
        begun = trainer(faces, tmp_path, fused_optimizer=first, **settings)
        list(begun.train_epoch())
        begun.save()
        rest = trainer(faces, tmp_path, fused_optimizer=then, resume=True, **settings)
        close(run(rest), losses[begun.global_step :])
        close(weights(rest), weights(plain))


def test_mixed_precision_follows_fp32_and_scales_the_loss(faces, tmp_path):
    exact = run(trainer(faces, tmp_path, **CONSTANT), 6)
    mixed = trainer(faces, tmp_path, fp16=True, **CONSTANT)
    losses = run(mixed, 6)
    assert losses != exact
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0)
    assert mixed.steps.scaler.get_scale() == 2**16


def ranks_of(faces, output, changes):
    ours = trainer(faces, output, **changes)
    start = weights(ours)
    return start, run(ours, 4), weights(ours)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_two_ranks_take_the_steps_of_one_with_their_rows(faces, tmp_path, fused):
    changes = dict(batch_size=4, fused_optimizer=fused, gradient_acc=2, **CONSTANT)
    results = workers.run(2, ranks_of, faces, tmp_path, changes)
    starts, losses, ends = zip(*results, strict=True)
    assert losses[0] == losses[1]
    one = trainer(faces, tmp_path, **changes | dict(batch_size=8))
    with torch.no_grad():
        one.head.weight.copy_(torch.cat([start[-1] for start in starts]))
        for own, given in zip(one.backbone.parameters(), starts[0], strict=False):
            own.copy_(given)
    close(losses[0], run(one, 4))
    close([*ends[0][:-1], torch.cat([end[-1] for end in ends])], weights(one))


NARROW = f"""
import sys
sys.path.append({str(EXAMPLES)!r})
import insightface_networks, insightface_train
insightface_networks.WIDTHS = (4, 4, 8, 8)
insightface_train.main()
"""


def test_torchrun_trains_a_sample_of_the_classes_on_two_ranks(faces, tmp_path):
    config = tmp_path / "small.py"
    config.write_text(
        f"""config = dict(
            rec={str(faces)!r}, num_classes={CLASSES}, num_image={IMAGES}, num_epoch=2,
            network="r18", embedding_size={D}, image_size={SIZE}, sample_rate=0.5, fp16=True,
            fused_optimizer=True, batch_size=8, frequent=1, num_workers=0, save_all_states=True,
        )"""
    )
    script = tmp_path / "narrow.py"
    script.write_text(NARROW)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(script), str(config), f"--set=output={tmp_path}/run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"Loss ([\d.]+) .* Epoch: (\d) +Global Step: (\d)", done.stdout)
    assert [(epoch, step) for _, epoch, step in steps] == [
        ("0", "1"), ("0", "2"), ("0", "3"), ("1", "4"), ("1", "5"), ("1", "6")
    ]  # fmt: skip
    saved = [torch.load(tmp_path / f"run/checkpoint_gpu_{rank}.pt") for rank in (0, 1)]
    assert [len(state["state_dict_softmax_fc"]["weight"]) for state in saved] == [7, 6]
    backbones = [state["state_dict_backbone"]["fc.weight"] for state in saved]
    assert torch.equal(*backbones)
    assert "Scale" not in done.stdout  # bfloat16 needs none
    wrong = subprocess.run(
        [*command, "--set=network=r51"], capture_output=True, text=True, env=environment
    )
    assert wrong.returncode == 1
    assert re.search("^error: network: expected r18, .* got 'r51'$", wrong.stderr, re.MULTILINE)
    assert "insightface_train.py" not in wrong.stderr  # no traceback but torchrun's own


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_resume_says_that_the_checkpoints_schedule_is_another(faces, tmp_path, caplog):
    logging.getLogger("insightface").addHandler(caplog.handler)
    trainer(faces, tmp_path).save()
    trainer(faces, tmp_path, resume=True)
    assert not caplog.records
    longer = trainer(faces, tmp_path, resume=True, num_epoch=5)
    assert longer.steps.schedules[0].total_iters == 18 and longer.total_steps == 30
    (message,) = {record.getMessage() for record in caplog.records}
    assert re.match("resume: .* rate is 0 after 18 batches; this configuration has 30", message)


def written(tmp_path, **values):
    path = tmp_path / "own.py"
    known = dict(rec="synthetic", num_classes=5, num_image=64, num_epoch=1, num_workers=0)
    path.write_text(f"config = {known | values!r}")
    return [str(path), f"--set=output={tmp_path}/run"]


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(sampel_rate=0.1), "sampel_rate: expected a key .* perhaps sample_rate"),
        (dict(num_classes="5"), "num_classes: expected a positive integer, got str '5'"),
        (dict(sample_rate=-1), "sample_rate: expected"),
        (dict(resume="yes"), "resume: expected a bool"),
        (dict(resume=True), "resume: expected .*checkpoint_gpu_0.pt .* found none"),
        (dict(optimizer="lamb"), "optimizer: expected sgd or adamw, got 'lamb'"),
        (dict(margin_list=(1.0, 0.5)), r"margin_list: expected \(m1, m2, m3\)"),
        (dict(margin_list=(1.35, 0.0, 0.0)), "m1, m2, m3: expected m1 = 1"),
        (dict(network="r51"), "network: expected r18, .* got 'r51'"),
        (dict(network="demo"), "network: expected channels, image size and embedding_size"),
        (dict(rec="/nowhere"), "rec: expected .* got /nowhere"),
        (dict(val_targets=["lfw"]), "val_targets: expected a file synthetic/lfw.bin"),
        (dict(batch_size=65), "batch_size, gradient_acc: expected at most 64 images"),
        (dict(fused_optimizer=True, gradient_acc=2, sample_rate=0.1), "gradient_acc: expected 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_before_training(tmp_path, values, message):
    small = dict(network="r18", image_size=SIZE, embedding_size=D, batch_size=16)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        module("train").main(written(tmp_path, **small | values))


def test_folders_that_do_not_fit_are_named_before_training(faces, tmp_path):
    with pytest.raises(ValueError, match=r"num_image: expected the 52 of .* got 51"):
        trainer(faces, tmp_path, num_image=51)
    with pytest.raises(ValueError, match=r"num_classes: expected the 13 of .* got 12"):
        trainer(faces, tmp_path, num_classes=12)
    with pytest.raises(ValueError, match="image_size: expected images of 112 x 112 pixels"):
        trainer(faces, tmp_path, image_size=112)
    (tmp_path / "train.rec").touch()
    with pytest.raises(FileNotFoundError, match=r"rec: .* mxnet's train.rec is not read"):
        trainer(tmp_path, tmp_path)


def test_configurations_of_insightface_load(tmp_path, caplog):
    logging.getLogger("insightface").addHandler(caplog.handler)
    head = "from easydict import EasyDict as edict\nconfig = edict()\n"
    (tmp_path / "base.py").write_text(
        head + "config.lr = 0.1\nconfig.seed = 7\nconfig.wandb_key = 'X'\nconfig.output = 'base'\n"
    )
    (tmp_path / "job.py").write_text(
        head + "config.lr = 0.4\nconfig.dali = True\nconfig.output = None\nconfig.num_epoch = 20\n"
        "config.warmup_epoch = config.num_epoch // 10\nconfig.rec = 'faces'\n"
        "config.num_classes = 9\nconfig.num_image = 90\n"
    )
    config = module("config").load(tmp_path / "job.py", {"num_image": 91})
    assert (config.lr, config.seed, config.warmup_epoch) == (0.4, 7, 2)
    assert (config.num_image, config.output) == (91, "work_dirs/job")
    assert {record.getMessage() for record in caplog.records} == {"dali: not here, and ignored"}
    assert "easydict" not in sys.modules


def test_a_folder_has_the_classes_of_its_folders_and_mirrors_half(faces):
    folder = module("data").Folder(faces, SIZE)
    images, labels = folder[[0, 5, 51]]
    assert labels.tolist() == [0, 1, 12] and images.shape == (3, 3, SIZE, SIZE)
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    uneven = torch.arange(SIZE * SIZE * 3, dtype=torch.uint8).view(SIZE, SIZE, 3)
    Image.fromarray(uneven.numpy()).save(folder.files[0])
    torch.manual_seed(0)
    images, _ = folder[[0] * 40]
    plain = uneven.permute(2, 0, 1) / 127.5 - 1
    same = [torch.allclose(image, plain) for image in images]
    assert 10 < sum(same) < 30
    assert all(s or torch.allclose(i, plain.flip(-1)) for s, i in zip(same, images, strict=True))


def test_pairs_of_insightface_are_read_and_judged_and_run_no_code(faces, tmp_path):
    verification = module("verification")
    files = [path.read_bytes() for path in sorted(faces.rglob("*.png"))]
    pairs = [(files[i], files[i if i % 2 else i + 1]) for i in range(40)]
    same = [i % 2 == 1 for i in range(40)]
    path = tmp_path / "pairs.bin"
    path.write_bytes(pickle.dumps(([image for pair in pairs for image in pair], same), protocol=2))
    target = verification.read_bin(path, SIZE)
    backbone = linear("linear", D, 3, SIZE)
    result = verification.judge(backbone, target)
    assert result.accuracy > 0.9
    close(result.cosine.flatten()[1::2], torch.ones(20))
    assert (result.cosine.flatten()[0::2] < 0.99).all()
    path.write_bytes(pickle.dumps(([Path("x")], same)))
    with pytest.raises(pickle.UnpicklingError, match="expected bytes and bools alone"):
        verification.read_bin(path, SIZE)


@pytest.mark.parametrize("name, count", [("r18", 24_025_600), ("r50", 43_590_848)])
def test_iresnet_has_the_parameters_of_insightface(name, count):
    with torch.device("meta"):
        network = module("networks").make(name, 512, 3, 112)
    assert sum(p.numel() for p in network.parameters()) == count
    names = dict(network.named_parameters())
    assert {
        "layer1.0.downsample.0.weight",
        "layer4.1.prelu.weight",
        "features.bias",
    } <= names.keys()
    assert not names["features.weight"].requires_grad
    small = module("networks").make("r18", D, 3, SIZE)
    assert small(torch.randn(2, 3, SIZE, SIZE)).shape == (2, D)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("insightface_configs/*.py")), ids=str)
def test_the_configurations_here_load_and_fit_their_data(path):
    config = module("config").load(path, {})
    assert config.output == f"work_dirs/{path.stem}"
    if config.rec in ("hanzi", "synthetic"):
        images = module("data").open_images(config)
        inputs, labels = images[[0, 4, 5]]
        assert inputs.shape == (3, images.shape[0], images.shape[1], images.shape[1])
        assert len(module("verification").load(config, images)) == len(config.val_targets)
        assert labels.tolist() == ([0, 1, 1] if config.rec == "hanzi" else [0, 4, 5])


@pytest.mark.parametrize("margin", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4)], ids=str)
def test_the_plain_head_of_the_parity_runs_takes_the_same_step(margin):
    pytest.importorskip("matplotlib")
    compat = importlib.import_module("marginkernels.compat.insightface")
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    y = torch.randint(CLASSES, (9,))
    results = []
    for kind in (module("parity").PlainPartialFC, compat.PartialFC_V2):
        torch.manual_seed(0)
        head = kind(compat.CombinedMarginLoss(64, *margin), D, CLASSES, loss_cap=compat.LOSS_CAP)
        head = head.double()
        loss = head(x, y)
        results.append([loss.detach(), *torch.autograd.grad(loss, [x, head.weight])])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
