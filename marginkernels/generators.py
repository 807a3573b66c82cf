# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Random numbers that differ between ranks and steps, from a state that is one for all ranks."""

import torch
from torch import Tensor, nn

from . import ops


class StepGenerators(nn.Module):
    """A generator for each step, from a seed, the number of the step and the rank.

    So the state, seed and step, is the same on all ranks: it is saved once, and goes on with
    another number of ranks.

    Args:
        seed: of all steps.
        user: what the numbers are for, as an error names it.
    """

    def __init__(self, seed: int, user: str):
        super().__init__()
        self.seed, self.step, self.user = seed, 0, user

    # torch.compile would take each step for a new graph. As torch.compiler.disable, which imports
    # the compiler at once
    @torch._disable_dynamo
    def forward(self, device: torch.device, rank: int) -> torch.Generator:
        """The generator of the next step. RuntimeError where that cannot be the next: within a
        backward pass, and in the capture of a CUDA graph, which would repeat one step for ever.
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
        return torch.tensor([self.seed, self.step], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.step = state.tolist()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # saved where nothing was drawn: the own seed is as good a start
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


def without_unused(state_dict: dict, prefix: str, used: StepGenerators | None) -> dict:
    """The state to load, without that of generators under ``prefix`` where none are used now."""
    name = prefix + "._extra_state"
    return state_dict if used is not None else {k: v for k, v in state_dict.items() if k != name}


def random_seed() -> int:
    """Draws a seed from torch's default generator, whatever the default device."""
    return int(torch.randint(2**62, (), device="cpu"))


def mixed(*numbers: int) -> int:
    """A seed of 32 bits, the same for the same numbers and else unrelated (FNV-1a by bytes)."""
    state = 0x811C9DC5
    for number in numbers:
        for byte in number.to_bytes(8, "little", signed=True):
            state = (state ^ byte) * 0x01000193 & 0xFFFFFFFF
    return state
