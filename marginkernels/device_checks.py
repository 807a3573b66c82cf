# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Decides whether the values in tensors are checked.

They are where that costs no synchronisation: on the CPU always, elsewhere only after
``set_device_checks(True)`` or with MARGINKERNELS_CHECK=1 in the environment.
"""

import os

import torch

_enabled = os.environ.get("MARGINKERNELS_CHECK", "0") == "1"


def set_device_checks(enabled: bool) -> None:
    """Sets whether values of tensors on an accelerator are checked too; each check waits for it."""
    global _enabled
    _enabled = bool(enabled)


def checks_values(device: torch.device) -> bool:
    """Returns whether the values of tensors on this device are looked at."""
    return device.type == "cpu" or _enabled
