# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Executes PTX on the CPU with numpy, with memory and synchronisation checks."""

from .errors import *  # noqa: F403
from .machine.checks import Checks
from .memory import Device
from .module import Module
from .stats import Stats

__all__ = ["Checks", "Device", "Module", "Stats"]
