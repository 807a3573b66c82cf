# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles the Triton kernels for every supported GPU and checks what came out.

    python -m tests.gpu.compile_gate              # one configuration per target
    python -m tests.gpu.compile_gate --all        # every configuration, of what trains by default
    python -m tests.gpu.compile_gate --variants   # and with all that may be compiled in: some spill
    python -m tests.gpu.compile_gate --table docs/triton_kernels.md

Checked are spills, registers and shared memory for the planned occupancy, matrix instructions, and
asynchronous copies. No GPU is needed. The exit status is 1 if anything fails.
"""

import argparse
import functools
import multiprocessing
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import triton

from marginkernels.backends.triton import configs, launch
from marginkernels.backends.triton.configs import Config

from . import aot, kernel_table
from .machine_code import Facts, facts

TILE_KERNELS = ("statistics_kernel", "gradient_kernel")
ROWS, CLASSES = 300, 1000  # any will do: sizes are not compiled in

PLAIN = dict(bias=False, want_sum=False, want_max=False, extras=False)
# what may be compiled in or out of the tile kernels, and the layouts that the others see
VARIANTS: dict[str, dict] = {
    "plain": {},
    "with statistics": dict(want_max=True),
    "label smoothing": dict(want_sum=True),
    "bias": dict(bias=True, extras=True),
    "everything": dict(bias=True, want_sum=True, want_max=True, extras=True),
    "not normalised": dict(normalize=(False, False), want_sum=True, want_max=True, extras=True),
    "not normalised, bias": dict(normalize=(False, False), bias=True, extras=True),
    "saved tiles": dict(save_tiles=True),
    "saved tiles with statistics": dict(save_tiles=True, want_max=True),
    "fp32 weights, odd D": dict(w_dtype=torch.float32, d=500),
    "fp16": dict(dtype=torch.float16),
    "fp16 everything": dict(
        dtype=torch.float16, bias=True, want_sum=True, want_max=True, extras=True
    ),
}  # fmt: skip

# these may not fail; the others share their tiles, which are too large for some of them yet
GATED = ("plain", "with statistics", "fp32 weights, odd D", "fp16")


class Case(NamedTuple):
    target: str
    kind: str
    config: Config
    variants: tuple[str, ...]
    kernels: tuple[str, ...] | None  # None: all


class Row(NamedTuple):
    case: Case
    variant: str
    kernel: str
    facts: Facts | None
    problems: list[str]


def cases(everything: bool, variants: tuple[str, ...] = GATED) -> list[Case]:
    found = []
    for target in aot.GPU_TARGETS:
        kinds = configs.TABLE[aot.table_name(target)]
        if not everything:
            config = configs.choose(aot.table_name(target), "half", 1024)
            found.append(Case(target, "half", config, ("plain",), TILE_KERNELS))
            continue
        for kind, table in kinds.items():
            names = [
                name
                for name, variant in VARIANTS.items()
                if name in variants and (kind == "half" or not {"dtype", "w_dtype"} & set(variant))
            ]
            for config in table:
                found += [Case(target, kind, config, (name,), None) for name in names]
    return found


def run_launchers(
    dtype, w_dtype=None, d=512, normalize=(True, True), bias=False, want_sum=False, want_max=False,
    extras=False, save_tiles=False, n=ROWS, c=CLASSES, config=None,
) -> None:  # fmt: skip
    """One forward and one backward call on operands without content."""
    x, w = torch.zeros(n, d, dtype=dtype), torch.zeros(c, d, dtype=w_dtype or dtype)
    y, scale, b = torch.zeros(n, dtype=torch.int64), torch.ones(()), torch.zeros(c)
    shared = dict(
        normalize_x=normalize[0], normalize_w=normalize[1], compute_dtype=dtype,
        transform="identity", row_parameter=None, constants=None, config=config,
    )  # fmt: skip
    b = b if bias else None
    lse, _, _, _, _, x_inv, w_inv, tiles = launch.head_fwd(
        x, w, y, scale, b, save_tiles=save_tiles, want_sum=want_sum, want_max=want_max, **shared
    )
    g = torch.zeros(n)
    launch.head_bwd(
        x, w, y, scale, b, lse, x_inv, w_inv, tiles, g, g,
        g if extras else None, g if want_sum else None,
        need_x=True, need_w=True, need_bias=bias, need_scale=extras, **shared,
    )  # fmt: skip


def launches_of(case: Case, variant: str) -> list[aot.Launch]:
    """What the launchers launch for a case, each specialisation once."""
    dtype = torch.bfloat16 if case.kind == "half" else torch.float32
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.kind == "tf32" else "ieee"
    settings = dict(dict(dtype=dtype), **VARIANTS[variant])
    with aot.recorded_launches(case.target) as launches:
        run_launchers(config=case.config, **settings)
    return list({(found.kernel, found.key): found for found in launches}.values())


def problems_of(case: Case, kernel: str, found: Facts) -> list[str]:
    """What the gate objects to."""
    problems = []
    if found.spilled:
        problems.append(f"{found.spilled} spills")
    occupancy = found.occupancy(case.target)
    planned = case.config.ctas if kernel in TILE_KERNELS else 2
    if occupancy < planned:
        problems.append(
            f"{occupancy} programs per multiprocessor, {planned} planned "
            f"({found.registers} registers, {found.shared} bytes of shared memory)"
        )
    if kernel in TILE_KERNELS:
        if case.kind != "fp32" and found.mma == 0:
            problems.append("no matrix instruction")
        if case.target != "gfx942" and found.async_copies == 0:
            problems.append("no asynchronous copy")
        if found.registers < 32:
            problems.append(f"{found.registers} registers: the kernel is empty")
    return problems


@functools.cache
def facts_of(launch: aot.Launch, target: str) -> Facts:
    """Most kernels along rows are the same in many variants."""
    with aot.quiet():
        return facts(aot.compile_launch(launch, target), target)


def check(case: Case) -> list[Row]:
    """Compiles the kernels of a case and judges them; a failed compilation is a problem too."""
    rows = []
    for variant in case.variants:
        for found in launches_of(case, variant):
            if case.kernels is not None and found.kernel not in case.kernels:
                continue
            try:
                code = facts_of(found, case.target)
            except Exception:
                last = traceback.format_exc().strip().splitlines()[-1]
                rows.append(Row(case, variant, found.kernel, None, [f"does not compile: {last}"]))
                continue
            problems = problems_of(case, found.kernel, code)
            rows.append(Row(case, variant, found.kernel, code, problems))
    return rows


def check_all(todo: list[Case], jobs: int = 2) -> list[Row]:
    """In processes of their own: a compiler that aborts must not take the check along."""
    spawn = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        futures = [pool.submit(check, case) for case in todo]
        for case, future in zip(todo, futures, strict=True):
            try:
                rows += future.result()
            except Exception as error:
                rows.append(Row(case, case.variants[0], "?", None, [f"worker died: {error!r}"]))
    return rows


def describe(row: Row) -> str:
    case, config = row.case, row.case.config
    tile = f"{config.block_n}x{config.block_c}x{config.block_d}"
    where = f"{case.target} {case.kind} {tile} {row.variant}: {row.kernel}"
    if row.problems:
        return f"FAIL {where}: " + "; ".join(row.problems)
    return f"ok   {where}: {row.facts.registers} registers, {row.facts.shared} bytes shared"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration")
    parser.add_argument("--variants", action="store_true", help="also what is not gated yet")
    parser.add_argument("--table", metavar="FILE", help="write the table of facts and stop")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="also what passes")
    arguments = parser.parse_args()
    if arguments.table:
        everything = [case for case in cases(True) if case.variants in (("plain",),)]
        rows = check_all(everything, arguments.jobs)
        with open(arguments.table, "w") as file:
            file.write(kernel_table.render(rows))
    else:
        variants = tuple(VARIANTS) if arguments.variants else GATED
        everything = arguments.all or arguments.variants
        rows = check_all(cases(everything, variants), arguments.jobs)
    failed = [row for row in rows if row.problems]
    for row in rows if arguments.verbose else failed:
        print(describe(row))
    kernels = {(row.case.target, row.case.kind, row.case.config, row.variant, row.kernel)
               for row in rows}  # fmt: skip
    print(
        f"triton {triton.__version__}: {len(kernels)} kernels for {len(aot.GPU_TARGETS)} targets, "
        f"{len(failed)} failures"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
