# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Plants the faults that the checks of wgmma must notice."""

import numpy as np
import pytest

from tools.ptxsim import (
    AsyncCopyError,
    AsyncMmaError,
    Checks,
    MissingFenceError,
    OutOfBoundsError,
    RaceError,
    SimError,
    UninitialisedSharedError,
    WarpSyncError,
)

from .wgmma_snippets import COMMIT, FENCE, PROXY, WAIT, close, run


def drop(text):
    def edit(s):
        assert s.count(text) == 1
        return s.replace(text, "")

    return edit


@pytest.mark.parametrize(
    "text,error,match",
    [
        (WAIT, AsyncMmaError, "accumulator"),
        (COMMIT, AsyncMmaError, "accumulator"),
        (FENCE, MissingFenceError, "wgmma.fence"),
        (PROXY, MissingFenceError, "fence.proxy.async"),
        ("bar.sync 0;", RaceError, "no barrier"),
    ],
)
def test_dropped(text, error, match):
    with pytest.raises(error, match=match):
        run(64, "bf16", edit=drop(text))


def test_dropped_wait_poisons():
    got, _ref, _ = run(64, "bf16", edit=drop(WAIT), checks=Checks(async_pending=False))
    assert np.isnan(got).all()


def test_the_fence_before_the_barrier_counts_too():
    """Whoever wrote may fence, before the barrier; a fence before the writes does not help."""

    def swap(s):
        return s.replace(PROXY, "").replace("bar.sync 0;", PROXY + " bar.sync 0;")

    close(*run(64, "bf16", edit=swap)[:2])

    def early(s):
        return s.replace(PROXY, "").replace("LOOP:", PROXY + "\nLOOP:")

    with pytest.raises(MissingFenceError, match=r"fence\.proxy\.async"):
        run(64, "bf16", edit=early)
    run(64, "bf16", edit=early, checks=Checks(proxy_fence=False))


@pytest.mark.parametrize(
    "after,error,match",
    [
        ("st.shared.b32 [sm+16], 0;", AsyncMmaError, "write to shared bytes at offset 0x10"),
        ("cp.async.ca.shared.global [sm], [%pa], 4;", AsyncMmaError, "cp.async into"),
        ("red.shared.add.u32 [sm], 1;", AsyncMmaError, "atomic on"),
        ("bar.sync 0; st.shared.b32 [sm+16], 0;", AsyncMmaError, "write to"),
        ("mov.b32 %v, %d3;", AsyncMmaError, "accumulator register"),
        ("mov.b32 %d3, 0;", AsyncMmaError, "accumulator register"),
        (WAIT.replace("0;", "1;") + " mov.b32 %v, %d3;", AsyncMmaError, "accumulator register"),
        (WAIT + " st.shared.b32 [sm+16], 0;", RaceError, "writes what warp"),
    ],
)
def test_too_early(after, error, match):
    with pytest.raises(error, match=match):
        run(64, "bf16", after=after)


def test_a_write_after_wait_and_barrier_is_fine():
    close(*run(64, "bf16", after=WAIT + " bar.sync 0; st.shared.b32 [sm+16], 0;")[:2])
    close(*run(64, "bf16", after="ld.shared.b32 %v, [sm];")[:2])  # reading is no conflict


def test_a_registers():
    with pytest.raises(AsyncMmaError, match="A operand"):
        run(64, "bf16", a_regs=True, after="mov.b32 %a2, 0;")
    with pytest.raises(MissingFenceError, match="A operand"):
        run(64, "bf16", a_regs=True, before="mov.b32 %a2, 0;")


def test_accumulator_written_after_the_fence():
    with pytest.raises(MissingFenceError, match="accumulator"):
        run(64, "bf16", before="mov.b32 %d7, 0;")


