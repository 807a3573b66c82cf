# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the counters of one launch."""

from __future__ import annotations

from dataclasses import dataclass, field

Counts = dict[str, int]
SECTOR_BYTES = 32


@dataclass
class Stats:
    """Holds deterministic counters. Instruction counts are dynamic and per warp."""

    kernel: str = ""
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared_bytes: int = 0
    instructions: Counts = field(default_factory=dict)  # class -> warp-instructions
    opcodes: Counts = field(default_factory=dict)  # full opcode -> warp-instructions
    mma_flops: int = 0
    # bytes that active threads request, requests of warps, and distinct 32-byte sectors per request
    global_load_bytes: int = 0
    global_store_bytes: int = 0
    global_atomic_bytes: int = 0
    global_load_requests: int = 0
    global_store_requests: int = 0
    global_load_sectors: int = 0
    global_store_sectors: int = 0
    global_atomic_sectors: int = 0
    footprint_read: Counts = field(default_factory=dict)  # allocation name -> distinct bytes
    footprint_written: Counts = field(default_factory=dict)
    # class -> requests, wavefronts, ideal wavefronts
    shared: dict[str, list[int]] = field(default_factory=dict)
    divergent_branches: int = 0
    steps: int = 0  # lockstep instructions executed by the simulator
    batches: int = 0
    seconds: float = 0.0
    printed: list[str] = field(default_factory=list)

    @property
    def warp_instructions(self) -> int:
        """Returns the number of instructions that warps executed."""
        return sum(self.instructions.values())

    def note_load(self, size: int, requests: int, sectors: int) -> None:
        """Counts a load from global memory."""
        self.global_load_bytes += size
        self.global_load_requests += requests
        self.global_load_sectors += sectors

    def note_store(self, size: int, requests: int, sectors: int) -> None:
        """Counts a store to global memory."""
        self.global_store_bytes += size
        self.global_store_requests += requests
        self.global_store_sectors += sectors

    def efficiency(self, kind: str = "load") -> float:
        """Returns requested bytes over bytes of the sectors touched: 1.0 is fully coalesced."""
        if kind == "load":
            size, sectors = self.global_load_bytes, self.global_load_sectors
        else:
            size, sectors = self.global_store_bytes, self.global_store_sectors
        return size / (SECTOR_BYTES * sectors) if sectors else 1.0

    def bank_conflicts(self) -> Counts:
        """Returns the wavefronts beyond the conflict-free minimum, by class."""
        return {kind: actual - ideal for kind, (_, actual, ideal) in self.shared.items()}

    def __str__(self) -> str:
        by_count = sorted(self.instructions.items(), key=lambda item: -item[1])
        instructions = ", ".join(f"{kind} {count}" for kind, count in by_count)
        shared = ", ".join(f"{kind} {n[1]}/{n[2]}" for kind, n in self.shared.items())
        return (
            f"{self.kernel} grid {self.grid} block {self.block} shared {self.shared_bytes} B\n"
            f"  warp instructions {self.warp_instructions}: {instructions}\n"
            f"  mma FLOPs {self.mma_flops}\n"
            f"  global load {self.global_load_bytes} B in {self.global_load_requests} requests, "
            f"{self.global_load_sectors} sectors (efficiency {self.efficiency('load'):.2f}); "
            f"store {self.global_store_bytes} B, {self.global_store_sectors} sectors "
            f"(efficiency {self.efficiency('store'):.2f})\n"
            f"  footprint read {sum(self.footprint_read.values())} B, "
            f"written {sum(self.footprint_written.values())} B\n"
            f"  shared wavefronts (actual/ideal): {shared or 'none'}"
        )
