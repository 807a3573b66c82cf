# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Links an entry with all that it calls: one numbering of instructions, registers, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import unsupported
from ..ptx_types import align_up
from ..syntax.elements import Function, Instr, Mem, Sym, Variable, flat

if TYPE_CHECKING:
    from ..module import Module


def reachable(functions: dict[str, Function], entry: Function) -> list[Function]:
    """Returns the entry and the functions with a body that it calls, directly or not."""
    found, todo, seen = [], [entry.name], set()
    while todo:
        name = todo.pop(0)
        function = functions.get(name)
        if name in seen or function is None or function.external:
            continue
        seen.add(name)
        found.append(function)
        for ins in function.code:
            if ins.parts[0] == "call":
                todo += [a.name for a in ins.args if isinstance(a, Sym) and a.name in functions]
    return found


class LinkedProgram:
    """Assigns addresses to instructions, registers, variables and parameters."""

    def __init__(self, module: Module, entry: Function) -> None:
        self.module, self.entry = module, entry
        self.linked = reachable(module.parsed.functions, entry)
        self.base: dict[str, int] = {}  # function -> pc of its first instruction
        self.reg_base: dict[str, int] = {}
        self.slots: list[int] = []  # register slot -> bits
        self.code: list[Instr | None] = []
        for function in self.linked:
            self.base[function.name] = len(self.code)
            self.reg_base[function.name] = len(self.slots)
            self.slots += function.reg_widths
            self.code += [*function.code, None]  # with an implicit ret
        self.symbols: dict[str, tuple[str, int]] = dict(module.addresses)  # name -> space, address
        self.buffers: dict[tuple[str, str], int] = {}  # per-lane parameters of device functions
        self.buffer_sizes: list[int] = []
        self._place_shared()
        self._place_local()
        self._place_params()

    def _used_names(self) -> set[str]:
        operands = [a for f in self.linked for ins in f.code for a in flat(ins.args)]
        names = {a.name for a in operands if isinstance(a, Sym)}
        return names | {
            a.base.name for a in operands if isinstance(a, Mem) and isinstance(a.base, Sym)
        }

    def _place_shared(self) -> None:
        variables = list(self.module.parsed.variables.values())
        variables += [v for f in self.linked for v in f.variables.values()]
        used = self._used_names()
        shared = [v for v in variables if v.space == "shared" and v.name in used]
        dynamic = [v for v in shared if v.count is None]
        offset = 0
        for v in shared:
            if v.count is not None:
                offset = align_up(offset, v.align)
                self.symbols[v.name] = ("shared", offset)
                offset += v.size
        if dynamic:
            offset = align_up(offset, max(16, *(v.align for v in dynamic)))
        for v in dynamic:
            self.symbols[v.name] = ("shared", offset)
        self.static_shared = offset

    def _place_local(self) -> None:
        offset = 0
        for function in self.linked:
            for v in function.variables.values():
                if v.space == "local":
                    offset = align_up(offset, v.align)
                    self.symbols[v.name] = ("local", offset)
                    offset += v.size
                elif v.space == "param":
                    self._new_buffer(v, "")
            if function is not self.entry:
                for v in function.params + function.rets:
                    self._new_buffer(v, function.name)
        self.local_size = offset

    def _place_params(self) -> None:
        self.params: list[tuple[Variable, int]] = []
        offset = 0
        for p in self.entry.params:
            offset = align_up(offset, p.align)
            self.params.append((p, offset))
            self.symbols[p.name] = ("param", offset)
            offset += p.size
        self.param_bytes = offset

    def _new_buffer(self, v: Variable, scope: str) -> None:
        self.buffers[(scope, v.name)] = len(self.buffer_sizes)
        self.buffer_sizes.append(v.size)

    def instruction(self, pc: int) -> Instr:
        """Returns the instruction at a pc, or the one before an implicit ret."""
        ins = self.code[pc] or self.code[pc - 1]
        assert ins is not None
        return ins

    # -- names
    def symbol(self, name: str, ins: Instr) -> tuple[str, int]:
        """Returns space and address of a variable."""
        if name not in self.symbols:
            raise unsupported(ins, f"symbol {name}")
        return self.symbols[name]

    def lookup(
        self, function: Function, scope: int | None, table: dict, name: str, ins: Instr
    ) -> Any:
        """Finds a label in the scope of an instruction or in one around it."""
        while scope is not None:
            if (scope, name) in table:
                return table[(scope, name)]
            scope = function.parents[scope]
        raise unsupported(ins, f"unknown label {name}")

    def target(self, function: Function, pc: int, label: Sym, ins: Instr) -> int:
        """Returns the pc of a label that the instruction at `pc` names."""
        base = self.base[function.name]
        scope = function.scope_of[pc - base]
        return base + self.lookup(function, scope, function.labels, label.name, ins)
