# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests the hint to the system that backs weights by huge pages."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from marginkernels.pages import in_huge_pages


@pytest.mark.skipif(sys.platform != "linux", reason="the hint is one to Linux")
def test_a_large_tensor_is_marked_for_huge_pages():
    t = in_huge_pages(torch.empty(16 << 20, dtype=torch.uint8))
    middle, flags, inside = t.data_ptr() + t.nbytes // 2, "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(area[1], 16) <= middle < int(area[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    assert "hg" in flags.split()


def test_tensors_without_memory_here_stay_as_they_are():
    with FakeTensorMode():
        fake = torch.empty(16 << 20)
    for t in (fake, torch.empty(16 << 20, device="meta"), torch.empty(0), torch.empty(3)):
        assert in_huge_pages(t) is t
