# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Reads facts off compiled kernels: registers, spills, shared memory, the hot path.

Both gates judge kernels by these facts.
"""

import argparse
import heapq
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

MMA = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
ASYNC_COPY = re.compile(r"LDGSTS|UTMALDG|UBLKCP")
# per multiprocessor, or per compute unit of the gfx942: bytes of shared memory, the bytes that one
# program may have of them, and threads
SHARED = {
    "sm_80": (164 << 10, 163 << 10, 2048),
    "sm_86": (100 << 10, 99 << 10, 1536),
    "sm_89": (100 << 10, 99 << 10, 1536),
    "sm_90": (228 << 10, 227 << 10, 2048),
    "sm_100": (228 << 10, 227 << 10, 2048),
    "sm_120": (100 << 10, 99 << 10, 1536),
    "gfx942": (64 << 10, 64 << 10, 2048),
}
REGISTERS = 65536
RESERVED_SHARED = 1 << 10  # per program, by CUDA


@dataclass(frozen=True)
class Facts:
    """Holds the facts of one kernel for one target."""

    registers: int  # per thread
    spilled: int  # instructions that move registers to local memory and back; on AMD, registers
    shared: int  # bytes per program
    threads: int
    mma: int  # instructions in the whole kernel
    async_copies: int
    tensor_copies: int = 0  # of those, by tensor descriptors
    loop: int = 0  # instructions of the main loop
    loop_mma: int = 0
    loop_flops: int = 0  # of all warps, in one turn of the main loop
    epilogue: int = 0  # instructions per warp from the main loop to the next tile, or to the end
    wide_loads: int = 0  # from global memory, of 16 bytes
    wide_stores: int = 0
    narrow_stores: int = 0  # of fewer bytes

    def occupancy(self, target: str) -> int:
        """Returns how many programs a multiprocessor can hold.

        Registers, shared memory and threads limit it.
        """
        shared, most, threads = SHARED[target]
        if self.shared > most:
            return 0
        if target == "gfx942":
            # each of the four SIMD units has registers of its own
            waves = 512 // _up(self.registers, 8) * 4
            by_registers = waves * 64 // self.threads
            return min(by_registers, shared // max(self.shared, 1), threads // self.threads)
        warps = REGISTERS // (_up(self.registers, 8) * 32)
        by_registers = warps * 32 // self.threads
        return min(by_registers, shared // (self.shared + RESERVED_SHARED), threads // self.threads)


def problems_of(found: Facts, target: str, planned: int, unit: str) -> list[str]:
    """Lists spills, and too few programs (called ``unit`` in the text) on a multiprocessor."""
    problems = []
    if found.spilled:
        problems.append(f"{found.spilled} spills")
    occupancy = found.occupancy(target)
    if occupancy < planned:
        problems.append(
            f"{occupancy} {unit} per multiprocessor, {planned} planned ({found.registers} "
            f"registers, {found.threads} threads, {found.shared} bytes of shared memory)"
        )
    return problems


def describe(where: str, found: Facts | None, problems: list[str]) -> str:
    """Returns the line that a gate prints about a kernel."""
    if problems or found is None:
        return f"FAIL {where}: " + "; ".join(problems)
    return f"ok   {where}: {found.registers} registers, {found.shared} bytes shared"


def command_line(doc: str) -> argparse.ArgumentParser:
    """Returns a parser of the options that both gates have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--table", metavar="FILE", help="write the table of facts and stop")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print kernels that pass too")
    return parser


def markdown_table(header: str, rows: list[str]) -> list[str]:
    """Returns the lines of a table; ``|`` separates the cells of the header and of each row."""
    rule = "|".join(["---"] * (header.count("|") + 1))
    return [f"| {header} |", f"|{rule}|", *[f"| {row} |" for row in rows]]


