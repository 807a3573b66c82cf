# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compiles an entry function and all that it calls to closures, one for each instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..alu.table import compile_alu
from ..compiling import Step
from ..errors import DeviceAssertError, unsupported
from ..hopper.mbarrier import compile_mbarrier
from ..hopper.tensor_maps import compile_tensormap
from ..hopper.wgmma import compile_wgmma, is_proxy_fence, named_registers, watch
from ..memops.addressing import space_of, vec_of
from ..memops.table import MEMOPS
from ..ptx_types import TYPE_SIZE, WIDTH, Array
from ..syntax.elements import (
    SINK,
    Function,
    Imm,
    Instr,
    Mem,
    Operand,
    Paren,
    Reg,
    Special,
    Sym,
    flat,
)
from ..warp.collectives import WARPOPS
from ..warp.presence import Precheck, pre_group, precheck
from .barriers import BarrierOperands
from .classes import counter_class
from .externals import EXTERNALS
from .immediates import immediate_bits
from .linking import LinkedProgram
from .special_registers import check_special

if TYPE_CHECKING:
    from ..module import Module
    from .state import State

PLAIN, BRA, BRX, RET, EXIT, CALL, BAR, WARP = range(8)
NOPS = {
    "membar",
    "fence",
    "prefetch",
    "prefetchu",
    "nanosleep",
    "pmevent",
    "discard",
    "applypriority",
    "setmaxnreg",
    "griddepcontrol",
    "brkpt",
}


def _nothing(state: State) -> None:
    """Executes an instruction that has no effect here."""


class Call(NamedTuple):
    """Describes a call of a device function; arguments and results are pairs of buffers."""

    target: int
    arguments: list[tuple[int, int]]
    results: list[tuple[int, int]]


class ExternalCall(NamedTuple):
    """Describes a call of a function that the driver provides."""

    function: Callable[..., None]
    arguments: list[int]
    results: list[int]


