# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles the CUDA kernels for every supported GPU and checks the machine code.

    python -m tools.gates.cuda                                # every kernel for every target
    python -m tools.gates.cuda --table docs/cuda_kernels.md   # the table of facts, of the main ones

The gate objects to spills, to more registers or shared memory than the planned occupancy allows,
to tile kernels without matrix instructions, loads of matrices from shared memory or asynchronous
copies, and to an optimizer's step that does not read and write four numbers at once. It needs no
GPU. The table also has counters from the simulator of PTX. The
exit status is 1 if anything fails.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import machine_code, nvcc
from .machine_code import RESERVED_SHARED, SHARED, Facts, count, nvidia_facts, tool

MMA, LOAD_MATRICES = "HMMA", "LDSM"
FEATURES = 32  # per stage of a tile
BITS_OF_FOUR = {"float": 128, "bf16": 64, "double": 128}  # of the widest load there is


class Tile(NamedTuple):
    """Holds the shape of a tile of csrc/cuda/kernels.h."""

    rows: int
    classes: int

    @property
    def stage_bytes(self) -> int:
        """Counts the bytes of shared memory of a stage."""
        return (self.rows + self.classes) * FEATURES * 2


class Kernel(NamedTuple):
    """Holds a compiled kernel's name and facts."""

    target: str
    name: str
    facts: Facts
    load_matrices: int
    loads: dict[int, int]  # of global memory, by their bits
    stores: dict[int, int]

    @property
    def tile(self) -> Tile | None:
        """Returns the tile of a tile kernel."""
        return tile_of(self.name)


def header(constant: str) -> int:
    """Returns a number from csrc/cuda/kernels.h."""
    text = (nvcc.KERNELS / "kernels.h").read_text()
    found = re.search(rf"\b{constant} = (\d+)", text)
    if found is None:
        raise LookupError(f"csrc/cuda/kernels.h: expected a number {constant}, found none")
    return int(found[1])


def tile_of(name: str) -> Tile | None:
    """Returns the tile in the name of a tile kernel; the other kernels have none."""
    found = re.search(r"\bTile<(\d+), (\d+)>", name)
    if found is None:
        return None
    row_warps, warp_classes = int(found[1]), int(found[2])
    return Tile(64 * row_warps, 4 // row_warps * warp_classes)


def stages(target: str) -> int:
    """Returns the result of stages_per_block() in csrc/cuda/device.cu on a target."""
    most, fewest, blocks = (
        header(f"k{name}") for name in ("MostStages", "FewestStages", "BlocksPerSm")
    )
    wanted = blocks * (most * Tile(128, 128).stage_bytes + RESERVED_SHARED)
    return most if SHARED[target][0] >= wanted else fewest


def planned_blocks(kernel: str) -> int:
    """Returns how many blocks of a kernel are to fit on a multiprocessor."""
    if "loss_kernel" in kernel:
        return 1  # there is only one, which walks over all rows
    return header("kBlocksPerSm" if tile_of(kernel) else "kRowBlocksPerSm")


def kernels_of(source: Path | str, target: str) -> list[Kernel]:
    """Compiles a file or a text, and returns its kernels."""
    cubin = nvcc.compile_as("cubin", source, target)
    listing = tool("nvdisasm", "-c", cubin)
    sections = re.split(r"^\.text\.(\S+):$", listing, flags=re.M)[1:]
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", tool("cuobjdump", "-res-usage", cubin)
    )
    resources = {symbol: (int(registers), int(shared)) for symbol, registers, shared in usage}
    threads = _threads(tool("nvdisasm", "-hex", cubin))
    found = []
    symbols, texts = sections[::2], sections[1::2]
    for symbol, name, text in zip(symbols, nvcc.demangled(symbols), texts, strict=True):
        registers, shared = resources[symbol]
        name = short(name)
        if tile := tile_of(name):
            shared += stages(target) * tile.stage_bytes
        facts = nvidia_facts(text, registers, shared, threads[symbol], MMA)
        lines = text.splitlines()
        accesses = (_accesses(lines, "LDG"), _accesses(lines, "STG"))
        found.append(Kernel(target, name, facts, count(lines, LOAD_MATRICES), *accesses))
    return found


