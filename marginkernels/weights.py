# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds ``ClassWeights``, the part of a head that knows which classes this process has."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import arguments
from .distributed.shard import ClassShard, local, sharded
from .generators import rank_generator
from .pages import in_huge_pages
from .settings import Settings


class ClassWeights(nn.Module):
    """Makes, fills, loads and hands out the rows of the classes that this rank has to hold."""

    weight_name, transposed = "weight", False  # for optimizers
    weight: nn.Parameter  # (C K, D), a DTensor where classes are split
    bias: nn.Parameter | None  # (C,)
    num_classes: int
    settings: Settings
    shard: ClassShard | None
    _mesh: DeviceMesh | None

    @property
    def sub_centers(self) -> int:
        """Returns the number of rows of ``weight`` that each class has."""
        return self.settings.sub_centers

    def _parameter(
        self,
        shape: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> nn.Parameter:
        if self.shard is None or self._mesh is None:
            return nn.Parameter(in_huge_pages(torch.empty(shape, device=device, dtype=dtype)))
        count = self.shard.size * (shape[0] // self.num_classes)
        held = in_huge_pages(torch.empty(count, *shape[1:], device=device, dtype=dtype))
        return nn.Parameter(sharded(held, self._mesh, shape))

    def _reset_classes(self) -> None:
        weight, generator = local(self.weight.detach()), None
        if self.shard is not None and not weight.is_meta:
            generator = rank_generator(weight.device, dist.get_rank(self.shard.group))
        nn.init.normal_(weight, std=0.01, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(local(self.bias.detach()))

    def held_weight(self) -> Tensor:
        """Returns the rows of ``weight`` that this rank has to hold."""
        return self._held("weight", self.weight)

    def held_bias(self) -> Tensor | None:
        """Returns the part of ``bias`` that this rank has to hold."""
        return None if self.bias is None else self._held("bias", self.bias)

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        """Returns the classes of this rank.

        Raises:
            RuntimeError: another has split the tensor, as fully_shard does outside of its forward.
        """
        mesh = getattr(tensor, "device_mesh", None)
        if mesh is not None and mesh != self._mesh:
            raise RuntimeError(
                f"{name}: expected the head's own, got a DTensor over {mesh}, of which this rank "
                "holds a part. Call the head between unshard() and reshard() of the module that "
                "fully_shard was given, or leave the head out: sharding= splits its classes"
            )
        return local(tensor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.shard is not None and self._mesh is not None:
            # each rank takes its own of a tensor with all classes
            for name in ("weight", "bias"):
                value = state_dict.get(prefix + name)
                if isinstance(value, Tensor) and not arguments.is_dtensor(value):
                    rows = value[self.shard.rows(1 if name == "bias" else self.sub_centers)]
                    rows = rows.to(local(self.weight).device)
                    state_dict[prefix + name] = sharded(rows, self._mesh, value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
