# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Says which function compiles which instruction on memory."""

from ..compiling import Compiler
from .async_copies import compile_cp
from .atomics import compile_atom
from .load_store import compile_ld, compile_st
from .matrices import compile_ldmatrix, compile_stmatrix

MEMOPS: dict[str, Compiler] = {
    "ld": compile_ld,
    "ldu": compile_ld,
    "st": compile_st,
    "atom": compile_atom,
    "red": compile_atom,
    "cp": compile_cp,
    "ldmatrix": compile_ldmatrix,
    "stmatrix": compile_stmatrix,
}
