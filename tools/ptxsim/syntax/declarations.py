# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Parses declarations of variables and parameters."""

from __future__ import annotations

from ..ptx_types import TYPE_SIZE
from .elements import Imm, Sym, Variable
from .tokens import TokenStream, literal


class DeclarationParser(TokenStream):
    """Parses declarations."""

    def attribute(self) -> None:
        """Skips an attribute."""
        if self.accept(".attribute"):
            self.expect("(")
            self.skip_past(")")

    def variables(self) -> list[Variable]:
        """Parses `.space [.align n] [.vN] .type name[dims] [= init] {, name...} ;`"""
        space = self.next()[1:]
        self.attribute()
        align, vector = None, 1
        while True:
            token = self.peek()
            if token == ".align":
                self.next()
                align = self.number()
            elif token in (".v2", ".v4", ".v8"):
                vector = int(self.next()[2:])
            elif token == ".attribute":
                self.attribute()
            else:
                break
        ty = self.next()[1:]
        if ty not in TYPE_SIZE:
            raise self.error(f"unknown type .{ty}")
        found = []
        while True:
            found.append(self._variable(space, ty, align or TYPE_SIZE[ty] * vector, vector))
            if not self.accept(","):
                break
        self.expect(";")
        return found

    def _variable(self, space: str, ty: str, align: int, vector: int) -> Variable:
        name = self.next()
        count, scalar = self._dimensions()
        init = None
        if self.accept("="):
            init = self._initialiser()
            if count is None:
                count = len(init)
        total = None if count is None else count * vector
        return Variable(name, space, ty, align, total, init, scalar)

    def _dimensions(self) -> tuple[int | None, bool]:
        """Returns the number of elements, and whether the variable is no array."""
        count: int | None = 1
        scalar = True
        while self.accept("["):
            scalar = False
            if self.accept("]"):
                count = None
                continue
            n = self.number()
            count = None if count is None else count * n
            self.expect("]")
        return count, scalar

    def _initialiser(self) -> list[Imm | Sym]:
        if self.accept("{"):
            values: list[Imm | Sym] = []
            while not self.accept("}"):
                values += self._initialiser()
                self.accept(",")
            return values
        negative = self.accept("-")
        kind, token = self.kind(), self.next()
        if kind == "num":
            value = literal(token)
            return [Imm(-value.value) if negative else value]
        if token == "generic":
            self.expect("(")
            token = self.next()
            self.expect(")")
        # masks of bytes, 0xff(symbol), are not produced by the supported compilers
        return [Sym(token, self.number() if self.accept("+") else 0)]

    def parameters(self) -> list[Variable]:
        """Parses the parameters or results of a function."""
        found = []
        self.expect("(")
        while not self.accept(")"):
            kind = self.next()
            if kind not in (".param", ".reg"):
                raise self.error(f"expected .param, found {kind!r}")
            found.append(self._parameter(kind[1:]))
            self.accept(",")
        return found

    def _parameter(self, space: str) -> Variable:
        align, ty = None, None
        while self.peek().startswith("."):
            token = self.next()
            if token == ".align":
                align = self.number()
            elif token[1:] in TYPE_SIZE and ty is None:
                ty = token[1:]
            # .ptr, .global, .shared, .const, .local, .noalias do not change the layout
        name = self.next()
        count, scalar = self._dimensions()
        return Variable(name, space, ty, align or TYPE_SIZE[ty], count, None, scalar)
