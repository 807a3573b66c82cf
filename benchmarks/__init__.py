# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Measures the head: ``python -m benchmarks.head`` from the root of the repository."""
