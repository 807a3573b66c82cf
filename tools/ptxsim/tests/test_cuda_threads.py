# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs threads, barriers and atomics in kernels that nvcc compiles, with planted bugs."""

import numpy as np
import pytest

from tools import ptxsim
from tools.ptxsim import Checks, Module, nvcc
from tools.ptxsim.floats import bf16_to_f32

from .operands import f32, require_nvcc, rng


def test_vadd(mod):
    a, b, c = f32(1000), f32(1000), np.zeros(1000, np.float32)
    s = mod.launch("vadd", 8, 128, [a, b, c, 1000])
    assert np.array_equal(c, a + b)
    assert s.global_load_bytes == 8000 and s.global_store_bytes == 4000
    assert s.footprint_written["_Z4vaddPKfS0_Pfi_param_2"] == 4000
    assert s.efficiency("load") == 1.0


def test_oob(mod):
    a, b, c = f32(1000), f32(1000), np.zeros(1000, np.float32)
    with pytest.raises(ptxsim.OutOfBoundsError) as e:
        mod.launch("vadd_oob", 8, 128, [a, b, c, 1000])
    assert (
        e.value.cta == (7, 0, 0) and e.value.thread == (104, 0, 0) and "ld.global" in e.value.text
    )


def test_misaligned(mod):
    with pytest.raises(ptxsim.MisalignedError):
        mod.launch("misaligned", 1, 32, [np.zeros(256, np.uint8), np.zeros(32, np.float32)])


@pytest.mark.parametrize("block", [32, 128, 512])
def test_block_reduce(mod, block):
    x, o = f32(40, 777), np.zeros(40, np.float32)
    mod.launch("block_reduce<true>", 40, block, [x, o, 777])
    np.testing.assert_allclose(o, x.astype(np.float64).sum(1), atol=1e-4)


def test_block_reduce_missing_sync(mod):
    x, o = f32(2, 777), np.zeros(2, np.float32)
    with pytest.raises(ptxsim.RaceError, match="no barrier"):
        mod.launch("block_reduce<false>", 2, 128, [x, o, 777])


def test_shuffles(mod):
    x = rng.integers(0, 100, 32).astype(np.int32)
    out = [np.zeros(32, np.int32) for _ in range(7)]
    mod.launch("shuffles", 1, 32, [x, *out])
    up, down, idx, seg, ballot, match, red = out
    t = np.arange(32)
    assert np.array_equal(up, np.where(t >= 3, x[np.maximum(t - 3, 0)], x))
    assert np.array_equal(down, np.where(t < 27, x[np.minimum(t + 5, 31)], x))
    assert np.array_equal(idx, x[t * 7 & 31])
    assert np.array_equal(seg, x[t ^ 1] + np.where((t & 3) < 2, x[np.minimum(t + 2, 31)], x))
    bits = sum(int(v & 1) << k for k, v in enumerate(x))
    assert ballot[0] == np.array([bits + int((x > 90).any()) + 2], np.uint32).view(np.int32)[0]
    for k in t:
        m = sum(1 << int(j) for j in t if x[j] & 3 == x[k] & 3)
        assert match.view(np.uint32)[k] == m
    assert (red == x.sum() + x.max()).all()


def test_partial_shuffle(mod):
    x = f32(32)
    y = x.copy()
    mod.launch("partial_shuffle", 1, 32, [y])
    t = np.arange(32)
    assert np.array_equal(y, np.where(t & 1, x + x[t ^ 2], x))
    with pytest.raises(ptxsim.WarpSyncError, match="exited without"):
        mod.launch("bad_shuffle", 1, 32, [x])
    mod.launch("bad_shuffle", 1, 32, [x], checks=Checks(exited_at_barrier=False))


def collatz(v):
    s = 0
    while v != 1:
        if v & 1:
            s += 2 if v > 100 else 1
            v = 3 * v + 1
        else:
            s += 1
            v >>= 1
        if s > 1000:
            break
    return s


