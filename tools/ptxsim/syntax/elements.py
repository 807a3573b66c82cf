# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Describes the elements of PTX text: operands, instructions, variables, functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..ptx_types import TYPE_SIZE


# ---- operands
@dataclass(frozen=True)
class Reg:
    """Names a register of a function."""

    slot: int
    width: int  # bits: 1 (predicate), 16, 32, 64, 128
    name: str
    neg: bool = False  # `!p`


@dataclass(frozen=True)
class Special:
    """Names a special register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Imm:
    """Holds a literal."""

    value: Any  # int or float
    bits: int = 0  # width of a 0f/0d literal, whose value is then the bit pattern


@dataclass(frozen=True)
class Sym:
    """Names a variable, a function or a label."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Mem:
    """Holds an address in brackets."""

    base: Any  # Reg, Sym or None
    offset: int = 0
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Vec:
    """Holds operands in braces."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Holds two destinations with a bar between them."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Paren:
    """Holds operands in parentheses, as a call has them."""

    items: tuple[Operand, ...]


Operand: TypeAlias = Reg | Special | Imm | Sym | Mem | Vec | Pair | Paren
SINK = Sym("_")


def flat(args: Iterable[Operand]) -> Iterator[Operand]:
    """Yields operands without the braces, bars and parentheses around them."""
    for a in args:
        if isinstance(a, (Vec, Paren)):
            yield from flat(a.items)
        elif isinstance(a, Pair):
            yield a.first
            yield a.second
        else:
            yield a


def items(operand: Operand) -> tuple[Operand, ...]:
    """Returns the operands of a vector, or the one operand."""
    return operand.items if isinstance(operand, Vec) else (operand,)


# ---- code and data
@dataclass
class Instr:
    """Holds an instruction; `parts` are those of its opcode, which dots separate."""

    op: str
    parts: list[str]
    args: list[Any]
    line: int
    text: str
    pred: Reg | None = None  # guard predicate


@dataclass
class Variable:
    """Describes a variable or a parameter."""

    name: str
    space: str
    type: str
    align: int
    count: int | None  # elements, or None for an array without a size
    init: list[Imm | Sym] | None = None
    scalar: bool = False

    @property
    def size(self) -> int:
        """Returns the bytes that the variable takes."""
        return TYPE_SIZE[self.type] * (self.count or 0)


@dataclass
class Function:
    """Holds an entry or a device function. Scopes are numbered; 0 is the whole body."""

    name: str
    entry: bool
    params: list[Variable] = field(default_factory=list)
    rets: list[Variable] = field(default_factory=list)
    code: list[Instr] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)  # scope, label -> index
    tables: dict[tuple[int, str], list[str]] = field(default_factory=dict)  # branch targets
    parents: dict[int, int | None] = field(default_factory=dict)  # scope -> the one around it
    scope_of: list[int] = field(default_factory=list)  # index in code -> scope
    reg_widths: list[int] = field(default_factory=list)  # slot -> bits
    variables: dict[str, Variable] = field(default_factory=dict)  # shared, local, param
    reqntid: tuple[int, ...] | None = None
    maxntid: tuple[int, ...] | None = None
    external: bool = False


@dataclass
class ParsedModule:
    """Holds what a PTX text declares."""

    functions: dict[str, Function]
    variables: dict[str, Variable]
    target: str | None
    version: str | None
    lines: list[str]
