# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs the CUDA kernels without a GPU: with a fiber for each thread, or as PTX."""
