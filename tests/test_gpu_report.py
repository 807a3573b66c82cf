# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the runner of ``python -m benchmarks.gpu`` with parts made up."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import Command, Part

WORKS = "print('a line'); print('@row', '{\"ms\": 2.5}')"


def python(title, code, **more):
    return Command(title, [sys.executable, "-c", code], **more)


@pytest.fixture
def parts(monkeypatch):
    """Replaces the parts, and says that there is a GPU."""
    stages = {
        "good": [[python("first", WORKS), python("other", "pass", quiet=True)]],
        "bad": [
            [
                python("hangs", "import time; print('on'); time.sleep(60)"),
                python("ends", "exit(3)"),
            ],
            [Command("absent", ["/no/such/program"]), python("last", WORKS)],
        ],
    }
    parts = {name: Part(1, lambda found=found: found) for name, found in stages.items()}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: {"device": "made up"})


def run(monkeypatch, path, *options):
    command = ["gpu", "--report", str(path), "--budget", "16", *options]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    return json.loads(path.with_suffix(".json").read_text())["parts"]


def test_what_fails_is_told_and_the_rest_goes_on(parts, monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path / "r.txt")
    assert found["good"]["fates"] == {"first": "ok", "other": "ok"}
    assert found["good"]["rows"] == found["bad"]["rows"] == [{"ms": 2.5}]
    fates = found["bad"]["fates"]
    assert "not done after" in fates["hangs"] and fates["ends"] == "status 3"
    assert "does not start" in fates["absent"] and fates["last"] == "ok"
    text = (tmp_path / "r.txt").read_text()
    assert "first: a line" in text and "hangs: on" in text and "@row" not in text


def test_a_failing_test_is_named_before_the_summary(tmp_path):
    tests = tmp_path / "test_it.py"
    tests.write_text("def test_bad():\n    raise ValueError('why')\ndef test_good(): pass\n")
    command = [*gpu_parts.pytest("it", str(tests)).arguments, "--rootdir", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    before = done.stdout.partition("= FAILURES =")[0]
    assert "test_it.py::test_bad: ValueError: why" in before, done.stdout + done.stderr


def test_parts_that_are_done_are_left_out(parts, monkeypatch, tmp_path):
    path = tmp_path / "r.txt"
    run(monkeypatch, path, "--only", "good")
    for options, times in ((["--only", "good"], 1), (["--only", "good", "--again", "good"], 2)):
        run(monkeypatch, path, *options)
        assert path.read_text().count("first: a line") == times
