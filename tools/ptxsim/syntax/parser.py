# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Parses PTX text into functions, variables and instructions.

Only syntax is treated here. Names of registers and labels are resolved within the braces that
declare them, operands become small objects, and every instruction keeps its line in the text.
"""

from __future__ import annotations

from ..errors import PtxSyntaxError
from ..ptx_types import TYPE_SIZE
from .elements import Function, ParsedModule, Reg, Variable
from .instructions import InstructionParser, Scope

IGNORED_WITH_A_NUMBER = (".minnctapersm", ".maxnreg", ".maxnctapersm", ".maxclusterrank")
IGNORED = (".noreturn", ".explicitcluster", ".blocksareclusters", ".unified")


class Parser(InstructionParser):
    """Parses a whole text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.module = ParsedModule({}, {}, None, None, self.lines)

    # -- module level
    def parse(self) -> ParsedModule:
        """Returns all that the text declares."""
        while self.kind() != "eof":
            token = self.peek()
            if token == ".version":
                self.next()
                self.module.version = self.next()
            elif token == ".target":
                self._target()
            elif token == ".address_size":
                self.next()
                if self.next() != "64":
                    raise PtxSyntaxError("only .address_size 64 is supported")
            elif token == ".section":
                self._skip_section()
            elif token in (".pragma", ".alias"):
                self.skip_past(";")
            elif token in (";", "}"):
                self.next()
            elif token.startswith("."):
                self._declaration()
            else:
                raise self.error(f"unexpected {token!r} at module level")
        return self.module

    def _target(self) -> None:
        line = self.line()
        self.next()
        self.module.target = self.next()
        while self.line() == line and self.kind() != "eof":
            self.next()

    def _skip_section(self) -> None:
        self.next()
        self.next()
        self.expect("{")
        depth = 1
        while depth:
            token = self.next()
            depth += (token == "{") - (token == "}")
            if self.kind() == "eof" and depth:
                raise PtxSyntaxError("unterminated .section")

    def _declaration(self) -> None:
        external = False
        while self.peek() in (".visible", ".extern", ".weak", ".common"):
            external |= self.next() == ".extern"
        token = self.peek()
        if token in (".entry", ".func"):
            self._function(external)
        elif token in (".global", ".const", ".shared"):
            for variable in self.variables():
                self.module.variables[variable.name] = variable
        else:
            raise self.error(f"unknown directive {token!r}")

    # -- functions
    def _function(self, external: bool) -> None:
        function = Function("", self.next() == ".entry")
        self.attribute()
        if not function.entry and self.peek() == "(":
            function.rets = self.parameters()
        function.name = self.next()
        if self.peek() == "(":
            function.params = self.parameters()
        while self.peek().startswith("."):
            self._function_directive(function)
        if self.accept(";"):
            function.external = True
            self.module.functions.setdefault(function.name, function)
            return
        self.expect("{")
        self._body(function)
        self.module.functions[function.name] = function

    def _function_directive(self, function: Function) -> None:
        token = self.peek()
        if token == ".attribute":
            self.attribute()
            return
        self.next()
        if token in (".reqntid", ".maxntid"):
            sizes = self.numbers()
            setattr(function, token[1:], tuple(sizes + [1] * (3 - len(sizes))))
        elif token in IGNORED_WITH_A_NUMBER:
            self.next()
        elif token == ".reqnctapercluster":
            if max(self.numbers()) > 1:
                raise NotImplementedError(
                    "thread block clusters (.reqnctapercluster) are not supported"
                )
        elif token == ".pragma":
            self.skip_past(";")
        elif token not in IGNORED:
            raise self.error(f"unknown function directive {token!r}")

    def _body(self, function: Function) -> None:
        self.function = function
        scope = Scope(None, 0)
        function.parents[0] = None
        for p in function.params + function.rets:
            if p.space == "reg":
                scope.regs[p.name] = self._new_reg(p.type, p.name)
        while True:
            token = self.peek()
            if self.kind() == "eof":
                raise PtxSyntaxError(f"unterminated body of {function.name}")
            if token == "{":
                self.next()
                ident = len(function.parents)
                function.parents[ident] = scope.ident
                scope = Scope(scope, ident)
            elif token == "}":
                self.next()
                if scope.parent is None:
                    break
                scope = scope.parent
            else:
                self._statement(scope)

    def _statement(self, scope: Scope) -> None:
        token = self.peek()
        if token == ";":
            self.next()
        elif token == ".reg":
            self._registers(scope)
        elif token in (".shared", ".local", ".param", ".global", ".const"):
            for variable in self.variables():
                self._declare(variable, scope)
        elif token in (".pragma", ".callprototype"):
            self.skip_past(";")
        elif self.kind() == "id" and self.peek(1) == ":":
            self._label(scope)
        else:
            self.function.code.append(self.instruction(scope))
            self.function.scope_of.append(scope.ident)

    def _declare(self, variable: Variable, scope: Scope) -> None:
        """Adds a variable of a body under a name that is unique in the module."""
        function, name = self.function, variable.name
        if name in function.variables or name in self.module.variables:
            variable.name = f"{name}@{function.name}.{scope.ident}.{len(function.variables)}"
        in_module = variable.space in ("global", "const")
        owner = self.module.variables if in_module else function.variables
        owner[variable.name] = variable
        scope.variables[name] = variable.name

    def _label(self, scope: Scope) -> None:
        key = (scope.ident, self.next())
        self.next()
        self.function.labels[key] = len(self.function.code)
        if self.peek() in (".branchtargets", ".calltargets"):
            self.next()
            names: list[str] = []
            while not self.accept(";"):
                if not self.accept(","):
                    names.append(self.next())
            self.function.tables[key] = names
        elif self.peek() == ".callprototype":
            self.skip_past(";")

    def _new_reg(self, ty: str, name: str) -> Reg:
        width = 1 if ty == "pred" else max(16, TYPE_SIZE[ty] * 8)
        self.function.reg_widths.append(width)
        return Reg(len(self.function.reg_widths) - 1, width, name)

    def _registers(self, scope: Scope) -> None:
        self.next()
        if self.peek() in (".v2", ".v4"):
            raise NotImplementedError(f"line {self.line()}: vector registers")
        ty = self.next()[1:]
        if ty not in TYPE_SIZE:
            raise self.error(f"unknown register type .{ty}")
        while True:
            name = self.next()
            names = [name]
            if self.accept("<"):
                names = [f"{name}{k}" for k in range(self.number())]
                self.expect(">")
            for each in names:
                scope.regs[each] = self._new_reg(ty, each)
            if not self.accept(","):
                break
        self.expect(";")


def parse(text: str) -> ParsedModule:
    """Parses a PTX text."""
    return Parser(text).parse()
