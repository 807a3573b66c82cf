# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Asks for huge pages of memory, which a sweep over all weights reads faster than small ones."""

import ctypes
import sys

from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # of Linux


def in_huge_pages(t: Tensor) -> Tensor:
    """Returns a tensor that was just made, after a hint to Linux to back it by huge pages.

    The hint counts until the first touch of the memory. Where it is refused, pages stay small.
    """
    # a subclass, as torch's fake tensors are, may have no memory
    if sys.platform != "linux" or t.device.type != "cpu" or type(t) is not Tensor:
        return t
    begin, end = t.data_ptr(), t.data_ptr() + t.nbytes
    first, last = -(-begin // _HUGE_PAGE) * _HUGE_PAGE, end // _HUGE_PAGE * _HUGE_PAGE
    if first < last:
        address, size = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
        ctypes.CDLL(None).madvise(address, size, _MADV_HUGEPAGE)
    return t
