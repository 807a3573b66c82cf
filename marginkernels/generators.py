# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes random numbers that differ between ranks and steps, from one state for all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops

_STATE = "_extra_state"  # torch's name in a state dict for what get_extra_state returns
_HOLDERS = ("sampler", "generators")  # attributes by which heads and margins hold generators


class StepGenerators(nn.Module):
    """Makes a generator for each step, from a seed, the number of the step and the rank.

    The state, seed and step, is the same on all ranks. So it is saved once, and goes on with
    another number of ranks.

    Args:
        seed: of all steps.
        user: the purpose of the numbers, as an error names it.
    """

    def __init__(self, seed: int, user: str):
        super().__init__()
        self.seed, self.step, self.user = seed, 0, user

    # torch.compile would take each step for a new graph. torch.compiler.disable does the same, but
    # imports the compiler at once
    @torch._disable_dynamo
    def forward(self, device: torch.device, rank: int) -> torch.Generator:
        """Returns the generator of the next step.

        Raises:
            RuntimeError: within a backward pass, where the step would not be the next one, and in
                the capture of a CUDA graph, which would repeat one step for ever.
        """
        ops.refuse_recomputation(self.user)
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.user}: expected no capture of a CUDA graph, which would repeat the random "
                "numbers of one step. Capture the backbone alone, or let the numbers come from "
                "torch's default generator, which goes on with each replay"
            )
        self.step += 1
        return torch.Generator(device).manual_seed(mixed(self.seed, rank, self.step))

    def get_extra_state(self) -> Tensor:
        """Returns seed and step for the state dict."""
        return torch.tensor([self.seed, self.step], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Takes seed and step from a state dict."""
        self.seed, self.step = state.tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a state that was saved where nothing was drawn lacks this one: the own seed is as good
        state_dict.setdefault(prefix + _STATE, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Returns the seed as ``print`` shows it."""
        return f"seed={self.seed}"


def is_state_of_generators(name: str) -> bool:
    """Returns whether a state dict's entry of this name is the state of :class:`StepGenerators`.

    Only heads that sample and margins with a seed have one.
    """
    return tuple(name.split(".")[-2:]) in {(holder, _STATE) for holder in _HOLDERS}


def without_unused(
    state_dict: dict[str, Any], holder: str, used: StepGenerators | None
) -> dict[str, Any]:
    """Returns the state to load without the state of generators that are not used now.

    Args:
        state_dict: the state as it was saved.
        holder: the name of the attribute that holds generators, with the prefix of its module.
        used: what the attribute holds now; None where no generators are used.
    """
    if used is not None:
        return state_dict
    unused = f"{holder}.{_STATE}"
    return {name: value for name, value in state_dict.items() if name != unused}


def random_seed(group: dist.ProcessGroup | None = None) -> int:
    """Draws a seed from torch's default generator, whatever the default device.

    All ranks of a group get the first one's: collective.
    """
    seed = [int(torch.randint(2**62, (), device="cpu"))]
    if group is not None:
        dist.broadcast_object_list(seed, group=group, group_src=0)
    return seed[0]


def process_rank() -> int:
    """Returns the rank in the default process group, or 0 where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rank_generator(device: torch.device, rank: int) -> torch.Generator:
    """Makes a generator from torch's default one and the rank.

    So ranks that were seeded alike do not draw the same rows.
    """
    return torch.Generator(device).manual_seed(mixed(random_seed(), rank))


def mixed(*numbers: int) -> int:
    """Mixes numbers into a seed of 32 bits (FNV-1a by bytes).

    The same numbers give the same seed, and other numbers an unrelated one.
    """
    state = 0x811C9DC5
    for number in numbers:
        for byte in number.to_bytes(8, "little", signed=True):
            state = (state ^ byte) * 0x01000193 & 0xFFFFFFFF
    return state
