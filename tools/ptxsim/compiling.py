# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names the types that every compiler of an instruction has in its signature.

A compiler takes the program, which knows registers and symbols, and an instruction. It returns a
step: a closure that executes the instruction in the active lanes of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from .syntax.elements import Instr

if TYPE_CHECKING:
    from .machine.program import Program
    from .machine.state import State
else:  # they import the compilers
    Program = State = Any

Step: TypeAlias = Callable[[State], None]
Compiler: TypeAlias = Callable[[Program, Instr], Step]

__all__ = ["Compiler", "Instr", "Program", "State", "Step"]
