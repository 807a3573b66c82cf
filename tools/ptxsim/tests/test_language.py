# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs scopes, branches, variables and addresses from PTX written by hand."""

import numpy as np
import pytest

from tools import ptxsim
from tools.ptxsim import Module

from .ptx_snippets import rng, run, u32


def test_scopes_and_labels():
    """Inline-assembly style blocks reuse register and label names."""
    body = """
    { .reg .pred p; .reg .b32 t; setp.lt.u32 p, %a0, 100; mov.u32 t, 1; @p bra done; mov.u32 t, 2;
    done: mov.u32 %r1, t; }
    { .reg .pred p; .reg .b32 t; setp.lt.u32 p, %a0, 50; mov.u32 t, 10; @p bra done;
    mov.u32 t, 20; done: mov.u32 %r2, t; }
    add.u32 %o, %r1, %r2;"""
    x = rng.integers(0, 200, 32).astype(np.uint32)
    assert run(body, [x]).tolist() == (np.where(x < 100, 1, 2) + np.where(x < 50, 10, 20)).tolist()


def test_brx_idx():
    body = """
    and.b32 %r1, %a0, 3;
    ts: .branchtargets L0, L1, L2, L3;
    brx.idx %r1, ts;
    L0: mov.u32 %o, 100; bra E; L1: mov.u32 %o, 200; bra E; L2: mov.u32 %o, 300; bra E;
    L3: mov.u32 %o, 400;
    E:"""
    x = u32()
    assert run(body, [x]).tolist() == (((x & 3) + 1) * 100).tolist()


def test_loop_trip_counts_diverge():
    body = """mov.u32 %r1, 0; mov.u32 %o, 0;
    L: setp.ge.u32 %x, %r1, %a0; @%x bra E; add.u32 %r1, %r1, 1; add.u32 %o, %o, %r1; bra L;
    E: bar.warp.sync 0xffffffff;"""
    x = rng.integers(0, 60, 64).astype(np.uint32)
    assert run(body, [x], n=32, grid=2).tolist() == (x * (x + 1) // 2).tolist()


def test_initialised_variables():
    decl = """.const .align 4 .u32 c[4] = {5, 6, 7, 0x10};
.global .align 8 .u64 ptr[1] = {generic(g)};
.global .align 4 .f32 g[2] = {0f3F800000, 2.5};
"""
    body = """mov.u64 %d1, c; and.b32 %r1, %a0, 3; mad.wide.u32 %d1, %r1, 4, %d1;
    ld.const.u32 %r2, [%d1];
    ld.global.u64 %d2, [ptr]; ld.f32 %r3, [%d2+4]; cvt.rzi.u32.f32 %r3, %r3;
    add.u32 %o, %r2, %r3;"""
    x = u32()
    assert run(body, [x], decl=decl).tolist() == (np.array([5, 6, 7, 16])[x & 3] + 2).tolist()


def test_const_is_readonly():
    decl = ".const .align 4 .u32 c[4];\n"
    with pytest.raises(ptxsim.ReadOnlyError):
        run("mov.u64 %d1, c; st.u32 [%d1], 1; mov.u32 %o, 0;", [u32()], decl=decl)


def test_generic_addresses():
    """The lanes of one generic load go to shared, local and global memory."""
    decl = ".shared .align 4 .b32 s[32];\n"
    body = """.local .align 4 .b32 l[4];
    mov.u32 %r1, %tid.x; mov.u64 %d1, s; cvta.shared.u64 %d1, %d1; mad.wide.u32 %d1, %r1, 4, %d1;
    st.u32 [%d1], %a0;
    mov.u64 %d2, l; cvta.local.u64 %d2, %d2; add.u32 %r2, %a0, 1; st.u32 [%d2+8], %r2;
    add.s64 %d2, %d2, 8;
    ld.param.u64 %d3, [p0]; mad.wide.u32 %d3, %r1, 4, %d3;
    rem.u32 %r3, %r1, 3; setp.eq.u32 %x, %r3, 0; selp.b64 %d4, %d1, %d2, %x;
    setp.eq.u32 %y, %r3, 2; selp.b64 %d4, %d3, %d4, %y;
    ld.u32 %o, [%d4];"""
    x = u32()
    t = np.arange(32)
    assert run(body, [x], decl=decl).tolist() == (x + (t % 3 == 1).astype(np.uint32)).tolist()


def test_cp_async_partial_source():
    decl = ".shared .align 16 .b8 s[512];\n"
    body = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mov.u32 %r3, s; add.u32 %r3, %r3, %r2;
    ld.param.u64 %d1, [p0];
    and.b32 %r4, %r1, 3; shl.b32 %r4, %r4, 2;
    cp.async.ca.shared.global [%r3], [%d1], 16, %r4; cp.async.commit_group; cp.async.wait_group 0;
    ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3]; add.u32 %o, %r5, %r6; add.u32 %o, %o, %r7;
    add.u32 %o, %o, %r8;"""
    x = np.arange(1, 33, dtype=np.uint32)
    t = np.arange(32) & 3
    assert run(body, [x], decl=decl).tolist() == np.array([0, 1, 3, 6])[t].tolist()
    with pytest.raises(ptxsim.AsyncCopyError):
        run(body.replace("cp.async.wait_group 0;", "cp.async.wait_group 1;"), [x], decl=decl)
    with pytest.raises(ptxsim.AsyncCopyError):  # never committed, so wait_group does not cover it
        run(body.replace("cp.async.commit_group;", ""), [x], decl=decl)
    run(
        body.replace("cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"),
        [x],
        decl=decl,
    )


def test_unsupported_names_the_instruction():
    src = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p)
{
  .reg .b64 %rd<3>;
  .reg .b32 %r<3>;
  ld.param.u64 %rd1, [p];
  tensormap.replace.tile.global_address.global.b1024.b64 [%rd1], %rd1;
  ret;
}
"""
    with pytest.raises(NotImplementedError, match=r"line 10.*tensormap"):
        Module.from_ptx(src).launch("k", 1, 32, [0])
