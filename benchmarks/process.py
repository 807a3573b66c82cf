# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Starts processes with settings that only a start can set, and asks for their memory."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

_ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_",
              "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")  # fmt: skip
_STATUS = Path("/proc/self/status")


class Memory(NamedTuple):
    """Says where big buffers come from.

    warm: glibc keeps freed memory in one heap and hands it out again. No page is faulted in, as if
    every contender reused its buffers. Otherwise buffers are fresh, by glibc's own defaults: a
    buffer above 32 MiB is mapped anew each time, and the kernel zeroes and maps each page at its
    first touch, inside the step.
    huge_pages: torch's allocator asks the kernel for huge pages, which it does not by default.
    """

    warm: bool
    huge_pages: bool

    def __str__(self) -> str:
        buffers = "warm" if self.warm else "fresh"
        return f"{buffers} buffers, huge pages {'on' if self.huge_pages else 'off'}"

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that have this effect."""
        huge_pages = {"THP_MEM_ALLOC_ENABLE": "1"} if self.huge_pages else {}
        if not self.warm:
            return huge_pages
        return huge_pages | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}

    def prepare(self, nbytes: int) -> None:
        """Lets a warm heap grow by ``nbytes``, or half of what is free, with every page touched.

        Ask for more than a step needs. Small objects that stay keep freed blocks apart, and a step
        that finds no gap of the right size has to fault in new pages.
        """
        if self.warm:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            torch.zeros(min(nbytes, free // 2), dtype=torch.uint8).fill_(1)


# The compiler works in the process itself: worker processes would idle beside the first rounds.
_ALWAYS = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
# Freed memory goes back to the system where it can, so that a later peak shows.
EXACT_COUNT = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}


def in_child(environment: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function in a new process that starts with this environment."""
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
    """Returns VmRSS (now) or VmHWM (the peak) of this process."""
    status = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(status[field].split()[0])


def reset_peak() -> None:
    """Sets the record of the peak, VmHWM, to what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
