# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The choice of a backend for a device, and its report, with drivers and versions made up."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from marginkernels import backend_notes, backends
from marginkernels.backends import native, triton

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def nothing_selected(monkeypatch):
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(backends, "_warned", set())


@pytest.fixture
def machine(monkeypatch):
    """Makes one: the version of Triton, and the compute capability of each GPU."""

    def make(version, *capabilities, hip=None):
        def capability(device=None):
            index = getattr(device, "index", device)
            return capabilities[index or 0]

        monkeypatch.setattr(triton, "_triton_version", lambda: version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return make


@pytest.mark.parametrize(
    "version, capability, obstacle, note",
    [
        ((3, 5, 2), (8, 0), "needs triton >= 3.6, found 3.5.2", ""),
        ((3, 6, 0), (7, 5), "needs a GPU of compute capability 8.0, found 7.5", ""),
        ((3, 6, 0), (8, 9), "", ""),
        ((3, 6, 0), (9, 0), "", "triton 3.6.0 leaves out a fence"),
        ((3, 6, 1), (10, 0), "", "triton 3.6.1 leaves out a fence"),
        ((3, 7, 0), (9, 0), "", "triton 3.7.0 leaves out a fence"),
        ((3, 7, 0), (10, 0), "needs triton >= 3.7.1", "on compute capability 10.0"),
        ((3, 7, 0), (12, 0), "", ""),  # which has neither wgmma nor tcgen05
        ((3, 7, 1), (10, 0), "", ""),
        ((3, 9, 0), (9, 0), "", ""),
    ],
)
def test_triton_versions_and_capabilities(version, capability, obstacle, note, machine):
    pytest.importorskip("triton")
    machine(version, capability)
    found = backends.reasons("triton", "cuda")
    assert obstacle in "".join(found) and len(found) == bool(obstacle)
    assert note in "".join(backend_notes()["triton"]) and len(triton.notes()) == bool(note)


def test_amd_gpus_are_unmeasured(machine):
    machine((3, 6, 0), (9, 4), hip="7.0")
    assert "unmeasured" in triton.notes()[0]


@pytest.mark.parametrize(
    "text, version",
    [("3.7.0+git1234", (3, 7, 0)), ("3.6", (3, 6, 0)), ("3.10.1", (3, 10, 1))],
)
def test_the_patch_number_counts(text, version, monkeypatch):
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda _: text)
    assert triton._triton_version.__wrapped__() == version


def test_native_asks_the_runtime_for_the_tensors_device(machine, monkeypatch):
    asked = []

    def failure(device):
        asked.append(device)
        return "no kernel image is available for execution on the device" if device else ""

    info = {"cuda": "13.0", "cuda_architectures": ["8.0", "8.6"]}
    extension = SimpleNamespace(build_info=lambda: info, cuda_failure=failure)
    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(native, "_load_failure", [])
    machine((3, 9, 0), (8, 0), (9, 0))
    assert backends.reasons("native", FIRST) == backends.reasons("native", "cuda") == []
    (why_not,) = backends.reasons("native", SECOND)
    assert "built for compute capability 8.0, 8.6, got 9.0: no kernel image is" in why_not
    assert asked == [0, 0, 1]
    info["cuda"] = None
    assert "built without CUDA: " in backends.reasons("native", FIRST)[0]


def test_auto_goes_by_the_tensors_device_and_asks_once(machine, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(native, "unavailable_reasons", lambda *_: ["none here"])
    machine((3, 9, 0), (8, 0), (7, 5))
    with pytest.warns(RuntimeWarning, match="found 7.5.*native: none here"):
        chosen = [backends.select("auto", device, F32) for device in (FIRST, SECOND)]
    assert chosen == ["triton", "reference"]
    monkeypatch.setattr(backends, "reasons", None)  # a call of it fails
    assert [backends.select("auto", device, F32) for device in (FIRST, SECOND)] == chosen


def test_auto_says_once_that_only_the_reference_runs(monkeypatch):
    for module in (triton, native):
        monkeypatch.setattr(module, "unavailable_reasons", lambda *_: ["none here"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("auto", CPU, F64) == "reference"  # as everywhere
        assert backends.select("reference", "mps", F32) == "reference"
    for device in (CPU, torch.device("mps")):
        with pytest.warns(RuntimeWarning, match=f'"reference".*on {device.type}.*triton: none'):
            assert backends.select("auto", device, F32) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.select("auto", device, BF16) == "reference"


def test_a_named_backend_that_cannot_run_is_not_remembered(monkeypatch):
    monkeypatch.setattr(native, "unavailable_reasons", lambda *_: ["none here"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="backend: 'native' cannot run here: none here"):
            backends.select("native", CPU, F32)
