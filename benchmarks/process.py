# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fresh processes with settings that only their start can set, and what the kernel says of them."""

import contextlib
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

_ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
              "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")  # fmt: skip


class Memory(NamedTuple):
    """Where big buffers come from.

    warm: glibc keeps what is freed in one heap and hands it out again: no page is faulted in, as if
    every contender reused its buffers.
    fresh: glibc's own defaults: a buffer above 32 MiB is mapped anew each time, and the kernel
    zeroes and maps each page at its first touch, inside the step.
    huge_pages: torch's allocator asks for them (it does not by default).
    """

    warm: bool
    huge_pages: bool

    def __str__(self) -> str:
        buffers = "warm" if self.warm else "fresh"
        return f"{buffers} buffers, huge pages {'on' if self.huge_pages else 'off'}"

    def environment(self) -> dict[str, str]:
        huge_pages = {"THP_MEM_ALLOC_ENABLE": "1"} if self.huge_pages else {}
        if not self.warm:
            return huge_pages
        return huge_pages | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}

    def prepare(self, nbytes: int) -> None:
        """Lets a warm heap grow by ``nbytes``, or half of what is free, with every page touched.

        More than a step needs: small objects that stay keep freed blocks apart, and a step that
        finds no gap of the right size would have to fault in new pages.
        """
        if self.warm:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            torch.zeros(min(nbytes, free // 2), dtype=torch.uint8).fill_(1)


# compiles in the process itself: workers would start up and idle beside the first rounds
_ALWAYS = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
# whatever can be given back is given back when freed, so that a later peak shows
EXACT_COUNT = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}


def in_child(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a new process that starts with this environment."""
    with _environment(environment):
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    saved = dict(os.environ)
    for name in _ALLOCATOR:
        os.environ.pop(name, None)
    os.environ.update(_ALWAYS | changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def reset_peak() -> None:
    """VmHWM becomes VmRSS (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
