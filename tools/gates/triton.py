# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles the Triton kernels for every supported GPU and checks the machine code.

    python -m tools.gates.triton              # one configuration per target
    python -m tools.gates.triton --all        # each with all that may be compiled into it
    python -m tools.gates.triton --table docs/triton_kernels.md

The gate objects to spills, to more registers or shared memory than the planned occupancy allows,
to tile kernels without matrix instructions or asynchronous copies (by tensor descriptors where the
table says so), and to narrow accesses of the kernels that walk along rows. It needs no GPU. The
exit status is 1 if anything fails.
"""

import multiprocessing
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

from marginkernels.backends.triton import configs
from marginkernels.backends.triton.backward import head_bwd
from marginkernels.backends.triton.configs import Config
from marginkernels.backends.triton.forward import head_fwd
from marginkernels.backends.triton.loss import head_held, head_loss
from marginkernels.backends.triton.step import head_step
from marginkernels.rotation import Rotation
from marginkernels.rules import NUMBERS, RULES
from marginkernels.transforms import TRANSFORMS

from . import aot, machine_code, triton_table
from .machine_code import Facts

PLAIN_LOADS = dict(statistics_kernel=configs.Load.STATISTICS, gradient_kernel=configs.Load.GRADIENT)
TILE_KERNELS = tuple(PLAIN_LOADS)
# they read whole rows, 16 bytes at a time where D is a multiple of 8
WIDE_KERNELS = ("prepare_rows_kernel", "project_kernel", "target_kernel")
ROWS, CLASSES = 30, 100  # any numbers will do, because sizes are not compiled in

# options that are compiled in or out: as many as possible at once, because they take registers
EXTRAS = dict(want_sum=True, want_max=True, extras=True)
VARIANTS: dict[str, dict] = {
    "plain": {},
    "fp32 weights, odd D": dict(w_dtype=torch.float32, d=500),
    "fp16": dict(dtype=torch.float16),
    "not normalised, bias": dict(normalize=(False, False), bias=True, **EXTRAS),
    "several targets": dict(labels=3),
}
# the row kernels of these variants differ from the ones above hardly or not at all
TILE_VARIANTS: dict[str, dict] = {
    "label smoothing": dict(want_sum=True, want_max=True),
    "bias": dict(bias=True, **EXTRAS),
    "fp16, bias": dict(dtype=torch.float16, bias=True, **EXTRAS),
    "saved tiles": dict(save_tiles=True, want_max=True),
    "several targets, bias": dict(labels=3, bias=True, **EXTRAS),
    "3 centres": dict(sub_centers=3),
    "3 centres, bias": dict(sub_centers=3, bias=True, **EXTRAS),
    "3 centres, airface": dict(sub_centers=3, transform="airface", **EXTRAS),
    **{
        name: dict(transform=name, **EXTRAS)
        for name in TRANSFORMS
        if name != "identity"
    },
}  # fmt: skip
# of the kernel that updates w, which hardly depends on the tile
UPDATE_VARIANTS: dict[str, dict] = {
    "SGD": dict(rule="sgd"),
    "AdamW": dict(rule="adamw"),
    "row-wise Adagrad, index": dict(rule="rowwise_adagrad", index=True),
    "SGD in bf16": dict(rule="sgd", w_dtype=torch.bfloat16, state_dtype=torch.bfloat16),
    "AdamW in bf16, index, projection": dict(
        rule="adamw", w_dtype=torch.bfloat16, state_dtype=torch.bfloat16, index=True, project=True
    ),
    "AdamW, D = 8192": dict(rule="adamw", d=8192),
}
ALL_VARIANTS = VARIANTS | TILE_VARIANTS


class Case(NamedTuple):
    """Holds a target, a configuration of its table and a variant, which are compiled together."""

    target: str
    kind: str
    config: Config
    variant: str = "plain"
    kernels: tuple[str, ...] = TILE_KERNELS
    row_kernels: bool = False  # all of them too


class Row(NamedTuple):
    """Holds the facts of one kernel of a case, and what the gate objects to."""

    case: Case
    kernel: str
    facts: Facts | None  # None: it does not compile
    problems: list[str]

    @property
    def compiled(self) -> Facts:
        """Returns the facts of a kernel that compiled."""
        if self.facts is None:
            raise RuntimeError(f"{self.case}: {self.kernel}: {'; '.join(self.problems)}")
        return self.facts


def cases(everything: bool) -> list[Case]:
    """Lists all cases that the package ships, or a few per target."""
    chosen = {
        (target, kernel): configs.choose(aot.table_name(target), "half", load, 1024)
        for target in aot.GPU_TARGETS
        for kernel, load in PLAIN_LOADS.items()
    }
    updates = [
        Case(target, "half", chosen[target, "gradient_kernel"], variant, ("update_kernel",))
        for target in aot.GPU_TARGETS
        for variant in (UPDATE_VARIANTS if everything else list(UPDATE_VARIANTS)[:1])
    ]
    if everything:
        return [
            Case(target, kind, config, variant, kernels, variant in VARIANTS)
            for target in aot.GPU_TARGETS
            for kind, table in configs.TABLE[aot.table_name(target)].items()
            for config in table
            for variant in ALL_VARIANTS
            if kind == "half" or not {"dtype", "w_dtype"} & set(ALL_VARIANTS[variant])
            if (kernels := served(variant, config))
        ] + updates
    return [
        Case(target, "half", config, "plain", (kernel, *WIDE_KERNELS, "loss_kernel"))
        for (target, kernel), config in chosen.items()
    ] + updates


def served(variant: str, config: Config) -> tuple[str, ...]:
    """Returns the tile kernels of a variant that a configuration serves."""
    settings = ALL_VARIANTS[variant]
    transform, saved = settings.get("transform", "identity"), settings.get("save_tiles", False)
    extras = any(settings.get(name, False) for name in ("bias", "want_sum", "extras", "labels"))
    centers = settings.get("sub_centers", 1)
    loads = dict(
        statistics_kernel=configs.load(
            "statistics", transform, centers, saved=saved, extras=extras
        ),
        gradient_kernel=configs.load("gradient", transform, centers, extras=extras),
    )
    return tuple(
        kernel
        for kernel, load in loads.items()
        if load & config.serves and not (saved and kernel == "gradient_kernel")
    )


def run_launchers(
    dtype: torch.dtype,
    *,
    w_dtype: torch.dtype | None = None,
    d: int = 512,
    normalize: tuple[bool, bool] = (True, True),  # x, w
    bias: bool = False,
    want_sum: bool = False,
    want_max: bool = False,
    extras: bool = False,  # the gradients of norms and of the scale
    save_tiles: bool = False,
    transform: str = "identity",
    labels: int = 1,  # of a row
    sub_centers: int = 1,
    n: int = ROWS,
    c: int = CLASSES,
    config: Config | None = None,
) -> None:
    """Calls the forward and the backward launcher on operands of zeros."""
    definition = TRANSFORMS[transform]
    c *= sub_centers
    x, w = torch.zeros(n, d, dtype=dtype), torch.zeros(c, d, dtype=w_dtype or dtype)
    y, scale = torch.zeros(n, labels, dtype=torch.int64), torch.ones(())
    b = torch.zeros(c) if bias else None
    shared: dict[str, Any] = dict(
        normalize_x=normalize[0], normalize_w=normalize[1], compute_dtype=dtype,
        transform=transform, sub_centers=sub_centers, config=config,
        row_parameter=torch.zeros(n) if definition.per_row else None,
        constants=torch.zeros(definition.constants) if definition.constants else None,
    )  # fmt: skip
    lse, _, _, _, logit_max, x_inv, w_inv, tiles, _ = head_fwd(
        x, w, y, scale, b, save_tiles=save_tiles, want_sum=want_sum, want_max=want_max, **shared
    )
    g, of_targets = torch.zeros(n), torch.zeros(n, labels)
    head_held(y[:, 0], first=0, count=c, ignore_index=-100)
    head_loss(
        lse, g, g, y[:, 0], scale, g if extras else None, logit_max, ignore_index=-100,
        reduction="mean", rotation=Rotation(), need_scale=extras,
    )  # fmt: skip
    head_bwd(
        x, w, y, scale, b, None, lse, x_inv, w_inv, tiles, g, of_targets,
        of_targets if extras else None, g if want_sum else None,
        need_x=True, need_w=True, need_bias=bias, need_scale=extras, **shared,
    )  # fmt: skip


def run_step(
    dtype: torch.dtype,
    *,
    rule: str,
    w_dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    d: int = 512,
    index: bool = False,
    project: bool = False,
    n: int = ROWS,
    c: int = CLASSES,
    config: Config | None = None,
) -> None:
    """Calls the launcher that updates w on operands of zeros."""
    rows, classes = torch.zeros(n), torch.arange(c)
    state = [
        torch.zeros(c, 1) if part.per_row else torch.zeros(c, d, dtype=state_dtype)
        for part in RULES[rule].state
    ]
    head_step(
        torch.zeros(n, d, dtype=dtype), torch.zeros(c, d, dtype=w_dtype),
        torch.zeros(n, dtype=torch.int64), torch.ones(()), None, classes if index else None, rows,
        rows, torch.zeros(c), torch.zeros(0), rows, rows, None, None, state, torch.zeros(NUMBERS),
        torch.zeros(2, dtype=torch.int64), normalize_x=True, normalize_w=True, compute_dtype=dtype,
        need_x=True, need_bias=False, need_scale=False, transform="identity", row_parameter=None,
        constants=None, rule=rule, project=project, first_class=0, config=config,
    )  # fmt: skip


def launches_of(case: Case) -> list[aot.Launch]:
    """Lists the launches of a case, each specialisation once."""
    dtype = torch.bfloat16 if case.kind == "half" else torch.float32
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.kind == "tf32" else "ieee"
    with aot.recorded_launches(case.target) as launches:
        if case.variant in UPDATE_VARIANTS:
            run_step(dtype, config=case.config, **UPDATE_VARIANTS[case.variant])
        else:
            settings = dict(dict(dtype=dtype), **ALL_VARIANTS[case.variant])
            run_launchers(config=case.config, **settings)
    wanted = (
        found
        for found in launches
        if found.kernel in case.kernels or (case.row_kernels and found.kernel not in TILE_KERNELS)
    )
    return list({(found.kernel, found.key): found for found in wanted}.values())


def problems_of(case: Case, kernel: str, found: Facts) -> list[str]:
    """Lists what the gate objects to."""
    # a row that is too long for four warps has a multiprocessor to itself
    planned = case.config.ctas if kernel in TILE_KERNELS else 1 + (found.threads <= 256)
    problems = machine_code.problems_of(found, case.target, planned, "programs")
    if kernel in TILE_KERNELS:
        if case.kind != "fp32" and found.mma == 0:
            problems.append("no matrix instruction")
        if case.target != "gfx942" and found.async_copies == 0:
            problems.append("no asynchronous copy")
        if case.config.descriptors != (found.async_copies == found.tensor_copies > 0):
            problems.append(f"{found.tensor_copies} copies by tensor descriptors")
        if found.registers < 32:
            problems.append(f"{found.registers} registers: the kernel is empty")
    if kernel in WIDE_KERNELS and case.variant == "plain" and found.wide_loads == 0:
        problems.append("no load of 16 bytes")
    if kernel == "update_kernel":
        # what is stored was loaded, and the gradient; a norm and a row's state are single numbers
        if not 0 < found.wide_stores < found.wide_loads:
            problems.append(f"{found.wide_loads} loads, {found.wide_stores} stores of 16 bytes")
        if found.narrow_stores > 2:
            problems.append(f"{found.narrow_stores} stores of fewer than 16 bytes")
    return problems


def check(case: Case, wanted: set[tuple[str, str]] | None = None) -> list[Row]:
    """Compiles and judges the kernels of a case, or only those wanted.

    A failed compilation is a problem too.
    """
    rows = []
    for found in launches_of(case):
        if wanted is not None and (found.kernel, found.key) not in wanted:
            continue
        try:
            with aot.quiet():
                code = machine_code.facts(aot.compile_launch(found, case.target), case.target)
            rows.append(Row(case, found.kernel, code, problems_of(case, found.kernel, code)))
        except Exception:
            last = traceback.format_exc().strip().splitlines()[-1]
            rows.append(Row(case, found.kernel, None, [f"does not compile: {last}"]))
    return rows


def check_all(todo: list[Case], jobs: int = 2) -> list[Row]:
    """Checks each kernel once, however many cases launch it.

    Compilers run in processes of their own: one that aborts must not end the check.
    """
    spawn = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    seen: set[tuple[str, str, str]] = set()
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        futures = {}
        for case in todo:
            launches = {(case.target, found.kernel, found.key) for found in launches_of(case)}
            if fresh := {key[1:] for key in launches - seen}:
                futures[pool.submit(check, case, fresh)] = case
            seen |= launches
        for future, case in futures.items():
            try:
                rows += future.result()
            except Exception as error:
                rows.append(Row(case, "?", None, [f"worker died: {error!r}"]))
    return rows


def describe(row: Row) -> str:
    """Returns the line that the gate prints about a kernel."""
    case, config = row.case, row.case.config
    tile = f"{config.block_n}x{config.block_c}x{config.block_d}"
    where = f"{case.target} {case.kind} {tile} {case.variant}: {row.kernel}"
    return machine_code.describe(where, row.facts, row.problems)


def main() -> int:
    """Runs the gate, or writes the table; returns the exit status."""
    parser = machine_code.command_line(__doc__)
    parser.add_argument("--all", action="store_true", help="check everything that is shipped")
    arguments = parser.parse_args()
    if arguments.table:
        variants = {*triton_table.VARIANTS, *UPDATE_VARIANTS}
        shown = [case for case in cases(True) if case.variant in variants]
        rows = check_all(shown, arguments.jobs)
        with open(arguments.table, "w") as file:
            file.write(triton_table.render(rows))
    else:
        rows = check_all(cases(arguments.all), arguments.jobs)
    failed = [row for row in rows if row.problems]
    for row in rows if arguments.verbose else failed:
        print(describe(row))
    print(
        f"triton {triton.__version__}: {len(rows)} kernels for {len(aot.GPU_TARGETS)} targets, "
        f"{len(failed)} failures"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
