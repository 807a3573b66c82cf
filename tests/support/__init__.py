# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds what tests share: problems, dense losses, processes and simulators."""
