# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs the short examples, which have to show what they say."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_quickstart_finds_the_people_in_new_photographs(capsys):
    first, five = map(float, re.findall(r"([\d.]+)%", printed("quickstart", capsys))[-2:])
    assert 90 < first <= five


def test_a_custom_margin_equals_the_dense_formula(capsys):
    differences = re.findall(r"difference (\S+)", printed("custom_margin", capsys))
    assert len(differences) == 2 and all(float(d) < 1e-5 for d in differences)


@pytest.mark.parametrize("name", ["custom_transform", "custom_backend"])
def test_what_is_registered_equals_what_it_is_compared_with(name):
    # in a process of its own, because what it registers would stay
    script = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"difference (\S+)", done.stdout)
    assert differences and all(float(d) < 1e-5 for d in differences)


def trained(ranks: int, steps: int, out: Path) -> dict[int, float]:
    """Runs the distributed example, and returns the losses that it prints by their steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = [str(EXAMPLES / "distributed.py"), f"--steps={steps}", f"--out={out}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), *script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step +(\d+): loss ([\d.]+)", done.stdout, re.M)
    return {int(step): float(loss) for step, loss in lines}


def test_the_distributed_example_goes_on_with_another_number_of_ranks(tmp_path):
    in_one_go = trained(2, 60, tmp_path / "whole")
    first = trained(2, 40, tmp_path / "parts")
    second = trained(1, 60, tmp_path / "parts")
    assert (list(first), list(second)) == ([20, 40], [60])
    assert first[40] < 0.7 * first[20]
    assert first | second == pytest.approx(in_one_go, rel=1e-2)


def test_a_share_of_the_labels_names_another_class(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import data

    _, faces, images = data.load()
    split = data.split(faces, images)
    one, other = (data.with_wrong_labels(split, 0.2, seed) for seed in (0, 1))
    wrong = one != split.labels
    assert wrong.sum() == round(0.2 * len(wrong))
    assert one.min() >= 0 and one.max() < split.num_classes
    assert one.equal(data.with_wrong_labels(split, 0.2, 0))
    # two draws share few wrong labels: a fifth of a fifth
    assert 0.03 < (wrong & (other != split.labels)).float().mean() < 0.05
