# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the fixtures that several test modules use."""

from pathlib import Path

import pytest
import torch

from tools.ptxsim import Module, nvcc
from tools.ptxsim.syntax.parser import parse

from .operands import require_nvcc


@pytest.fixture(scope="session", params=["sm_80", "sm_90"])
def ptx(request):
    require_nvcc()
    source = Path(__file__).with_name("kernels.cu")
    defines = ["HOPPER"] if request.param == "sm_90" else []
    return nvcc.compile_to_ptx(source, arch=request.param, defines=defines)


@pytest.fixture(scope="session")
def parsed(ptx):
    return parse(ptx)


@pytest.fixture
def mod(parsed):
    return Module(parsed)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
