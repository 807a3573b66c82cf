# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs a few instructions of hand-written PTX."""

import numpy as np

from tools.ptxsim import Module

HEAD = ".version 8.3\n.target sm_90\n.address_size 64\n"
rng = np.random.default_rng(1)


def run(body, ins, out_type="b32", n=32, decl="", grid=1, shared=0, **kw):
    """Runs `body` with inputs in %a0, %a1, ... and the result in %o; returns the result array."""
    size = {"b16": 2, "b32": 4, "b64": 8}
    tys = []
    loads, params = "", ".param .u64 po"
    for k, x in enumerate(ins):
        t = f"b{x.dtype.itemsize * 8}"
        tys.append(t)
        params += f", .param .u64 p{k}"
        loads += (
            f".reg .{t} %a{k}; ld.param.u64 %p, [p{k}]; mad.wide.u32 %q, %i, {size[t]}, %p; "
            f"ld.global.{t} %a{k}, [%q];\n"
        )
    src = f"""{HEAD}{decl}
.visible .entry k({params})
{{
  .reg .b64 %p, %q; .reg .b32 %i, %t, %u; .reg .{out_type} %o; .reg .pred %x, %y, %z;
  .reg .b16 %h<8>; .reg .b32 %r<40>;
  .reg .b64 %d<8>;
  mov.u32 %t, %ctaid.x; mov.u32 %u, %ntid.x; mov.u32 %i, %tid.x; mad.lo.s32 %i, %t, %u, %i;
  {loads}
  {body}
  ld.param.u64 %p, [po]; mad.wide.u32 %q, %i, {size[out_type]}, %p; st.global.{out_type} [%q], %o;
  ret;
}}
"""
    o = np.zeros(n * grid, {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}[out_type])
    Module.from_ptx(src).launch(
        "k", grid, n, [o] + [np.ascontiguousarray(x) for x in ins], shared, **kw
    )
    return o


def u32(n=32):
    return rng.integers(0, 2**32, n, dtype=np.uint32)


def f32(n=32):
    return rng.standard_normal(n).astype(np.float32)
