# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs instructions that the lanes of a warp execute together."""

import numpy as np
import pytest

from tools import ptxsim
from tools.ptxsim import Module

from .ptx_snippets import HEAD, run, u32


def test_movmatrix_and_stmatrix():
    x = u32()
    m = x.view(np.uint16).reshape(8, 8)
    o = run("movmatrix.sync.aligned.m8n8.trans.b16 %o, %a0;", [x])
    assert np.array_equal(o.view(np.uint16).reshape(8, 8), m.T)
    decl = ".shared .align 16 .b8 s[128];\n"
    body = """mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 7; shl.b32 %r2, %r2, 4; mov.u32 %r3, s;
    add.u32 %r2, %r2, %r3;
    stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r2], {%a0}; bar.warp.sync -1;
    shl.b32 %r4, %r1, 2; add.u32 %r4, %r4, %r3; ld.shared.u32 %o, [%r4];"""
    assert np.array_equal(run(body, [x], decl=decl).view(np.uint16).reshape(8, 8), m.T)


def test_warp_sync_waits_for_lanes_that_come_from_later_code():
    body = """mov.u32 %r1, %laneid; setp.lt.u32 %x, %r1, 16; mov.u32 %r2, 0; mov.u32 %r5, %a0;
    @%x bra FAR;
    BACK: shfl.sync.bfly.b32 %o, %r5, 16, 31, 0xffffffff; bra END;
    FAR: add.u32 %r5, %r5, 1; add.u32 %r2, %r2, 1; setp.lt.u32 %y, %r2, 3; @%y bra FAR; bra BACK;
    END:"""
    x = u32(64)
    o = run(body, [x], grid=2)
    v = x + np.where(np.arange(64) % 32 < 16, 3, 0).astype(np.uint32)
    assert np.array_equal(o, v[np.arange(64) ^ 16])


def test_warp_sync_does_not_wait_for_exited_lanes():
    src = f"""{HEAD}.visible .entry k(.param .u64 p) {{ .reg .b32 %r<6>; .reg .b64 %d<4>;
    .reg .pred %x;
    ld.param.u64 %d1, [p]; mov.u32 %r1, %laneid; mad.wide.u32 %d2, %r1, 4, %d1;
    setp.ge.u32 %x, %r1, 16; @%x bra OUT;
    shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffffffff; st.global.u32 [%d2], %r2; ret;
    OUT: st.global.u32 [%d2], 77; ret; }}"""
    o = np.zeros(32, np.uint32)
    with pytest.raises(ptxsim.WarpSyncError, match="exited without"):
        Module.from_ptx(src).launch("k", 1, 32, [o])
    Module.from_ptx(src.replace("0xffffffff", "0xffff")).launch("k", 1, 32, [o])
    assert o.tolist() == [k ^ 1 for k in range(16)] + [77] * 16
    loose = ptxsim.Checks(exited_at_barrier=False)
    o[:] = 0
    Module.from_ptx(src).launch("k", 1, 32, [o], checks=loose)
    assert o.tolist() == [k ^ 1 for k in range(16)] + [77] * 16
    with pytest.raises(ptxsim.WarpSyncError, match="does not execute"):
        Module.from_ptx(src.replace("%r1, 1, 31", "%r1, 16, 31")).launch(
            "k", 1, 32, [o], checks=loose
        )
    src2 = src.replace("OUT: st", "OUT: bar.warp.sync 0xffffffff; st")  # two different instructions
    with pytest.raises(ptxsim.WarpSyncError, match="never reached by lanes"):
        Module.from_ptx(src2).launch("k", 1, 32, [o])


def test_mma_needs_the_whole_warp():
    src = f"""{HEAD}.visible .entry k() {{ .reg .b32 %r<9>; .reg .f32 %f<5>; .reg .pred %x;
    mov.u32 %r1, %laneid; setp.eq.u32 %x, %r1, 5; @%x bra SKIP;
    mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32
    {{%f1,%f2,%f3,%f4}},{{%r1,%r2}},{{%r3}},{{%f1,%f2,%f3,%f4}};
    SKIP: bar.warp.sync 0xffffffff; ret; }}"""
    with pytest.raises(ptxsim.WarpSyncError):
        Module.from_ptx(src).launch("k", 1, 32, [])
