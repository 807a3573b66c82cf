# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads instruction counts of the kernels off code that Triton compiles for each GPU.

    python -m tools.model --compile       # writes code.json

code.json keeps the counts, because compiling takes minutes and the model is to be quick.
"""

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..gates import aot, machine_code
from ..gates import triton as gate
from ..gates.machine_code import Facts

FILE = Path(__file__).with_name("code.json")
# waits of a program, read off the source: loads whose addresses were loaded, sums along a row, and
# turns of a loop over labels
WAITS = {"project_kernel": 3, "update_kernel": 3, "finish_rows_kernel": 3, "target_kernel": 14}
BATCHES = (256, 1024)  # rows, which choose the tile
TILE_SIZES = ("BLOCK_N", "BLOCK_C", "BLOCK_D", "num_warps", "num_stages")
TILE_KERNELS = ("statistics_kernel", "gradient_kernel")
D = 512  # a row kernel's loop over the features has one turn here


class Tile(NamedTuple):
    """Describes the tile of a launch."""

    block_n: int
    block_c: int
    block_d: int
    warps: int
    stages: int
    descriptors: bool = False  # copies by TMA
    flatten: bool = False  # copies for the next tile start before this one's logits are done

    def __str__(self) -> str:
        text = f"{self.block_n}x{self.block_c}x{self.block_d} {self.warps}w {self.stages}s"
        return text + " TMA" * self.descriptors + " flat" * self.flatten


class Code(NamedTuple):
    """Holds the counts of one kernel."""

    programs: int  # that a multiprocessor holds at once
    loop: float = 0.0  # instructions of a warp in the main loop, per matrix instruction
    epilogue: float = 0.0  # instructions of a thread per logit, after the main loop
    exponentials: float = 0.0  # per logit: MUFU, in the whole kernel
    row: float = 0.0  # instructions of all warps per row of D = 512, of a row kernel
    waits: float = 1.0  # of a program for memory, one after the other; of a row kernel
    waits_per_label: float = 0.0  # and for each row of the batch, where it looks through all labels
    source: str = ""  # a hash of the kernel's source


def key(arch: str, kernel: str, tile: object = "") -> str:
    """Returns the name of a kernel's counts in the file."""
    return f"{arch} {kernel} {tile}".strip()


@functools.cache
def known() -> dict[str, Code]:
    """Returns the counts of the file."""
    return {name: Code(**counts) for name, counts in json.loads(FILE.read_text()).items()}


def of_launch(launch: aot.Launch, arch: str) -> Code:
    """Compiles what one launch asks for, and counts."""
    with aot.quiet():
        compiled = aot.compile_launch(launch, arch)
    found = machine_code.facts(compiled, arch)
    sass = machine_code.tool("nvdisasm", "-c", compiled.asm["cubin"])
    text = [i.text for i in machine_code.parse(sass)]
    code = Code(found.occupancy(arch), source=launch.source.fn.cache_key[:8])
    if launch.kernel in TILE_KERNELS:
        return _of_tile(code, found, text, launch.arguments)
    rows = launch.arguments.get("BLOCK_R", 1)
    body = len([line for line in text if not re.match(r"NOP|BRA", line)])
    return code._replace(
        row=body * found.threads / 32 / rows,
        waits=WAITS.get(launch.kernel, 1),
    )


def _of_tile(code: Code, found: Facts, text: list[str], sizes: dict[str, Any]) -> Code:
    logits = sizes["BLOCK_N"] * sizes["BLOCK_C"] / found.threads  # of a thread
    exponentials = machine_code.count(text, r"MUFU\S*") / logits
    epilogue, copies = found.epilogue / logits, 1
    if sizes.get("FLATTEN"):  # what follows the main loop is a branch in it, and there twice
        copies = round(exponentials)
        epilogue = found.loop / logits / copies
    return code._replace(
        loop=round(found.loop / max(found.loop_mma, 1), 2),
        epilogue=round(epilogue, 2),
        exponentials=round(exponentials / copies, 2),
    )


def compile_all(archs: Iterable[str]) -> dict[str, Code]:
    """Returns the counts of all that steps launch on these targets, compiled where it changed."""
    found: dict[str, Code] = {}
    for arch in archs:
        for launch in _launches(arch):
            tile = (
                recorded_tile(launch.arguments | launch.options)
                if launch.kernel in TILE_KERNELS
                else ""
            )
            own, source = key(arch, launch.kernel, tile), launch.source.fn.cache_key[:8]
            if own not in found:
                old = known().get(own)
                found[own] = old if old and old.source == source else of_launch(launch, arch)
    return found


def recorded_tile(sizes: dict[str, Any]) -> Tile:
    """Returns the tile of a launch."""
    flags = (sizes.get(flag, False) for flag in ("DESCRIPTORS", "FLATTEN"))
    return Tile(*(sizes[size] for size in TILE_SIZES), *flags)


def _launches(arch: str) -> list[aot.Launch]:
    with aot.recorded_launches(arch) as launches:
        for n in BATCHES:
            for weights in (torch.bfloat16, torch.float32):
                gate.run_launchers(torch.bfloat16, w_dtype=weights, d=D, n=n)
                gate.run_step(torch.bfloat16, rule="sgd", w_dtype=weights, d=D, n=n)
    return launches


def write(counts: dict[str, Code]) -> None:
    """Writes the file, without zeros."""
    lines = {
        name: {k: v for k, v in code._asdict().items() if v}
        for name, code in sorted(counts.items())
    }
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in lines.items())
    FILE.write_text("{\n" + text + "\n}\n")
