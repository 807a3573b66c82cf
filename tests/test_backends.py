# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the choice of a backend for a device, and its report, with drivers and versions made up."""

import importlib.metadata
import math
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from marginkernels import (
    ArcFace,
    backend_notes,
    backend_report,
    backends,
    margin_cross_entropy,
)
from marginkernels.backends import triton
from marginkernels.backends.native import NativeBackend
from marginkernels.backends.reference import ReferenceBackend
from marginkernels.backends.triton import TritonBackend, vendor_gemm
from tests.support import workers
from tests.support.backends import StandIn
from tests.support.problems import random_problem
from tests.support.sharding import my_shard

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def nothing_selected():
    backends.forget_selections()
    yield
    backends.forget_selections()


@pytest.fixture
def without_native():
    with backends.registered(StandIn("native", "none here")):
        yield


@pytest.fixture
def machine(monkeypatch):
    """Makes up the version of Triton, and the compute capability of each GPU."""

    def make(version, *capabilities, hip=None, architecture=""):
        def capability(device=None):
            index = getattr(device, "index", device)
            return capabilities[index or 0]

        monkeypatch.setattr(triton, "installed_version", lambda: version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        properties = SimpleNamespace(gcnArchName=architecture)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
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
    notes = backend_notes()["triton"]
    assert note in "".join(notes) and len(notes) == bool(note)


def test_amd_gpus_other_than_the_one_compiled_for_are_refused(machine):
    pytest.importorskip("triton")
    machine((3, 6, 0), (9, 4), hip="7.0", architecture="gfx942:sramecc+:xnack-")
    assert backends.reasons("triton", "cuda") == []
    assert "unmeasured" in TritonBackend().notes()[0]
    machine((3, 6, 0), (9, 0), hip="7.0", architecture="gfx90a:sramecc+:xnack-")
    (why_not,) = backends.reasons("triton", "cuda")
    assert "gfx942" in why_not and "found gfx90a" in why_not


@pytest.mark.parametrize(
    "text, version",
    [("3.7.0+git1234", (3, 7, 0)), ("3.6", (3, 6, 0)), ("3.10.1", (3, 10, 1))],
)
def test_the_patch_number_counts(text, version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: text)
    triton.installed_version.cache_clear()
    try:
        assert triton.installed_version() == version
    finally:
        triton.installed_version.cache_clear()


def test_native_asks_the_runtime_for_the_tensors_device(machine):
    asked = []

    def failure(device):
        asked.append(device)
        return "no kernel image is available for execution on the device" if device else ""

    info = {"cuda": "13.0", "cuda_architectures": ["8.0", "8.6"]}
    extension = SimpleNamespace(build_info=lambda: info, cuda_failure=failure)
    native = NativeBackend(extension, [])
    machine((3, 9, 0), (8, 0), (9, 0))
    assert native.unavailable_reasons(FIRST) == []
    assert native.unavailable_reasons(torch.device("cuda")) == []
    (why_not,) = native.unavailable_reasons(SECOND)
    assert "built for compute capability 8.0, 8.6, got 9.0: no kernel image is" in why_not
    assert asked == [0, 0, 1]
    info["cuda"] = None
    assert "built without CUDA: " in native.unavailable_reasons(FIRST)[0]


def test_auto_goes_by_the_tensors_device_and_asks_once(machine, without_native):
    pytest.importorskip("triton")
    asked = []

    class Counting(TritonBackend):
        def unavailable_reasons(self, device=None, compute_dtype=None):
            asked.append(device)
            return super().unavailable_reasons(device, compute_dtype)

    machine((3, 9, 0), (8, 0), (7, 5))
    with backends.registered(Counting()):
        with pytest.warns(RuntimeWarning, match="found 7.5.*native: none here"):
            chosen = [backends.select("auto", device, F32) for device in (FIRST, SECOND)]
        assert chosen == ["triton", "reference"]
        assert [backends.select("auto", device, F32) for device in (FIRST, SECOND)] == chosen
    assert asked == [FIRST, SECOND]


def test_auto_takes_native_on_gpus_and_for_work_where_it_is_faster(machine, monkeypatch):
    pytest.importorskip("triton")
    machine((3, 9, 0), (9, 0), (10, 0))
    monkeypatch.setattr(backends, "NATIVE_UP_TO", {(9, 0): 1000})
    with backends.registered(StandIn("native")):
        works = (10, 1000, 1001, math.inf)
        assert [backends.select("auto", FIRST, BF16, work) for work in works] == [
            "native", "native", "triton", "triton",
        ]  # fmt: skip
        assert backends.select("auto", SECOND, BF16, 10) == "triton"
        assert backends.select("triton", FIRST, BF16, 10) == "triton"
    with backends.registered(StandIn("native", "none here")):
        assert backends.select("auto", FIRST, BF16, 10) == "triton"


def test_auto_says_once_that_only_the_reference_runs(without_native):
    with backends.registered(StandIn("triton", "none here")):
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


def test_a_named_backend_that_cannot_run_is_not_remembered(without_native):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="backend: 'native' cannot run here: none here"):
            backends.select("native", CPU, F32)


