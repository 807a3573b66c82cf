# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs mbarriers and copies of tiles from PTX written by hand."""

import numpy as np
import pytest

from tools.ptxsim import (
    AsyncCopyError,
    DeadlockError,
    Module,
    OutOfBoundsError,
    RaceError,
    SimError,
)
from tools.ptxsim.hopper.tensor_maps import tensor_map

BF16, F32, NO_SWIZZLE, SWIZZLE_64 = 10, 7, 0, 2


def source(body, decl=""):
    return f""".version 8.3
.target sm_90a
.address_size 64
.visible .entry k(.param .align 64 .b8 pm[128], .param .u64 po, .param .u32 px, .param .u32 py)
{{
  .shared .align 1024 .b8 sm[4096]; .shared .align 8 .b64 bar[2]; {decl}
  .reg .b32 %t, %s, %v, %w, %x, %y; .reg .b64 %m, %o, %q; .reg .pred %p, %ok;
  mov.u32 %t, %tid.x; mov.u32 %s, sm; shl.b32 %v, %t, 2; add.s32 %s, %s, %v; setp.eq.u32 %p, %t, 0;
  mov.b64 %m, pm; cvta.param.u64 %m, %m; ld.param.u64 %o, [po]; mul.wide.u32 %q, %t, 4;
  add.s64 %o, %o, %q;
  ld.param.u32 %x, [px]; ld.param.u32 %y, [py];
  {body}
  ret;
}}
"""


INIT = "@%p mbarrier.init.shared::cta.b64 [bar], 1; bar.sync 0;"
EXPECT = "@%p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 1024;"
LOAD = (
    "@%p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[sm], [%m, {%x, %y}], [bar];"
)
WAIT = "W: mbarrier.try_wait.parity.shared::cta.b64 %ok, [bar], 0; @!%ok bra W;"
OUT = "".join(
    f"ld.shared.b32 %v, [%s+{256 * k}]; st.global.b32 [%o+{256 * k}], %v;" for k in range(4)
)


def load(
    x,
    coords,
    swizzle=NO_SWIZZLE,
    parts=(INIT, EXPECT, LOAD, WAIT, OUT),
    box=(16, 16),
    nan=False,
    checks="strict",
):
    """Loads a 16 x 16 box of an f32 array; 64 threads write it out as it lies in shared memory."""
    o = np.zeros(256, np.float32)
    m = Module.from_ptx(source("\n".join(parts)))
    at = m.device.alloc(x)
    m.launch(
        "k",
        1,
        64,
        [tensor_map(at, x.shape, [x.shape[1], 1], box, F32, swizzle, nan), o, coords[1], coords[0]],
        checks=checks,
    )
    return o.reshape(16, 16)


def box(x, r, c, fill=0.0):
    out = np.full((16, 16), fill, np.float32)
    for i in range(16):
        for j in range(16):
            if 0 <= r + i < x.shape[0] and 0 <= c + j < x.shape[1]:
                out[i, j] = x[r + i, c + j]
    return out


@pytest.mark.parametrize("coords", [(0, 0), (3, 5), (-2, -7), (30, 20), (100, 0)])
@pytest.mark.parametrize("nan", [False, True])
def test_load(coords, nan):
    x = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)
    np.testing.assert_array_equal(load(x, coords, nan=nan), box(x, *coords, np.nan if nan else 0.0))


