# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names what the library asks of a backend."""

import abc
from typing import ClassVar

import torch


class Backend(abc.ABC):
    """Computes the ops of :mod:`marginkernels.ops`, and says when it cannot.

    :func:`marginkernels.backends.register` defines the ops ``head_fwd_<name>``, ``head_bwd_<name>``
    and ``head_step_<name>``, and makes ``backend="<name>"`` an argument of every head.
    """

    name: ClassVar[str]
    priority: ClassVar[int]  # backend="auto" takes the highest one that runs
    caveat: ClassVar[str] = ""  # backend="auto" warns of it where it finds nothing better
    updates: ClassVar[bool] = False  # whether it has head_step, for marginkernels.optim
    fuses_rows: ClassVar[bool] = False  # whether it has head_held and head_loss

    @abc.abstractmethod
    def unavailable_reasons(
        self, device: torch.device | None = None, compute_dtype: torch.dtype | None = None
    ) -> list[str]:
        """Lists every reason why the backend cannot run on this device, or in this type.

        None stands for any device, or for any type.
        """

    def register_kernels(self) -> None:  # noqa: B027, because loading an extension may do it
        """Registers the kernels of the ops, which are defined by now."""

    def tiles_shape(self, n: int, c: int) -> tuple[int, int] | None:
        """Returns the shape of the exponentials that forward saves for N rows and C classes.

        Their type is the compute type. None stands for a backend that cannot save them.
        """
        return None

    @property
    def keeps_tiles(self) -> bool:
        """Says whether forward can save its exponentials for backward."""
        return self.tiles_shape(1, 1) is not None

    def keeps_rounded(self, device: torch.device, d: int) -> bool:
        """Says whether forward can keep w (C, D) as it rounds it to 16 bits, for backward."""
        return False

    def notes(self) -> list[str]:
        """Lists what a user should know of the backend on this machine, even if it cannot run."""
        return []
