# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Parses instructions and their operands."""

from __future__ import annotations

import re
from typing import Any

from ..errors import PtxSyntaxError
from .declarations import DeclarationParser
from .elements import SINK, Imm, Instr, Mem, Operand, Pair, Paren, Reg, Special, Sym, Vec
from .tokens import literal


class Scope:
    """Holds the names that a pair of braces declares."""

    def __init__(self, parent: Scope | None, ident: int) -> None:
        self.parent, self.ident = parent, ident
        self.regs: dict[str, Reg] = {}
        self.variables: dict[str, str] = {}  # name -> name that is unique in the module

    def find(self, table: str, name: str) -> Any:
        """Returns what a name means in this scope or in one around it, or None."""
        scope: Scope | None = self
        while scope is not None:
            names = getattr(scope, table)
            if name in names:
                return names[name]
            scope = scope.parent
        return None


class InstructionParser(DeclarationParser):
    """Parses instructions."""

    def instruction(self, scope: Scope) -> Instr:
        """Parses an instruction with its guard."""
        line, start = self.line(), self.i
        guard = self._guard(scope, line)
        op = self.next()
        args: list[Operand] = []
        while not self.accept(";"):
            args.append(self.operand(scope))
            if not self.accept(",") and self.peek() != ";":
                raise self.error(f"unexpected {self.peek()!r} in {self.lines[line - 1].strip()!r}")
        text = " ".join(token[1] for token in self.tokens[start : self.i])
        text = re.sub(r" ?([,;\]\[}{!@+]) ?", r"\1", text).replace(",", ", ")
        return Instr(op, op.split("."), args, line, text, guard)

    def _guard(self, scope: Scope, line: int) -> Reg | None:
        if not self.accept("@"):
            return None
        negated = self.accept("!")
        name = self.next()
        reg = scope.find("regs", name)
        if reg is None:
            raise PtxSyntaxError(f"line {line}: unknown predicate {name}")
        return Reg(reg.slot, reg.width, reg.name, negated)

    def _name(self, scope: Scope, name: str) -> Any:
        if name == "_":
            return SINK
        reg = scope.find("regs", name)
        if reg is not None:
            return reg
        variable = scope.find("variables", name)
        if variable is not None:
            return Sym(variable)
        if name.startswith("%"):
            return Special(name)
        return Imm(32) if name == "WARP_SZ" else Sym(name)

    def _signed(self) -> int:
        sign = -1 if self.accept("-") else 1
        if sign == 1:
            self.accept("+")
            if self.accept("-"):
                sign = -1
        return sign * self.number()

    def operand(self, scope: Scope) -> Operand:
        """Parses an operand."""
        kind = self.kind()
        token = self.next()
        if token == "{":
            return Vec(self._operands(scope, "}"))
        if token == "(":
            return Paren(self._operands(scope, ")"))
        if token == "[":
            return self._address(scope)
        if token == "!":
            reg = self._name(scope, self.next())
            return Reg(reg.slot, reg.width, reg.name, True)
        if token == "-":
            value = literal(self.next())
            if value.bits:
                return Imm(value.value ^ (1 << (value.bits - 1)), value.bits)
            return Imm(-value.value)
        if kind == "num":
            return literal(token)
        if kind == "str":
            return Sym(token)
        named = self._name(scope, token)
        if self.accept("|"):
            return Pair(named, self._name(scope, self.next()))
        if isinstance(named, Sym) and self.peek() in ("+", "-"):
            sign = 1 if self.next() == "+" else -1
            return Sym(named.name, sign * self.number())
        return named

    def _operands(self, scope: Scope, end: str) -> tuple[Operand, ...]:
        found = []
        while not self.accept(end):
            found.append(self.operand(scope))
            self.accept(",")
        return tuple(found)

    def _address(self, scope: Scope) -> Mem:
        base, offset = None, 0
        if self.kind() == "num" or self.peek() == "-":
            offset = self._signed()
        else:
            base = self._name(scope, self.next())
            while self.peek() in ("+", "-"):
                if self.accept("+"):
                    offset += self._signed()
                else:
                    self.next()
                    offset -= self.number()
        extra = []
        while self.accept(","):
            extra.append(self.operand(scope))
        self.expect("]")
        return Mem(base, offset, tuple(extra))