def test_load_swizzled():
    """Rows have 64 bytes, two to a line; a chunk moves to its number xor that of the line."""
    x = np.arange(40 * 24, dtype=np.float32).reshape(40, 24)
    got, ref = load(x, (4, 8), SWIZZLE_64), box(x, 4, 8)
    for r in range(16):
        for chunk in range(4):
            to = chunk ^ (r // 2 % 4)
            assert np.array_equal(got[r, 4 * to : 4 * to + 4], ref[r, 4 * chunk : 4 * chunk + 4])


@pytest.mark.parametrize(
    "parts,error,match",
    [
        ((INIT, EXPECT, LOAD, OUT), AsyncCopyError, "in flight"),
        ((INIT.replace("bar.sync 0;", ""), WAIT), RaceError, "no barrier"),
        (
            (INIT, EXPECT.replace("1024", "2048"), LOAD, WAIT, OUT),
            DeadlockError,
            "1024 bytes are missing",
        ),
        ((INIT, LOAD, WAIT, OUT), DeadlockError, "1 arrivals"),
        ((INIT, EXPECT, EXPECT, LOAD, WAIT, OUT), SimError, "more arrivals|never completes"),
        ((EXPECT, LOAD, WAIT, OUT), SimError, "no mbarrier"),
        (
            (INIT, EXPECT, LOAD, "@!%p st.shared.b32 [%s], 0;", WAIT, OUT),
            AsyncCopyError,
            "in flight",
        ),
        (
            ("ld.shared.b32 %v, [%s];", INIT.replace("bar.sync 0;", ""), EXPECT, LOAD),
            RaceError,
            "writes what",
        ),
        # only the first warp waits: the second one knows nothing
        (
            (INIT, EXPECT, LOAD, "setp.lt.u32 %ok, %t, 32; @!%ok bra OUT;", WAIT, "OUT:", OUT),
            (AsyncCopyError, RaceError),
            "shared",
        ),
    ],
)
def test_load_faults(parts, error, match):
    with pytest.raises(error, match=match):
        load(np.zeros((16, 16), np.float32), (0, 0), parts=parts, checks="default")


def test_load_out_of_bounds():
    with pytest.raises(OutOfBoundsError, match="bulk read"):
        m = Module.from_ptx(source("\n".join((INIT, EXPECT, LOAD, WAIT, OUT))))
        x, o = np.zeros((16, 16), np.float32), np.zeros(256, np.float32)
        m.launch(
            "k",
            1,
            64,
            [tensor_map(m.device.alloc(x), (17, 16), [16, 1], (16, 16), F32, 0), o, 0, 1],
        )


def test_phases():
    """Two warps hand a word back and forth.

    Each waits on its mbarrier with the parity of the round.
    """
    body = """
    @%p mbarrier.init.shared::cta.b64 [bar], 32; @%p mbarrier.init.shared::cta.b64 [bar+8], 32;
    @%p st.shared.b32 [sm], 0;
    bar.sync 0;
    mov.u32 %y, 0; setp.lt.u32 %p, %t, 32; @!%p bra SECOND;
FIRST:
    setp.eq.u32 %ok, %t, 0; @%ok ld.shared.b32 %v, [sm]; @%ok add.s32 %v, %v, 1;
    @%ok st.shared.b32 [sm], %v;
    mbarrier.arrive.shared::cta.b64 _, [bar];
    and.b32 %w, %y, 1;
A:  mbarrier.try_wait.parity.shared::cta.b64 %ok, [bar+8], %w; @!%ok bra A;
    add.s32 %y, %y, 1; setp.lt.u32 %ok, %y, 5; @%ok bra FIRST;
    ld.shared.b32 %v, [sm]; st.global.b32 [%o], %v; ret;
SECOND:
    and.b32 %w, %y, 1;
B:  mbarrier.test_wait.parity.shared::cta.b64 %ok, [bar], %w; @!%ok bra B;
    setp.eq.u32 %ok, %t, 32; @%ok ld.shared.b32 %v, [sm]; @%ok mul.lo.u32 %v, %v, 3;
    @%ok st.shared.b32 [sm], %v;
    mbarrier.arrive.shared::cta.b64 _, [bar+8];
    add.s32 %y, %y, 1; setp.lt.u32 %ok, %y, 5; @%ok bra SECOND;
"""
    v = 0
    for _ in range(5):
        v = (v + 1) * 3
    o = np.zeros(64, np.uint32)
    m = Module.from_ptx(source(body))
    m.launch("k", 2, 64, [bytes(128), o, 0, 0], checks="default")
    assert (o[:32] == v).all()
    with pytest.raises(RaceError):
        Module.from_ptx(
            source(
                body.replace(
                    "A:  mbarrier.try_wait.parity.shared::cta.b64 %ok, [bar+8], %w; @!%ok bra A;",
                    "",
                )
            )
        ).launch("k", 1, 64, [bytes(128), o, 0, 0])


@pytest.mark.parametrize(
    "text",
    [
        LOAD.replace("bytes [sm]", "bytes.multicast::cluster [sm]").replace("[bar];", "[bar], %h;"),
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sm], [%o], 16, [bar];",
        "cp.async.mbarrier.arrive.shared.b64 [bar];",
    ],
)
def test_unsupported(text):
    with pytest.raises(NotImplementedError, match="line"):
        Module.from_ptx(source(text, ".reg .b16 %h;")).program("k")
