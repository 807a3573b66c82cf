# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the exceptions that the simulator raises."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .syntax.elements import Instr


class PtxError(Exception):
    """Is the base of every error that this package raises on purpose."""


class PtxSyntaxError(PtxError):
    """Reports PTX text that could not be parsed."""


class SimError(PtxError):
    """Reports a fault found while a kernel runs, and carries where it happened."""

    def __init__(
        self,
        msg: str,
        kernel: str | None = None,
        line: int | None = None,
        text: str | None = None,
        cta: Iterable[int] | None = None,
        thread: Iterable[int] | None = None,
        **info: Any,
    ) -> None:
        self.kernel, self.line, self.text = kernel, line, text
        self.cta, self.thread, self.info = cta, thread, info
        where = []
        if kernel is not None:
            where.append(f"kernel {kernel}")
        if line is not None:
            where.append(f"PTX line {line}: `{text}`")
        if cta is not None:
            where.append(f"CTA {tuple(int(v) for v in cta)}")
        if thread is not None:
            where.append(f"thread {tuple(int(v) for v in thread)}")
        super().__init__(msg + (" [" + "; ".join(where) + "]" if where else ""))


class OutOfBoundsError(SimError):
    """Reports an access outside every allocation, or outside a shared, local or param window."""


class MisalignedError(SimError):
    """Reports an address that is not a multiple of the access size."""


class ReadOnlyError(SimError):
    """Reports a write to constant memory or to an allocation marked read-only."""


class UninitialisedSharedError(SimError):
    """Reports a read of shared bytes that nothing has written."""


class AsyncCopyError(SimError):
    """Reports shared bytes touched while a cp.async into them has not been waited for."""


class AsyncMmaError(SimError):
    """Reports an operand of a wgmma touched before the wait_group that covers the wgmma."""


class MissingFenceError(SimError):
    """Reports a wgmma that no fence orders after an earlier access to its operands."""


class RaceError(SimError):
    """Reports two warps that touch the same shared bytes, one writing, with nothing between."""


class BarrierDivergenceError(SimError):
    """Reports a CTA-wide barrier not reached by all threads, or at different instructions."""


class DeadlockError(SimError):
    """Reports that no thread can make progress."""


class WarpSyncError(SimError):
    """Reports a warp-synchronous instruction executed without all the lanes it names."""


class DeviceAssertError(SimError):
    """Reports a device-side assertion or a trap."""


class WatchdogError(SimError):
    """Reports a launch that executed more steps than allowed."""


def unsupported(ins: Instr, why: str = "") -> NotImplementedError:
    """Returns the error for an instruction that the simulator does not know."""
    reason = f" ({why})" if why else ""
    return NotImplementedError(f"unsupported PTX at line {ins.line}: `{ins.text}`{reason}")
