# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lets Lightning train a module whose head splits its classes over the ranks::

trainer = Trainer(strategy=SplitHeadStrategy(), devices=8)
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from ..arguments import is_dtensor
from ..distributed.shard import held_shards

__all__ = ["SplitHeadStrategy"]


class SplitHeadStrategy(DDPStrategy):
    """Wraps a LightningModule as ``DDPStrategy`` does, without the classes that ranks split.

    The module makes its :class:`marginkernels.MarginSoftmaxHead` in ``configure_model``, with
    ``sharding=torch.distributed.group.WORLD``. A checkpoint has all classes, as that of a head
    that is not split: it loads in one process, and in any number of them. The arguments are those
    of ``DDPStrategy``.
    """

    def setup(self, trainer: Any) -> None:
        """Names the weights that each rank has for itself, before the module is wrapped.

        Raises:
            TypeError: a head keeps its classes as plain tensors, which a checkpoint would lose.
        """
        module = self.lightning_module
        shards = held_shards(module)
        for name, (tensor, _) in shards.items():
            if not is_dtensor(tensor):
                raise TypeError(
                    f"{name}: expected a DTensor, as MarginSoftmaxHead(..., sharding=...) has, got "
                    f"{type(tensor).__name__}, which a checkpoint of Lightning cannot gather"
                )
        ignored = [*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *shards]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
        super().setup(trainer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Gathers what the ranks split, and lets rank 0 write the file. Collective."""
        whole = tree_map(lambda t: t.full_tensor() if is_dtensor(t) else t, checkpoint)
        super().save_checkpoint(whole, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each rank its part of the optimizers' states."""
        pairs = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        states = [_split(optimizer, state) for optimizer, state in pairs]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def _split(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of an optimizer, split as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    states = dict(state_dict["state"])
    for p, number in zip(parameters, numbers, strict=True):
        if is_dtensor(p) and number in states:
            states[number] = {name: _as_split(value, p) for name, value in states[number].items()}
    return state_dict | {"state": states}


def _as_split(value: Any, like: Any) -> Any:
    """Returns a tensor with a row for each row of ``like`` split alike, and others as they are."""
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != len(like):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
