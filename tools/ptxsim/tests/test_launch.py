# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks launches, devices and counters."""

import numpy as np
import pytest

from tools import ptxsim
from tools.ptxsim import Device, Module

from .ptx_snippets import HEAD


def test_bank_conflicts():
    decl = ".shared .align 16 .b8 s[4096];\n"
    for stride, ways in [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1)]:
        decl = f".shared .align 16 .b8 s[{max(4, stride * 31 + 4)}];\n"
        o = np.zeros(32, np.uint32)
        src = f"""{HEAD}{decl}.visible .entry k(.param .u64 po) {{ .reg .b32 %r<4>, %o;
        mov.u32 %r1, %tid.x; mul.lo.u32 %r1, %r1, {stride}; mov.u32 %r2, s; add.u32 %r2, %r2, %r1;
        ld.shared.u32 %o, [%r2]; ret; }}"""
        s = Module.from_ptx(src).launch("k", 1, 32, [o])
        assert s.shared["ld.shared"] == [1, ways, 1], stride


def test_coalescing():
    for stride, sectors in [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)]:
        src = f"""{HEAD}.visible .entry k(.param .u64 p) {{ .reg .b32 %r<4>; .reg .b64 %d<4>;
        ld.param.u64 %d1, [p]; mov.u32 %r1, %tid.x; mad.wide.u32 %d2, %r1, {stride}, %d1;
        ld.global.u32 %r2, [%d2]; ret; }}"""
        s = Module.from_ptx(src).launch("k", 1, 64, [np.zeros(8192, np.uint8)])
        assert (s.global_load_requests, s.global_load_sectors) == (2, 2 * sectors if stride else 2)
        assert s.instructions["ld_global"] == 2 and s.global_load_bytes == 256


def test_device_api():
    d = Device()
    a = np.arange(10, dtype=np.int32)
    p, q = d.alloc(a, "a"), d.empty(64, "b")
    assert p % 256 == 0 and q - p > 40
    assert d.read(p + 8, np.int32, 3).tolist() == [2, 3, 4]
    d.write(p, np.array([7, 8], np.int32))
    assert a[:2].tolist() == [7, 8]
    assert np.isnan(d.read(q, np.float32, 16)).all()
    with pytest.raises(ValueError):
        d.read(p, np.int32, 11)
    d.free(q)
    with pytest.raises(KeyError):
        d.read(q, np.int32, 1)
    with pytest.raises(ValueError):
        d.alloc(np.zeros((4, 4))[:, ::2])


def test_argument_checks():
    m = Module.from_ptx(
        f"{HEAD}.visible .entry k(.param .u64 p, .param .b32 x) .reqntid 64 {{ ret; }}"
    )
    with pytest.raises(ValueError, match="2 arguments"):
        m.launch("k", 1, 64, [0])
    with pytest.raises(ValueError, match="requires block"):
        m.launch("k", 1, 32, [0, 1])
    m.launch("k", 1, 64, [0, 1.5])
    with pytest.raises(ValueError, match="shared memory per CTA"):
        m.launch("k", 1, 64, [0, 1], shared_bytes=228 * 1024)
    with pytest.raises(ValueError, match="out of range"):
        m.launch("k", (1, 70000), 64, [0, 1])


def test_sub_grid():
    o = np.zeros(128, np.uint32)
    src = f"""{HEAD}.visible .entry k(.param .u64 p) {{ .reg .b32 %r<4>; .reg .b64 %d<4>;
    ld.param.u64 %d1, [p]; mov.u32 %r1, %ctaid.x; shl.b32 %r2, %r1, 5; mov.u32 %r3, %tid.x;
    add.u32 %r2, %r2, %r3;
    mad.wide.u32 %d2, %r2, 4, %d1; st.global.u32 [%d2], 1; ret; }}"""
    Module.from_ptx(src).launch("k", 4, 32, [o], ctas=range(1, 3))
    assert o.reshape(4, 32).sum(1).tolist() == [0, 32, 32, 0]


@pytest.mark.parametrize("lanes", [8192, 32])
def test_overlapping_stores(lanes):
    src = f"""{HEAD}.visible .entry k(.param .u64 p, .param .u32 s) {{ .reg .b32 %r<6>;
    .reg .b64 %d<4>;
    ld.param.u64 %d1, [p]; ld.param.u32 %r4, [s]; mov.u32 %r1, %ctaid.x; mul.lo.u32 %r2, %r1, %r4;
    mov.u32 %r3, %tid.x;
    add.u32 %r2, %r2, %r3; mad.wide.u32 %d2, %r2, 4, %d1; st.global.u32 [%d2], %r1; ret; }}"""
    m = Module.from_ptx(src)
    m.launch("k", 4, 32, [np.zeros(128, np.uint32), 32], checks="strict", max_lanes=lanes)
    with pytest.raises(ptxsim.RaceError, match="different value"):
        m.launch("k", 4, 32, [np.zeros(128, np.uint32), 31], checks="strict", max_lanes=lanes)
    m.launch("k", 4, 32, [np.zeros(128, np.uint32), 31], max_lanes=lanes)
