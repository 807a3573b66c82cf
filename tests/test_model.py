# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the model of the GPU step with what was measured on one H200, at the commit it was."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tools.model import before, predict, predict_step
from tools.model.gpus import GPUS
from tools.model.step import of_step

MEASURED = json.loads(Path(before.__file__).with_name("h200.json").read_text())
TOTAL, KERNEL = 0.15, 0.20  # relative errors; of kernels that take a tenth of the step or more
# csrc/cuda walked each row twice, and its two waits for memory are not in the model
EXCEPT = {("native", "project_kernel")}


@pytest.mark.parametrize(
    "run", MEASURED["steps"], ids=lambda r: f"{r['backend']}-{r['weights']}-{r['shape']}"
)
def test_the_model_meets_the_measured_step(run):
    launches = before.step(run["backend"], run["shape"], run["weights"])
    prediction = of_step(launches, GPUS["H200"], before.codes())
    assert prediction.gpu_ms == pytest.approx(run["graph"], rel=TOTAL)
    predicted = {row.name: row for row in prediction.rows}
    for name, (calls, ms) in run["kernels"].items():
        if ms > 0.1 * run["graph"] and (run["backend"], name) not in EXCEPT:
            assert predicted[name].ms == pytest.approx(ms, rel=KERNEL), name
            assert predicted[name].calls == pytest.approx(calls, rel=0.05, abs=8), name


def test_the_prediction_of_todays_step_names_each_kernel_once():
    rows = predict((256, 100_000, 512), torch.bfloat16, "triton", "H200")
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and {"statistics_kernel", "gradient_kernel"} <= {*names}
    assert all(row.ms > 0 and row.calls > 0 for row in rows)


def test_gemms_have_the_flops_of_the_definition():
    n, c, d = shape = (256, 100_000, 512)
    flops = {row.name: row.flops for row in predict(shape, torch.bfloat16)}
    assert flops["dx GEMM"] == 2 * n * c * d


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kernel_of_a_step_has_counts_for_every_gpu(gpu):
    for backend in ("triton", "native"):
        for optimizer in ("", "fused"):
            step = predict_step((1024, 100_000, 512), torch.float32, backend, gpu, optimizer)
            assert step.gpu_ms > 0 and step.launches > 0
