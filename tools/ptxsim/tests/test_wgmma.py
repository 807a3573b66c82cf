# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs operand layouts, fragments and types of wgmma from PTX written by hand."""

import numpy as np
import pytest

from tools.ptxsim import (
    MissingFenceError,
    Module,
)

from .wgmma_snippets import (
    B32,
    B64,
    B128,
    COMMIT,
    FENCE,
    NONE,
    WAIT,
    close,
    descriptor,
    fragment,
    place,
    rng,
    run,
    source,
    values,
)


@pytest.mark.parametrize("n", [8, 64, 104, 256])
@pytest.mark.parametrize("swizzle", [NONE, B128, B64, B32])
@pytest.mark.parametrize("major", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_layouts(kind, major, swizzle, n):
    got, ref, st = run(n, kind, swizzle=(swizzle, swizzle), major=major)
    close(got, ref)
    assert st.mma_flops == 2 * 64 * n * 16 and st.instructions["wgmma"] == 4


@pytest.mark.parametrize("swizzle", [(NONE, B128), (B64, NONE), (B32, B64), (B128, B32)])
@pytest.mark.parametrize("major", [(0, 0), (1, 1)])
def test_padded_layouts(swizzle, major):
    close(*run(96, "bf16", swizzle=swizzle, major=major, pad=256)[:2])


@pytest.mark.parametrize("swizzle", [NONE, B128, B64, B32])
@pytest.mark.parametrize("n", [8, 64, 200])
def test_tf32(swizzle, n):
    close(*run(n, "tf32", swizzle=(swizzle, swizzle), pad=128 * (swizzle == NONE))[:2])


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32", "s8", "e4m3"])
@pytest.mark.parametrize("swizzle", [NONE, B128, B32])
def test_a_in_registers(kind, swizzle):
    out = "s32" if kind == "s8" else "f32"
    close(*run(64, kind, out=out, a_regs=True, swizzle=(0, swizzle))[:2], out)
    if kind in ("bf16", "f16"):
        close(*run(64, kind, a_regs=True, swizzle=(0, swizzle), major=(0, 1))[:2])


@pytest.mark.parametrize(
    "types",
    [
        ("s8", "s8", "s32"),
        ("u8", "s8", "s32"),
        ("e4m3", "e5m2", "f32"),
        ("f16", "f16", "f16"),
        ("e5m2", "e4m3", "f16"),
    ],
)
def test_types(types):
    a, b, out = types
    if a == "e5m2":
        got, ref, _ = run(32, a, b, out, keep=0)
        assert (np.isinf(got) == (np.abs(ref) >= 65520)).all()
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(got, ref.astype(np.float16))
    else:
        close(*run(32, a, b, out)[:2], out)


@pytest.mark.parametrize("scales", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("keep", [0, 1])
def test_scales(scales, keep):
    close(*run(64, "bf16", scales=scales, keep=keep)[:2])


def test_steps_inside_the_swizzle_atom():
    """Rows of 128 bytes hold 64 elements of K: four products start 32 bytes apart."""
    K, n = 64, 64
    a_bits, a = values("bf16", 64, K)
    b_bits, b = values("bf16", n, K)
    image = np.zeros(16384, np.uint8)
    r, k = np.indices((64, K))
    at = r * 128 + k * 2
    at ^= (at >> 3) & 0x70
    image.view(np.uint16)[at // 2] = a_bits
    image.view(np.uint16)[(8192 + at) // 2] = b_bits
    da, db = (descriptor(s, 16, 1024, B128) for s in (0, 8192))
    step = "add.s64 %da, %da, 2; add.s64 %db, %db, 2;"
    regs = "{" + ", ".join(f"%d{k}" for k in range(32)) + "}"
    one = (
        f"wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {regs}, %da, %db, %keep, 1, 1, 0, 0;"
    )
    src = source(
        "",
        "",
        32,
        len(image),
        product=f"{one} setp.eq.b32 %keep, 0, 0; {step} {one} {step} {one} {step} {one}",
    )
    o = np.zeros((32, 128), np.float32)
    Module.from_ptx(src).launch(
        "k", 1, 128, [image, o, o.copy(), o, da, db, 0], len(image), checks="strict"
    )
    np.testing.assert_allclose(fragment(o, n), a @ b.T, rtol=1e-6, atol=1e-5)


def test_two_warpgroups_and_ctas():
    """Each warpgroup has its own descriptors: the A of the second lies 2048 bytes further on."""
    a_bits, a = values("bf16", 128, 16)
    b_bits, b = values("bf16", 32, 16)
    image = np.zeros(8192, np.uint8)
    da, _ = place(image, a_bits[:64], 0, NONE, 0, 0)
    place(image, a_bits[64:], 2048, NONE, 0, 0)
    db, _ = place(image, b_bits, 4096, NONE, 0, 0)
    mine = "mov.u32 %n, %tid.x; shr.u32 %n, %n, 7; mul.wide.u32 %w, %n, 128; add.s64 %da, %da, %w;"
    src = source(
        "m64n32k16", "f32.bf16.bf16", 16, len(image), imm="1, 1, 0, 0", threads=256, before=mine
    )
    for k in range(15, -1, -1):  # registers are 256 threads apart
        src = src.replace(f"[%po+{512 * k}]", f"[%po+{1024 * k}]").replace(
            f"[%pc+{512 * k}]", f"[%pc+{1024 * k}]"
        )
    o = np.zeros((16, 256), np.float32)
    st = Module.from_ptx(src).launch(
        "k", 3, 256, [image, o, o.copy(), o, da, db, 0], len(image), checks="strict"
    )
    np.testing.assert_allclose(
        np.concatenate([fragment(o[:, :128], 32), fragment(o[:, 128:], 32)]),
        a @ b.T,
        rtol=1e-6,
        atol=1e-6,
    )
    assert st.mma_flops == 3 * 2 * 2 * 64 * 32 * 16


def test_warpgroups_apart():
    """The second warpgroup takes another way, with one product more and a wait of its own."""
    a_bits, a = values("bf16", 64, 16)
    b_bits, b = values("bf16", 32, 16)
    image = np.zeros(8192, np.uint8)
    da, _ = place(image, a_bits, 0, B32, 0, 0)
    db, _ = place(image, b_bits, 4096, B64, 0, 0)
    d = ", ".join(f"%d{k}" for k in range(16))
    op = "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16"
    one = f"{op} {{{d}}}, %da, %db, %keep, 1, 1, 0, 0;"
    ways = (
        f"setp.lt.u32 %p, %t, 128; @%p bra FIRST; {one} {COMMIT} {one} {COMMIT} "
        f"wgmma.wait_group.sync.aligned 1; {WAIT} "
        f"add.f32 %d3, %d3, 0f40000000; {FENCE} {one} bra JOIN;\nFIRST: {one}\nJOIN:"
    )
    src = source("", "", 16, len(image), product=ways, threads=256)
    for k in range(15, -1, -1):
        src = src.replace(f"+{512 * k}]", f"+{1024 * k}]")
    c, o = rng.standard_normal((16, 256)).astype(np.float32), np.zeros((16, 256), np.float32)
    Module.from_ptx(src).launch(
        "k", 2, 256, [image, o, c, o, da, db, 1], len(image), checks="strict"
    )
    np.testing.assert_allclose(
        fragment(o[:, :128], 32), a @ b.T + fragment(c[:, :128], 32), rtol=1e-6, atol=1e-5
    )
    c[3] += 2
    np.testing.assert_allclose(
        fragment(o[:, 128:], 32), 3 * (a @ b.T) + fragment(c[:, 128:], 32), rtol=1e-6, atol=1e-5
    )
    with pytest.raises(MissingFenceError, match="accumulator"):
        Module.from_ptx(src.replace(f"{FENCE} wgmma", "wgmma")).launch(
            "k", 2, 256, [image, o, c, o, da, db, 1], len(image)
        )


@pytest.mark.parametrize("wrong", [B64, B32, NONE])
def test_wrong_swizzle_is_wrong(wrong):
    got, ref, _ = run(
        64, "bf16", descs=lambda a, b: (a, b & ~(3 << 62) | wrong << 62), checks="default"
    )
    assert np.abs(got - ref).max() > 0.5


@pytest.mark.parametrize("checks", ["strict", "default", "fast"])
def test_checks_do_not_change_results(checks):
    close(*run(64, "bf16", checks=checks)[:2])
