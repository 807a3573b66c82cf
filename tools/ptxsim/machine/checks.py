# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Says which faults a launch looks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Checks:
    """Selects the faults that a launch looks for.

    Bounds, alignment, deadlock and missing lanes of a warp are always checked.
    """

    race: bool = True  # shared-memory races between warps
    async_pending: bool = True  # touching what a cp.async or wgmma in flight reads or writes
    async_poison: bool = True  # no value in destinations of cp.async and wgmma until they land
    uninit_shared: bool = False  # reads of never-written shared bytes
    exited_at_barrier: bool = True  # barrier or warp-sync instruction that names exited threads
    global_overlap: bool = False  # plain stores of different values by two CTAs to the same bytes
    mma_fence: bool = True  # wgmma without the wgmma.fence that its registers need
    proxy_fence: bool = True  # ... or the fence.proxy.async that its shared operands need
    copy_fence: bool = True  # the same for operands that cp.async wrote (see the README)

    @classmethod
    def strict(cls) -> Checks:
        """Returns every check."""
        return cls(uninit_shared=True, global_overlap=True)

    @classmethod
    def fast(cls) -> Checks:
        """Returns only the checks that cost nothing."""
        return cls(
            race=False,
            async_pending=False,
            async_poison=False,
            exited_at_barrier=False,
            mma_fence=False,
            proxy_fence=False,
        )

    @classmethod
    def of(cls, checks: Checks | str | None) -> Checks:
        """Returns the checks that an argument of `launch` asks for."""
        if isinstance(checks, Checks):
            return checks
        named = {None: cls, "default": cls, "strict": cls.strict, "fast": cls.fast}
        return named[checks]()