def test_divergence(mod):
    n = 500
    x = rng.integers(1, 1000, n).astype(np.int32)
    o = np.zeros(n, np.int32)
    s = mod.launch("diverge", 4, 128, [x, o, n])
    ref = []
    for i, v in enumerate(x):
        c = collatz(int(v))
        ref.append([c + 10, c * 3, c ^ 0x55, c // 7, c % 5, -c][i % 6])
    assert o.tolist() == ref
    assert s.divergent_branches > 100


PARAMS = np.dtype(
    dict(
        names=["a", "o", "n", "s", "q"],
        formats=["u8", "u8", "i4", ("f4", 3), "i2"],
        offsets=[0, 8, 16, 20, 32],
        itemsize=40,
    )
)


@pytest.mark.parametrize(
    "name,N,dt", [("by_value<8, int>", 8, np.int32), ("by_value<16, float>", 16, np.float32)]
)
def test_struct_param_template_device_function(mod, name, N, dt):
    n = 150
    a, o, z = f32(n), np.zeros(n, np.float32), np.zeros(n, dt)
    p = np.zeros((), PARAMS)
    p["a"], p["o"], p["n"], p["s"], p["q"] = (
        mod.device.alloc(a),
        mod.device.alloc(o),
        n,
        [1, 2, 3],
        7,
    )
    mod.launch(name, 3, 64, [p, z])
    i = np.arange(n)
    loc = (i & 7) * np.array([1, 2, 3])[(i & 7) % 3]
    np.testing.assert_allclose(
        o, a + 1 + a**3 + np.array([1, 2, 3, 4])[i & 3] + loc, rtol=1e-5, atol=1e-5
    )
    if dt == np.int32:
        assert np.array_equal(z, (i % N + 7).astype(dt))
    assert mod.symbol("gcount").view(np.int32).tolist() == [40, 50, 60, 30, 30]


def test_printf_and_assert(mod):
    s = mod.launch("say", 1, 32, [7])
    assert s.printed == ["n=7 x=3.50 ok\n"]
    mod.launch("asserts", 1, 32, [32])
    with pytest.raises(ptxsim.DeviceAssertError, match=r"threadIdx\.x < n") as e:
        mod.launch("asserts", 1, 32, [20])
    assert e.value.thread == (20, 0, 0)


def test_atomics(mod):
    n = 1000
    x = rng.integers(0, 64, n).astype(np.int32)
    hist, fs, big = np.zeros(16, np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint64)
    mx, ticket, order, bs = (
        np.zeros(1, np.int32),
        np.zeros(1, np.uint32),
        np.zeros(n, np.int32),
        np.zeros(2, np.uint16),
    )
    mod.launch("atomics", 4, 256, [x, hist, fs, big, mx, ticket, order, bs, n])
    assert hist.tolist() == np.bincount(x & 15, minlength=16).tolist()
    assert fs[0] == x.sum() and big[0] == int(x.sum()) << 20 and mx[0] == x.max() and ticket[0] == n
    assert sorted(order.tolist()) == list(range(n))
    assert bf16_to_f32(bs).tolist() == [256.0, 512.0]  # bf16 stops absorbing 1 and 2 there


def test_spin_lock(mod):
    lock, counter = np.zeros(1, np.int32), np.zeros(1, np.int32)
    mod.launch("cas_lock", 3, 128, [lock, counter])
    assert counter[0] == 12 and lock[0] == 0


def test_last_block(mod):
    x, part, done, out = (
        f32(70, 32),
        np.zeros(70, np.float32),
        np.zeros(1, np.uint32),
        np.zeros(1, np.float32),
    )
    mod.launch("last_block", 70, 32, [x, part, done, out], max_lanes=512)
    np.testing.assert_allclose(out[0], x.sum(), rtol=1e-4)


def test_barrier_divergence(mod):
    x = np.zeros(64, np.int32)
    with pytest.raises(ptxsim.BarrierDivergenceError, match="different instructions"):
        mod.launch("bar_diverge", 1, 64, [x])
    with pytest.raises(ptxsim.BarrierDivergenceError, match="48 of 64"):
        mod.launch("bar_missing", 1, 64, [x])
    mod.launch("bar_missing", 1, 64, [x], checks=Checks(exited_at_barrier=False))
    assert (x[:48] == 2).all()
    with pytest.raises(ptxsim.DeadlockError, match="32 threads at barrier 1"):
        mod.launch("bar_deadlock", 1, 64, [x])


def test_named_barriers(mod):
    x = np.zeros(128, np.int32)
    mod.launch("bar_named", 1, 64, [x])
    assert x.tolist() == [it * 100 + 31 - lane for it in range(4) for lane in range(32)]


def test_barrier_reductions(mod):
    x = rng.integers(-5, 5, 256).astype(np.int32)
    o = np.zeros(256, np.int32)
    mod.launch("bar_vote", 2, 128, [x, o])
    for b in range(2):
        assert (
            o[b * 128 : (b + 1) * 128] == (x[:128] > 0).sum() * 100 + 10
        ).all() or b  # both blocks read x[0:128]


def test_uninitialised_shared(mod):
    o = np.zeros(64, np.float32)
    with pytest.raises(ptxsim.UninitialisedSharedError):
        mod.launch("uninit", 1, 64, [o], checks="strict")
    mod.launch("uninit", 1, 64, [o])
    assert np.isnan(o[32:]).all() and (o[:32] == 1).all()


def test_shared_oob(mod):
    o = np.zeros(64, np.float32)
    with pytest.raises(ptxsim.OutOfBoundsError, match="shared"):
        mod.launch("shared_oob", 1, 64, [o], shared_bytes=256)
    mod.launch("shared_oob", 1, 64, [o], shared_bytes=260)
    assert np.array_equal(o[:63], np.arange(1, 64))


def test_write_after_read(mod):
    o = np.zeros(64, np.float32)
    mod.launch("war<true>", 1, 64, [o])
    assert np.array_equal(o, 64 - np.arange(64))
    with pytest.raises(ptxsim.RaceError):
        mod.launch("war<false>", 1, 64, [o])


def test_vector_atomics(mod):
    if not any("vec_atomics" in e for e in mod.entries()):
        pytest.skip("sm_90 only")
    x = np.zeros(6, np.float32)
    mod.launch("vec_atomics", 2, 64, [x])
    assert x.tolist() == [128, 256, 384, 512, 640, 768]


def test_watchdog():
    require_nvcc()
    m = Module.from_ptx(
        nvcc.compile_to_ptx("__global__ void spin(volatile int* x)\n{ while (*x == 0) {} }\n")
    )
    with pytest.raises(ptxsim.WatchdogError):
        m.launch("spin", 1, 32, [np.zeros(1, np.int32)], max_steps=50000)


def test_3d_blocks_and_ragged_warps():
    require_nvcc()
    m = Module.from_ptx(
        nvcc.compile_to_ptx(r"""
__global__ void idx(int* o) {
  __shared__ int s[72];
  int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  s[t] = t * 10 + b;
  __syncthreads();
  o[b * 72 + t] = s[71 - t];
}
template <typename T> struct Acc { T v; __device__ void add(T x) { v += x; } };
// dynamic indexing of a local array, 64-bit sums
__global__ void local_array(const int* x, int* o, int n) {
  long long h[8] = {};
  for (int i = threadIdx.x; i < n; i += blockDim.x) h[x[i] & 7] += x[i];
  long long s = 0;
  for (int i = 0; i < 8; ++i) s = s * 3 + h[i];
  o[threadIdx.x] = (int)(s % 1000003);
}
""")
    )
    o = np.zeros(72 * 12, np.int32)
    m.launch("idx", (3, 2, 2), (6, 4, 3), [o], checks="strict")
    t, b = np.arange(72), np.arange(12)
    assert np.array_equal(o.reshape(12, 72), (71 - t)[None, :] * 10 + b[:, None])
    x, o = rng.integers(-1000, 1000, 500).astype(np.int32), np.zeros(48, np.int32)
    m.launch("local_array", 1, 48, [x, o, 500])
    for t in range(48):
        h = [0] * 8
        for v in x[t::48].tolist():
            h[v & 7] += v
        s = 0
        for v in h:
            s = s * 3 + v
        assert o[t] == (abs(s) % 1000003) * (1 if s >= 0 else -1)