class Program(LinkedProgram):
    """Holds a closure for each instruction; compiles operands for those who make the closures."""

    def __init__(self, module: Module, entry: Function) -> None:
        super().__init__(module, entry)
        self.constants: dict[tuple[Any, int], int] = {}  # value, bits -> slot
        self.specials: dict[tuple[str, int], int] = {}  # special register, bits -> slot
        n = len(self.code)
        self.kinds = [PLAIN] * n
        self.functions: list[Step] = [_nothing] * n
        self.guards: list[tuple[int, bool] | None] = [None] * n
        self.prechecks: dict[int, Precheck] = {}
        self.info: list[Any] = [None] * n
        self.granularity = 4  # bytes that the race check tells apart
        for function in self.linked:
            base = self.base[function.name]
            for pc, ins in enumerate(function.code, base):
                self._compile(function, pc, ins)
            self.kinds[base + len(function.code)] = EXIT if function is entry else RET
        self._watch_registers()
        self.classes = [counter_class(ins) for ins in self.code]

    # -- operands, for the compilers of instructions
    def reg_slot(self, reg: Reg) -> int:
        """Returns the slot of a register of the function that is being compiled."""
        return self.reg_base[self.function.name] + reg.slot

    def width(self, operand: Operand) -> int | None:
        """Returns the bits of a register, None for anything else."""
        return operand.width if isinstance(operand, Reg) else None

    def dst(self, operand: Operand) -> int:
        """Returns the slot that a destination operand names."""
        if isinstance(operand, Reg):
            return self.reg_slot(operand)
        if operand == SINK:
            return self._new_slot(64)
        raise unsupported(self.ins, f"destination {operand}")

    def _new_slot(self, bits: int) -> int:
        self.slots.append(bits)
        return len(self.slots) - 1

    def const(self, value: int | bool, bits: int) -> int:
        """Returns a slot that always holds a value."""
        key = (value, bits)
        if key not in self.constants:
            self.constants[key] = self._new_slot(bits)
        return self.constants[key]

    def src(self, operand: Operand, ty: str, ins: Instr) -> int:
        """Returns the slot of a source operand that is read as a value of type `ty`."""
        bits = WIDTH.get(ty)
        if bits is None:
            raise unsupported(ins, f"type .{ty}")
        bits = 16 if bits == 8 else bits
        if isinstance(operand, Reg):
            if operand.neg:
                raise unsupported(ins, "negated operand")
            return self.reg_slot(operand)
        if isinstance(operand, Imm):
            return self.const(immediate_bits(operand, ty, bits), bits)
        if isinstance(operand, Special):
            key = (operand.name, bits)
            if key not in self.specials:
                check_special(operand.name, ins)
                self.specials[key] = self._new_slot(bits)
            return self.specials[key]
        if isinstance(operand, Sym):
            _, address = self.symbol(operand.name, ins)
            return self.const((address + operand.offset) & ((1 << bits) - 1), bits)
        raise unsupported(ins, f"operand {operand}")

    def pred(self, operand: Operand, ins: Instr) -> Callable[[list[Array]], Array]:
        """Returns a function that reads a predicate, negated or not, from the registers."""
        if isinstance(operand, Imm):
            value = np.array([bool(operand.value)])
            return lambda regs: value
        if not isinstance(operand, Reg):
            raise unsupported(ins, f"predicate {operand}")
        slot = self.reg_slot(operand)
        return (lambda regs: ~regs[slot]) if operand.neg else (lambda regs: regs[slot])

    def param_buffer(self, mem: Mem) -> tuple[int, int] | None:
        """Returns buffer and offset when the address is a parameter of a device function."""
        if isinstance(mem.base, Sym):
            for scope in (self.function.name, ""):
                buffer = self.buffers.get((scope, mem.base.name))
                if buffer is not None:
                    return buffer, mem.offset + mem.base.offset
        return None

    # -- compilation
    def _compile(self, function: Function, pc: int, ins: Instr) -> None:
        self.function, self.ins = function, ins
        if ins.pred is not None:
            self.guards[pc] = (self.reg_slot(ins.pred), ins.pred.neg)
        if self._compile_control(function, pc, ins):
            return
        op = ins.parts[0]
        self.functions[pc] = self._compile_plain(ins)
        check = pre_group(ins) if op == "wgmma" else precheck(self, ins)
        if check is not None:
            self.kinds[pc], self.prechecks[pc] = WARP, check
        if op in ("ld", "st", "atom", "red") and space_of(ins.parts) in ("shared", "generic"):
            size = TYPE_SIZE.get(ins.parts[-1], 4) * vec_of(ins.parts)
            self.granularity = min(self.granularity, size)

    def _compile_control(self, function: Function, pc: int, ins: Instr) -> bool:
        """Compiles an instruction that may change the pc; returns whether it is one."""
        op, args = ins.parts[0], ins.args
        if op == "bra":
            self.kinds[pc], self.info[pc] = BRA, self.target(function, pc, args[0], ins)
        elif op == "brx":
            scope = function.scope_of[pc - self.base[function.name]]
            names = self.lookup(function, scope, function.tables, args[1].name, ins)
            index = self.src(args[0], "u32", ins)
            targets = [self.target(function, pc, Sym(name), ins) for name in names]
            self.kinds[pc], self.info[pc] = BRX, (index, targets)
        elif op == "ret":
            self.kinds[pc] = EXIT if function is self.entry else RET
        elif op == "exit":
            self.kinds[pc] = EXIT
        elif op == "call":
            self.kinds[pc], self.info[pc] = CALL, self._compile_call(ins)
        elif op in ("bar", "barrier") and ins.parts[1] != "warp":
            if "cluster" in ins.parts:
                raise unsupported(ins)
            self.kinds[pc], self.info[pc] = BAR, self._compile_barrier(ins)
        else:
            return False
        return True

    def _compile_plain(self, ins: Instr) -> Step:
        op = ins.parts[0]
        if op == "trap":
            return lambda state: state.fault(
                DeviceAssertError, "trap", ins, state.lanes_or_none(), 0
            )
        if is_proxy_fence(ins):
            return lambda state: state.shared.proxy_fence(state)
        if op in NOPS or (op == "bar" and ins.parts[1] == "warp"):
            return _nothing
        return (HOPPER.get(op) or MEMOPS.get(op) or WARPOPS.get(op) or compile_alu)(self, ins)

    def _watch_registers(self) -> None:
        """Lets every other instruction that names a register of a wgmma report its access."""
        watched: set[int] = set()
        for function in self.linked:
            self.function = function
            for ins in function.code:
                if ins.parts[0] == "wgmma":
                    watched.update(named_registers(self, ins))
        for function in self.linked if watched else ():
            self.function = function
            for pc, ins in enumerate(function.code, self.base[function.name]):
                named = (r for a in flat(ins.args) for r in (a, getattr(a, "base", None)))
                slots = {self.reg_slot(r) for r in named if isinstance(r, Reg)} & watched
                if slots and ins.parts[0] != "wgmma":
                    self.functions[pc] = watch(self.functions[pc], ins, tuple(slots))

    def _compile_call(self, ins: Instr) -> Call | ExternalCall:
        args = list(ins.args)
        rets = args.pop(0).items if isinstance(args[0], Paren) else ()
        callee = args.pop(0)
        if not isinstance(callee, Sym):
            raise unsupported(ins, "indirect call")
        actual = args.pop(0).items if args and isinstance(args[0], Paren) else ()
        function = self.module.parsed.functions.get(callee.name)
        if function is None:
            raise unsupported(ins, f"call of {callee.name}")
        arguments, results = self._call_buffers(actual, ins), self._call_buffers(rets, ins)
        if function.external:
            external = EXTERNALS.get(callee.name)
            if external is None:
                raise unsupported(ins, f"external function {callee.name}")
            return ExternalCall(external, arguments, results)
        formal = [self.buffers[(function.name, p.name)] for p in function.params]
        returned = [self.buffers[(function.name, p.name)] for p in function.rets]
        # a call may give or take fewer than the function declares
        return Call(
            self.base[function.name],
            list(zip(arguments, formal, strict=False)),
            list(zip(returned, results, strict=False)),
        )

    def _call_buffers(self, operands: tuple[Operand, ...], ins: Instr) -> list[int]:
        buffers = []
        for operand in operands:
            found = self.param_buffer(Mem(operand)) if isinstance(operand, Sym) else None
            if found is None:
                raise unsupported(ins, "register arguments")
            buffers.append(found[0])
        return buffers

    def _compile_barrier(self, ins: Instr) -> BarrierOperands:
        parts, args = ins.parts, list(ins.args)
        mode = next((m for m in ("sync", "arrive", "red") if m in parts), "sync")
        reduction, dst, vote = None, -1, None
        if mode == "red":
            reduction = next(p for p in parts if p in ("popc", "and", "or"))
            dst = self.dst(args.pop(0))
            vote = self.pred(args.pop(-1), ins)
        ident = self.src(args[0], "u32", ins)
        count = self.src(args[1], "u32", ins) if len(args) > 1 else None
        return BarrierOperands(mode, ident, count, reduction, dst, vote)


HOPPER = {
    "wgmma": compile_wgmma,
    "mbarrier": compile_mbarrier,
    "tensormap": compile_tensormap,
}
