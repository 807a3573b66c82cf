# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the version, in one place."""

__version__ = "0.1.0"
