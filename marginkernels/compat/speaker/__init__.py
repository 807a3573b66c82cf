# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds drop-ins for heads of speaker trainers, each module named after what it replaces."""
