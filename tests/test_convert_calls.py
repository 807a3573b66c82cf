# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Gives the converter what does not fit, and measures the memory of what does."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from marginkernels.convert import convert, files
from marginkernels.convert.__main__ import main
from tests.support.trained import C, D, Trainer, loaded, weights


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "ran"),)


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
    (folder / "cut.pt").write_bytes(b"PK")
    torch.save({"W": weights().t(), "code": Code(folder)}, folder / "code.pt")
    (folder / "short.txt").write_text("0\n1\n")
    (folder / "gap.txt").write_text("\n".join(map(str, [*range(C - 1), C])))
    (folder / "merge.txt").write_text("\n".join(["0"] * (C // 3)))
    (folder / "twice.csv").write_text("\n".join(["0,0", *(f"{c},{c}" for c in range(C - 1))]))
    (folder / "large.txt").write_text("\n".join(["9" * 20] * C))
    (folder / "latin.txt").write_bytes(b"\xff\n" * C)
    (folder / "empty.npy").write_bytes(b"")
    kinds = {"mask": torch.arange(C) > 0, "real": torch.ones(C), "complex": torch.ones(C) + 1j}
    for name, value in kinds.items():
        torch.save(value, folder / f"{name}.pt")
        np.save(folder / f"{name}.npy", value.numpy())
    with zipfile.ZipFile(folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        plain = zipfile.ZipFile(folder / "loss.pt")
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    torch.save({"W": torch._neg_view(weights().t())}, folder / "negated.pt")
    torch.save({"W": torch.empty(D, C, device="meta")}, folder / "meta.pt")
    torch.save({"W": weights().t(), "rest": torch.eye(3).to_sparse()}, folder / "sparse.pt")
    no_tables = {
        "large.txt": "large.txt: expected integers of 64 bits", "latin.txt": "latin.txt: expected",
        "empty.npy": "empty.npy: expected", "mask.pt": "got torch.bool; a mask",
        "mask.npy": "got bool; a mask", "real.pt": "got torch.float32", "real.npy": "got float32",
        "complex.pt": "got torch.complex64", "complex.npy": "got complex64",
    }  # fmt: skip
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
        ([folder / "cut.pt"], ours, "expected a file of tensors"),
        ([folder / "code.pt"], ours, "expected a file of tensors"),
        ([folder / "two.pt"], ours, "--from chooses"),
        (loss, ours | {"source": "wespeaker"}, "--key names another"),
        (loss, ours | {"key": "V"}, "got W (6, 21)"),
        ([folder / "bias.pt"], insight, "no bias"),
        (loss, ours | {"sub_centers": 2}, "--sub-centers"),
        (loss, insight | {"sub_centers": 3}, "--reduce makes one"),
        (loss, ours | {"reduce": "mean"}, "--reduce"),
        (loss, ours | {"sub_centers": 3, "classes": folder / "merge.txt"}, "no classes that merge"),
        (loss, ours | {"classes": folder / "short.txt"}, "expected a new class for each of 21"),
        (loss, ours | {"classes": folder / "gap.txt"}, "got none for 20"),
        (loss, ours | {"classes": folder / "twice.csv"}, "with class 0 2 times"),
        *((loss, ours | {"classes": folder / name}, text) for name, text in no_tables.items()),
        ([folder / "deflated.pt"], ours, "is compressed"),
        ([folder / "negated.pt"], ours, "lazily negated"),
        ([folder / "meta.pt"], ours, "meta tensor"),
        ([folder / "sparse.pt"], ours, "rest is of torch.sparse_coo"),
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
    assert not (tmp_path / "in" / "ran").exists()


@pytest.mark.parametrize("to", ["insightface", "wespeaker", "distributed"])
def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch, to):
    torch.save({"W": weights().t()}, tmp_path / "loss.pt")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.FileRows, "read", full)
    with pytest.raises(OSError, match="no space left"):
        convert([tmp_path / "loss.pt"], tmp_path / "out" / "x", to)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("to", ["adaface", "marginkernels", "wespeaker"])
def test_safetensors_is_no_ending_for_what_is_not_tensors_alone(tmp_path, monkeypatch, to):
    nested = {"projection.weight": weights(), "epoch": 3}
    source = nested if to == "wespeaker" else {"W": weights().t()}
    torch.save(source, tmp_path / "in.pt")
    monkeypatch.setattr(files, "save", lambda *_: pytest.fail("it began to write"))
    with pytest.raises(ValueError, match=r"OUT: .*out\.safetensors, where \w+ would be a"):
        convert([tmp_path / "in.pt"], tmp_path / "out.safetensors", to)


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
    assert "else" not in said.out  # there is nothing
    code, said = run(tmp_path / "out", tmp_path / "one", "--to=insightface")
    assert said.out.endswith(f"wrote insightface: {tmp_path / 'one'}, 1 file\n")
    code, said = run(tmp_path / "one", tmp_path / "back.pt", "--to=marginkernels")
    assert f"read insightface: 1 file, {tmp_path / 'one' / 'checkpoint_gpu_0.pt'}\n" in said.out
    code, said = run(tmp_path / "loss.pt", tmp_path / "out", "--to", "insightface")
    assert code == 1
    assert said.err.startswith("error: OUT: expected a new folder")
    assert said.err.count("\n") == 1


MEASURED = """
import sys
from pathlib import Path
from marginkernels.convert import convert, files
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