def test_two_groups():
    """With one group pending, the first group's accumulators may be read, the second's not."""

    def two(reg):
        d = [", ".join(f"%d{k}" for k in range(s, s + 16)) for s in (0, 16)]
        p = [
            f"wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {{{regs}}}, "
            "%da, %db, %keep, 1, 1, 0, 0;"
            for regs in d
        ]
        return (
            f"{p[0]} {COMMIT} {p[1]} {COMMIT} wgmma.wait_group.sync.aligned 1; mov.b32 %v, %d{reg};"
        )

    run(64, "bf16", product=two(3))
    with pytest.raises(AsyncMmaError, match="accumulator"):
        run(64, "bf16", product=two(20))


def test_shapes_need_a_fence_between():
    d = ", ".join(f"%d{k}" for k in range(32))
    e = ", ".join(f"%d{k}" for k in range(16))
    p = [
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{regs}}}, "
        "%da, %db, %keep, 1, 1, 0, 0;"
        for n, regs in ((64, d), (32, e))
    ]
    with pytest.raises(MissingFenceError, match="different shapes"):
        run(64, "bf16", product=" ".join(p))
    run(64, "bf16", product=f" {FENCE} ".join(p))


def test_registers_in_two_roles():
    with pytest.raises(AsyncMmaError, match="another role"):
        run(
            64,
            "bf16",
            after=f"{FENCE} wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
            "{%a0, %a1, %a2, %a3}, {%d0, %d1, %d2, %d3}, %db, %keep, 1, 1, 0;",
        )


def test_whole_warpgroups():
    def part(s):
        return s.replace(FENCE, "setp.lt.u32 %p, %t, 96; @!%p bra END; " + FENCE).replace(
            "ret;", "END: ret;"
        )

    with pytest.raises(WarpSyncError, match=r"128 threads|never reached"):
        run(64, "bf16", edit=part)
    with pytest.raises(WarpSyncError, match="four warps"):
        run(64, "bf16", threads=96)

    def wait(s):
        return s.replace(FENCE, "setp.lt.u32 %p, %t, 96; @!%p bra SPIN; " + FENCE).replace(
            "ret;", "ret; SPIN: bar.sync 1, 64; ret;"
        )

    with pytest.raises(WarpSyncError, match=r"never reached by warps \[3\]"):
        run(64, "bf16", edit=wait)


def test_descriptors():
    with pytest.raises(WarpSyncError, match="disagree"):
        run(64, "bf16", before="cvt.u64.u32 %w, %t; add.s64 %da, %da, %w;")
    with pytest.raises(SimError, match="reserved"):
        run(64, "bf16", descs=lambda a, b: (a, b | 1 << 46))
    with pytest.raises(OutOfBoundsError):
        run(64, "bf16", descs=lambda a, b: (a, b + 0x2000))
    with pytest.raises(UninitialisedSharedError):
        run(64, "bf16", descs=lambda a, b: (a, b + 64), more=4096)


def test_cp_async_operands():
    """A cp.async must have landed, and what it has copied needs the proxy fence too."""

    def copied(rest):
        first = "setp.eq.u32 %p, %t, 0; @%p cp.async.ca.shared.global [sm], [%pa], 4; "
        return lambda s: s.replace("bar.sync 0;", "bar.sync 0; " + first + rest)

    with pytest.raises(AsyncCopyError, match="in flight"):
        run(64, "bf16", edit=copied("bar.sync 0;"))
    run(64, "bf16", edit=copied("cp.async.wait_all; bar.sync 0;"))

    def late(s):
        return copied("cp.async.wait_all; bar.sync 0;")(
            s.replace(PROXY, "").replace("bar.sync 0;", PROXY + "bar.sync 0;")
        )

    with pytest.raises(MissingFenceError, match=r"fence\.proxy\.async"):
        run(64, "bf16", edit=late)
    run(64, "bf16", edit=late, checks=Checks(copy_fence=False))


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, "
        "%v, 0, %keep, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, "
        "%keep, 2, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%d0, %d1, %d2, %d3}, %da, %db, "
        "%keep, 1, 1, 0, 0;",
    ],
)
def test_unsupported(text):
    with pytest.raises(NotImplementedError, match="line"):
        run(64, "bf16", product=text)
