# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs one wgmma of hand-written PTX on random operands."""

import numpy as np

from tools.ptxsim import (
    Module,
)
from tools.ptxsim import floats as F
from tools.ptxsim.fp8 import fp8_table

rng = np.random.default_rng(1)
SIZE = {"bf16": 2, "f16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}
NONE, B128, B64, B32 = range(4)
WIDTH = {NONE: 1, B128: 8, B64: 4, B32: 2}
WAIT, COMMIT = "wgmma.wait_group.sync.aligned 0;", "wgmma.commit_group.sync.aligned;"
FENCE, PROXY = "wgmma.fence.sync.aligned;", "fence.proxy.async.shared::cta;"


def values(kind, *shape):
    """Returns random bits of a type and their values."""
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "bf16":
        b = F.f32_to_bf16(x)
        return b, F.bf16_to_f32(b).astype(np.float64)
    if kind == "f16":
        h = x.astype(np.float16)
        return h.view(np.uint16), h.astype(np.float64)
    if kind == "tf32":
        return x.view(np.uint32), (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(
            np.float32
        ).astype(np.float64)
    b = rng.integers(0, 256, shape).astype(np.uint8)
    if kind in ("e4m3", "e5m2"):
        b = np.where(np.isfinite(fp8_table(kind)[b]), b, 0x30).astype(np.uint8)
        return b, fp8_table(kind)[b]
    return b, b.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)


def address(mn, k, size, start, lead, stride, swizzle, mn_major):
    """Returns the byte address of element (mn, k).

    It follows the shape:stride forms of the canonical layouts, then the swizzle.
    """
    T, W = 16 // size, WIDTH[swizzle]
    L, S = lead // size, stride // size
    if not mn_major:
        if swizzle == NONE:  # ((8,m),(T,2)):((T,S),(1,L))
            at = mn % 8 * T + mn // 8 * S + k % T + k // T * L
        else:  # ((8,m),(T,2)):((WT,S),(1,T))
            at = mn % 8 * W * T + mn // 8 * S + k
    elif swizzle == NONE:  # ((T,1,m),(8,k)):((1,T,S),(T,L))
        at = mn % T + mn // T * S + k % 8 * T + k // 8 * L
    else:  # ((T,W,m),(8,k)):((1,T,L),(WT,S))
        at = mn % T + mn // T % W * T + mn // T // W * L + k % 8 * W * T + k // 8 * S
    at = start + at * size
    return at ^ ((at >> 3) & {NONE: 0, B32: 0x10, B64: 0x30, B128: 0x70}[swizzle])


def strides(mn, size, swizzle, mn_major, pad):
    """Returns lead, stride and bytes of an operand with 32 bytes along K."""
    W, K, T = WIDTH[swizzle], 32 // size, 16 // size
    atom = 8 * W * 16
    if not mn_major:
        if swizzle == NONE:
            stride = atom + pad
            return stride * (mn // 8), stride, 2 * stride * (mn // 8)
        return 16, atom + 8 * pad, (atom + 8 * pad) * (mn // 8)
    if swizzle == NONE:
        stride = atom * (K // 8) + pad
        return atom, stride, stride * (mn // T)
    stride = atom
    lead = atom * (K // 8) + 8 * pad
    return lead, stride, lead * -(-mn // T // W)


def descriptor(start, lead, stride, swizzle):
    return start >> 4 | lead >> 4 << 16 | stride >> 4 << 32 | swizzle << 62


def place(image, bits, start, swizzle, mn_major, pad):
    """Puts an operand (mn, k) into the image of shared memory.

    Returns its descriptor and where it ends.
    """
    size = bits.itemsize
    lead, stride, nbytes = strides(bits.shape[0], size, swizzle, mn_major, pad)
    mn, k = np.indices(bits.shape)
    at = address(mn, k, size, start, lead, stride, swizzle, mn_major)
    assert len(np.unique(at)) == at.size and at.max() < start + nbytes
    image.view(bits.dtype)[at // size] = bits
    return descriptor(start, lead, stride, swizzle), start + nbytes


def source(
    shape,
    types,
    acc,
    size,
    a_regs=False,
    imm="1, 1",
    scale_d="%keep",
    before="",
    after="",
    product=None,
    threads=128,
):
    def regs(p, n):
        return "{" + ", ".join(f"%{p}{k}" for k in range(n)) + "}"

    frag = "".join(f"ld.global.b32 %a{k}, [%pa+{512 * k}];\n" for k in range(4)) if a_regs else ""
    load = "".join(f"ld.global.b32 %d{k}, [%pc+{512 * k}];\n" for k in range(acc))
    store = "".join(f"st.global.b32 [%po+{512 * k}], %d{k};\n" for k in range(acc))
    if product is None:
        a = regs("a", 4) if a_regs else "%da"
        product = (
            f"wgmma.mma_async.sync.aligned.{shape}.{types} "
            f"{regs('d', acc)}, {a}, %db, {scale_d}, {imm};"
        )
    return f""".version 8.3
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 sm[];
.visible .entry k(.param .u64 pi, .param .u64 pa, .param .u64 pc, .param .u64 po, .param .u64 pda,
                  .param .u64 pdb, .param .u32 pkeep)
{{
  .reg .b32 %t, %s, %v, %n, %a<4>, %d<{acc}>; .reg .b64 %pi, %pa, %pc, %po, %da, %db, %w;
  .reg .pred %p, %keep;
  mov.u32 %t, %tid.x; mul.wide.u32 %w, %t, 4;
  ld.param.u64 %pi, [pi]; ld.param.u64 %pa, [pa]; ld.param.u64 %pc, [pc]; ld.param.u64 %po, [po];
  ld.param.u64 %da, [pda]; ld.param.u64 %db, [pdb]; ld.param.u32 %n, [pkeep];
  setp.ne.b32 %keep, %n, 0;
  add.s64 %pi, %pi, %w; add.s64 %pa, %pa, %w; add.s64 %pc, %pc, %w; add.s64 %po, %po, %w;
  mov.u32 %s, sm; shl.b32 %n, %t, 2; add.s32 %s, %s, %n;
LOOP:
  ld.global.b32 %v, [%pi]; st.shared.b32 [%s], %v;
  add.s32 %n, %n, {4 * threads}; add.s32 %s, %s, {4 * threads}; add.s64 %pi, %pi, {4 * threads};
  setp.lt.s32 %p, %n, {size};
  @%p bra LOOP;
  {load} {frag}
  bar.sync 0;
  fence.proxy.async.shared::cta;
  wgmma.fence.sync.aligned;
  {before}
  {product}
  wgmma.commit_group.sync.aligned;
  {after}
  wgmma.wait_group.sync.aligned 0;
  {store}
  ret;
}}
"""


def fragment(regs, n):
    """Returns (registers, threads) of 32-bit values as (64, n)."""
    out = np.zeros((64, n), regs.dtype)
    for t in range(128):
        w, r, c = t // 32, t % 32 // 4, t % 4
        for k in range(len(regs)):
            out[16 * w + r + 8 * (k // 2 % 2), 8 * (k // 4) + 2 * c + k % 2] = regs[k, t]
    return out


def fragment_a(bits):
    """Returns (64, K) as four registers for each thread."""
    size = bits.itemsize
    per = 4 // size
    out = np.zeros((4, 128, per), bits.dtype)
    for t in range(128):
        w, r, c = t // 32, t % 32 // 4, t % 4
        for k in range(4):
            col = (k // 2 * 4 + c) * per
            out[k, t] = bits[16 * w + r + 8 * (k % 2), col : col + per]
    return out.view(np.uint32).reshape(4, 128)


def unfragment(c):
    """Returns (64, n) of 32-bit values as (registers, threads)."""
    n = c.shape[1]
    at = fragment(np.arange(n // 2 * 128).reshape(n // 2, 128), n)
    out = np.zeros(n // 2 * 128, c.dtype)
    out[at] = c
    return out.reshape(n // 2, 128)


def run(
    n,
    a_kind,
    b_kind=None,
    out="f32",
    swizzle=(B128, B128),
    major=(0, 0),
    pad=0,
    a_regs=False,
    keep=1,
    scales=(1, 1),
    edit=lambda s: s,
    checks="strict",
    threads=128,
    descs=lambda a, b: (a, b),
    more=0,
    **kw,
):
    """Runs one product with random operands; returns result, expectation and statistics."""
    b_kind = b_kind or a_kind
    K = 32 // SIZE[a_kind]
    a_bits, a = values(a_kind, 64, K)
    b_bits, b = values(b_kind, n, K)
    image = np.zeros(160 * 1024, np.uint8)
    da, end = (0, 0) if a_regs else place(image, a_bits, 0, swizzle[0], major[0], pad)
    db, end = place(image, b_bits, (end + 1023) // 1024 * 1024, swizzle[1], major[1], pad)
    size = (end + 511) // 512 * 512
    image = image[:size]
    ints = out == "s32"
    if ints:
        c = rng.integers(-1000, 1000, (64, n)).astype(np.int32)
        regs = unfragment(c)
    elif out == "f32":
        c = rng.standard_normal((64, n)).astype(np.float32)
        regs = unfragment(c)
    else:
        c = rng.standard_normal((64, n)).astype(np.float16)
        regs = np.stack([unfragment(c)[0::2], unfragment(c)[1::2]], -1).view(np.uint32)[..., 0]
    imm = [] if ints else [str(s) for s in scales]
    if a_kind in ("f16", "bf16"):
        imm += [str(m) for m in (major[1:] if a_regs else major)]
    src = source(
        f"m64n{n}k{K}", f"{out}.{a_kind}.{b_kind}", len(regs), size, a_regs, ", ".join(imm), **kw
    )
    if ints:
        src = src.replace("%keep, ;", "%keep;")
    da, db = descs(da, db)
    o = np.zeros(regs.shape, np.uint32)
    st = Module.from_ptx(edit(src)).launch(
        "k",
        1,
        threads,
        [image, fragment_a(a_bits), np.ascontiguousarray(regs), o, da, db, keep],
        size + more,
        checks=checks,
    )
    ref = scales[0] * scales[1] * (a @ b.T) + (c if keep else 0)
    if out == "f16":
        pairs = o.view(np.float16).reshape(len(o), 128, 2)
        o = np.stack([pairs[..., 0], pairs[..., 1]], 1).reshape(2 * len(o), 128)
    else:
        o = o.view(np.int32 if ints else np.float32)
    return fragment(o, n), ref, st


def close(got, ref, out="f32"):
    if out == "s32":
        assert np.array_equal(got, ref)
    else:
        dt = np.float16 if out == "f16" else np.float32
        np.testing.assert_allclose(
            got.astype(np.float64),
            ref.astype(dt).astype(np.float64),
            rtol=1e-3 if out == "f16" else 2e-7,
            atol=0 if out == "f16" else 2e-6,
        )