def facts(compiled: CompiledKernel, target: str) -> Facts:
    """Returns the facts of a kernel that Triton compiled for ``target``."""
    if target == "gfx942":
        return _amd_facts(compiled)
    sass = tool("nvdisasm", "-c", compiled.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", compiled.asm["cubin"])
    registers = _number(r"REG:(\d+)", usage)
    metadata = compiled.metadata
    return nvidia_facts(sass, registers, metadata.shared, metadata.num_warps * 32, MMA[target])


def nvidia_facts(sass: str, registers: int, shared: int, threads: int, mma: str) -> Facts:
    """Returns the facts of one kernel's listing; ``mma`` names its matrix instructions."""
    code = parse(sass)
    text = [instruction.text for instruction in code]
    loop, epilogue = hot_path(code, mma)
    return Facts(
        registers=registers,
        spilled=count(text, "(STL|LDL)"),
        shared=shared,
        threads=threads,
        mma=count(text, mma),
        async_copies=sum(bool(ASYNC_COPY.search(line)) for line in text),
        tensor_copies=count(text, "UTMALDG"),
        loop=len(loop),
        loop_mma=count([instruction.text for instruction in loop], mma),
        loop_flops=sum(_flops(i.text, threads // 32) for i in loop),
        epilogue=epilogue,
        wide_loads=count(text, r"LDG\S*\.128"),
        wide_stores=count(text, r"STG\S*\.128"),
        narrow_stores=count(text, r"STG(?!\S*\.128)\S*"),
    )


def _flops(text: str, warps: int) -> int:
    """Returns the FLOPs of a matrix instruction that every warp issues.

    They are 0 where the shape is not in the name of the instruction.
    """
    if shape := re.search(r"\bHMMA\.16816\b|\bHMMA\.1688\b", text):
        return warps * 2 * 16 * 8 * (16 if shape[0].endswith("16816") else 8)
    if shape := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\b", text):
        m, n, k = (int(size) for size in shape.groups())
        return warps // 4 * 2 * m * n * k
    return 0


def _amd_facts(compiled: CompiledKernel) -> Facts:
    text = compiled.asm["amdgcn"]
    number = {
        name: _number(rf"\.{name}:\s+(\d+)", text)
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    return Facts(
        registers=number["vgpr_count"],
        spilled=number["vgpr_spill_count"] + number["private_segment_fixed_size"],
        shared=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * 64,
        mma=len(re.findall(r"^\s+v_mfma", text, re.M)),
        async_copies=0,
        wide_loads=_amd_count("load_dwordx4", text),
        wide_stores=_amd_count("store_dwordx4", text),
        narrow_stores=_amd_count(r"store_(?!dwordx4)\w+", text),
    )


def _amd_count(access: str, text: str) -> int:
    return len(re.findall(rf"^\s+(?:global|buffer|flat)_{access}\b", text, re.M))


@dataclass(frozen=True)
class Instruction:
    """Holds one machine instruction."""

    address: int
    text: str
    jump: int | None  # address where it may continue
    falls_through: bool


def parse(sass: str) -> list[Instruction]:
    """Returns the instructions of the one kernel in nvdisasm's listing."""
    listing: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            pending.append(label[1])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            address = int(found[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending = []
            listing.append((address, found[2]))
    code = []
    for address, text in listing:
        predicated = text.startswith("@") and not text.startswith("@PT")
        body = re.sub(r"^@\S+\s+", "", text)
        jump, falls_through = None, True
        if target := re.search(r"(?:BRA|BRX)\S*\s.*`\((\.L_x_\d+)\)", body):
            jump = labels[target[1]]
            # a branch may take its condition as an operand too
            conditional = re.match(r"\S+\s+\S+,\s*`", body) or re.search(r"\bU?P\d", body)
            falls_through = predicated or bool(conditional)
        elif body.startswith("EXIT"):
            falls_through = predicated
        code.append(Instruction(address, text, jump, falls_through))
    return code


def hot_path(code: list[Instruction], mma: str) -> tuple[list[Instruction], int]:
    """Returns the innermost loop with matrix instructions, and the length of the epilogue.

    The epilogue is the shortest way from the end of the loop to the next tile or the end of the
    kernel. The shortest way leaves out the code that only flagged tiles execute.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    loops = [
        (index[instruction.jump], i)
        for i, instruction in enumerate(code)
        if instruction.jump is not None and instruction.jump <= instruction.address
    ]
    loops = [
        (start, stop)
        for start, stop in loops
        if any(re.search(rf"\b{mma}", instruction.text) for instruction in code[start : stop + 1])
    ]
    if not loops:
        return [], 0
    start, stop = min(loops, key=lambda loop: loop[1] - loop[0])
    distance, queue = {stop + 1: 0}, [(0, stop + 1)]
    while queue:
        length, i = heapq.heappop(queue)
        if length > distance[i]:
            continue
        if code[i].text.endswith("EXIT") or i < start:
            return code[start : stop + 1], length
        following = [i + 1] if code[i].falls_through else []
        if (jump := code[i].jump) is not None:
            following.append(index[jump])
        for j in following:
            if not start <= j <= stop and length + 1 < distance.get(j, 1 << 30):
                distance[j] = length + 1
                heapq.heappush(queue, (length + 1, j))
    return code[start : stop + 1], 0


def tool(name: str, option: str, cubin: bytes) -> str:
    """Returns the output of one of the tools in the triton wheel."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([binary, option, file.name], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def count(text: list[str], mnemonic: str) -> int:
    """Counts the lines with an instruction; ``mnemonic`` is a regular expression."""
    return sum(bool(re.search(rf"\b{mnemonic}\b", line)) for line in text)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise LookupError(f"expected {pattern} in a tool's output, found none")
    return int(found[1])


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
