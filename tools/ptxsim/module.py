# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Loads a PTX module on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .machine.launch import launch
from .machine.program import Program
from .memory import Device
from .nvcc import demangle
from .ptx_types import TYPE_SIZE, Array, u8
from .stats import Stats
from .syntax.elements import Function, Imm, ParsedModule, Sym
from .syntax.parser import parse


class Module:
    """Holds parsed PTX, with its global and constant variables placed in device memory."""

    def __init__(self, parsed: ParsedModule, device: Device | None = None) -> None:
        self.parsed = parsed
        self.device = device or Device()
        self.addresses: dict[str, tuple[str, int]] = {}  # variable -> space, address
        self.data: dict[str, Array] = {}
        self.programs: dict[str, Program] = {}
        placed = [
            v for v in parsed.variables.values() if v.space != "shared" and v.count is not None
        ]
        for variable in placed:
            memory = np.zeros(variable.size, u8)
            address = self.device.alloc(memory, variable.name, readonly=variable.space == "const")
            self.addresses[variable.name] = (variable.space, address)
            self.data[variable.name] = memory
        for variable in placed:
            size = TYPE_SIZE[variable.type]
            for k, value in enumerate(variable.init or ()):
                raw = np.frombuffer(self._bytes_of(value, variable.type), u8)
                self.data[variable.name][k * size : (k + 1) * size] = raw

    def _bytes_of(self, value: Imm | Sym, ty: str) -> bytes:
        """Returns the bytes of an initialiser."""
        size = TYPE_SIZE[ty]
        mask = (1 << 8 * size) - 1
        if isinstance(value, Sym):
            if value.name not in self.addresses:
                raise NotImplementedError(f"initialiser refers to {value.name}")
            address = self.addresses[value.name][1] + value.offset
            return (address & mask).to_bytes(size, "little")
        if value.bits:
            return value.value.to_bytes(value.bits // 8, "little")
        if isinstance(value.value, float) or ty in ("f32", "f64"):
            return np.dtype(f"f{size}").type(value.value).tobytes()
        return (value.value & mask).to_bytes(size, "little")

    @classmethod
    def from_ptx(cls, text: str | bytes, device: Device | None = None) -> Module:
        """Returns the module that a PTX text describes."""
        return cls(parse(text.decode() if isinstance(text, bytes) else text), device)

    def entries(self) -> list[str]:
        """Returns the mangled names of the kernels."""
        return [f.name for f in self.parsed.functions.values() if f.entry]

    def entry(self, name: str) -> Function:
        """Returns the kernel of a name.

        That is the mangled name, the demangled one without arguments, or any part of the demangled
        signature that fits one kernel only.
        """
        functions = self.parsed.functions
        if name in functions and functions[name].entry:
            return functions[name]
        names = self.entries()
        signatures = demangle(names)
        pairs = list(zip(names, signatures, strict=True))
        hits = [n for n, s in pairs if s.removeprefix("void ").split("(")[0] == name]
        if not hits:
            hits = [n for n, s in pairs if name in s]
        if len(hits) != 1:
            raise KeyError(f"{name!r} matches {len(hits)} entries: {hits or signatures}")
        return functions[hits[0]]

    def program(self, name: str) -> Program:
        """Returns the compiled kernel of a name."""
        function = self.entry(name)
        if function.name not in self.programs:
            self.programs[function.name] = Program(self, function)
        return self.programs[function.name]

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        **options: Any,
    ) -> Stats:
        """Runs a kernel; `machine.launch.launch` describes the options.

        Arrays may be passed for pointer arguments.
        """
        return launch(self.program(name), grid, block, args, shared_bytes, **options)

    def symbol(self, name: str) -> Array:
        """Returns the memory of a variable of the module."""
        return self.data[name]