class Borrowed(ReferenceBackend):
    """Computes like the reference, under a name and with a priority of its own."""

    name = "borrowed"
    priority = 100
    caveat = ""


def test_a_backend_is_added_by_registering_an_object():
    before = backend_report()
    with backends.registered(Borrowed()):
        assert backend_report() == {"borrowed": []} | before
        assert backends.select("auto", CPU, F32) == "borrowed"
        problem = random_problem(5, 7, 3, margin=ArcFace(0.3), scale=16.0)
        ours, theirs = (problem.solve_fused(backend) for backend in ("borrowed", "reference"))
        assert all(map(torch.equal, ours, theirs))
        problem.settings["save_tiles"] = True
        with pytest.raises(ValueError, match="save_tiles: cannot be True with backend 'borrowed'"):
            problem.solve_fused("borrowed")
    assert backend_report() == before
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of"):
        backends.select("borrowed", CPU, F32)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_a_name_is_registered_once(name):
    with pytest.raises(ValueError, match=f"backend: expected a name other than .*, got '{name}'"):
        backends.register(type("Again", (Borrowed,), dict(name=name))())


def test_settings_that_forbid_fp32_products_are_off_during_one(monkeypatch):
    tuned, seen = [True], []
    matmul, tunable = torch.backends.cuda.matmul, torch.cuda.tunable
    monkeypatch.setattr(tunable, "is_enabled", lambda: tuned[-1])
    monkeypatch.setattr(tunable, "enable", tuned.append)
    monkeypatch.setattr(vendor_gemm, "_fp32_from_half", lambda a: True)
    matmul.allow_fp16_accumulation = True

    class Products:
        class mm:  # noqa: N801, its name in torch.ops.aten
            @staticmethod
            def dtype_out(*args, out):
                seen.append((tuned[-1], matmul.allow_fp16_accumulation))
                raise ValueError("planted")

    monkeypatch.setattr(torch.ops, "aten", Products)
    try:
        with pytest.raises(ValueError, match="planted"):
            vendor_gemm.mm(*(torch.ones(2, 2, dtype=BF16) for _ in range(3)))
        assert seen == [(False, False)] and tuned[-1] and matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = False


def works_of_a_sharded_call(rows):
    asked = []

    def select(backend, device, compute_dtype, work):
        asked.append(work)
        return "reference"

    with mock.patch.object(backends, "select", select):
        margin_cross_entropy(
            torch.ones(rows, 4), torch.ones(5, 4), torch.zeros(rows, dtype=torch.int64),
            margin=ArcFace(), scale=8.0, shard=my_shard(10),
        )  # fmt: skip
    return asked


def test_auto_is_asked_for_the_rows_of_all_ranks():
    assert workers.run(2, works_of_a_sharded_call, 3) == [[2 * 3 * 5 * 4]] * 2