def _accesses(lines: list[str], mnemonic: str) -> dict[int, int]:
    """Counts the instructions that load or store 64 or 128 bits at once."""
    return {bits: count(lines, rf"{mnemonic}\.E\S*\.{bits}") for bits in (64, 128)}


def _threads(listing: str) -> dict[str, int]:
    """Returns the threads of a block by symbol: __launch_bounds__ leaves them as an attribute."""
    found = {}
    for section in re.split(r"^\s*\.section\s+\.nv\.info\.", listing, flags=re.M)[1:]:
        limit = re.search(r"EIATTR_MAX_THREADS.*?\.word\s+(0x\w+)", section, re.S)
        found[section.split(",")[0]] = int(limit[1], 16) if limit else 1024
    return found


def short(name: str) -> str:
    """Returns the name of a kernel without namespaces and arguments."""
    return re.sub(r"marginkernels::cuda::|mk::", "", name).split("(")[0].replace("> >", ">>")


def problems_of(kernel: Kernel) -> list[str]:
    """Lists what the gate objects to."""
    facts, planned = kernel.facts, planned_blocks(kernel.name)
    problems = machine_code.problems_of(facts, kernel.target, planned, "blocks")
    if kernel.tile:
        if facts.mma == 0:
            problems.append("no matrix instruction")
        if kernel.load_matrices == 0:
            problems.append("no load of matrices")
        if facts.async_copies == 0:
            problems.append("no asynchronous copy")
    if (row := updated_row(kernel.name)) is not None:
        bits, fewest = row
        for what, found in (("loads", kernel.loads), ("stores", kernel.stores)):
            if found[bits] < fewest:
                problems.append(f"{found[bits]} {what} of {bits} bits, {fewest} planned")
    return problems


def updated_row(name: str) -> tuple[int, int] | None:
    """Returns the bits of four weights, and how often a lane of an update kernel has four.

    A kernel that walks along longer rows has them once; other kernels update nothing.
    """
    found = re.search(r"\bupdate_kernel<\w+, (\w+), \w+, [\w:]+, (\d+)>", name)
    if found is None:
        return None
    return BITS_OF_FOUR[found[1]], max(int(found[2]), 1)


def check_all(sources: list[Path | str], jobs: int) -> list[Kernel]:
    """Compiles every kernel in the sources for every target."""
    todo = [(source, target) for target in nvcc.TARGETS for source in sources]
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda each: kernels_of(*each), todo)
        return [kernel for kernels in found for kernel in kernels]


def describe(kernel: Kernel) -> str:
    """Returns the line that the gate prints about a kernel."""
    where = f"{kernel.target} {kernel.name}"
    return machine_code.describe(where, kernel.facts, problems_of(kernel))


def main() -> int:
    """Runs the gate, or writes the table; returns the exit status."""
    arguments = machine_code.command_line(__doc__).parse_args()
    if reason := nvcc.why_not():
        print(f"skipped: {reason}")
        return 0
    if arguments.table:
        from . import cuda_table

        kernels = check_all([nvcc.instances(cuda_table.KERNELS)], arguments.jobs)
        Path(arguments.table).write_text(cuda_table.render(kernels))
        return 0
    kernels = check_all(sorted(nvcc.KERNELS.glob("*.cu")), arguments.jobs)
    failed = [kernel for kernel in kernels if problems_of(kernel)]
    for kernel in kernels if arguments.verbose else failed:
        print(describe(kernel))
    print(f"{len(kernels)} kernels for {len(nvcc.TARGETS)} targets, {len(failed)} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
