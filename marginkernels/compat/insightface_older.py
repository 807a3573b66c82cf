# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the Partial FC that arcface_torch had in 2022, ``partial_fc.py`` (May 2022), for trainers
that call ``module_partial_fc(local_embeddings, local_labels, opt)``::

    from marginkernels.compat.insightface_older import PartialFC, PartialFCAdamW

With a ``sample_rate`` below 1 the optimizer moves the classes of a step's sample alone, and holds
states of these; the head keeps those of all classes. What differs is what :mod:`.insightface`
lists, and:

- ``state_dict`` has the weights after the last step. insightface saved those of the sample before
  that step.
- The optimizer may hold the head's parameter in any group, and any place of it.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..batch import held
from ..distributed.collectives import RowLayout, gather
from ..distributed.shard import ClassShard
from . import insightface
from .insightface_losses import MarginLoss

__all__ = ["PartialFC", "PartialFCAdamW"]


class _Swapping(insightface.PartialFC_V2):
    """Gives the optimizer the classes of each step's sample, and takes them back afterwards.

    ``kinds`` are the optimizers that it knows, ``states`` pairs their names of a state with the
    head's buffer for all classes.
    """

    kinds: ClassVar[tuple[type[torch.optim.Optimizer], ...]]
    states: ClassVar[dict[str, str]]

    def __init__(
        self,
        margin_loss: MarginLoss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        backend: str = "auto",
    ):
        insightface.require_fused(margin_loss)
        super().__init__(
            margin_loss, embedding_size, num_classes, sample_rate, fp16, backend=backend
        )
        self._optimizer: torch.optim.Optimizer | None = None
        if self.sample_rate < 1:
            weight = self.weight.detach()
            del self.weight
            self.register_buffer("weight", weight)
            for name in self.states.values():
                self.register_buffer(name, torch.zeros_like(weight), persistent=False)
            self.weight_activated = nn.Parameter(weight.new_empty(0, 0))
            self.register_state_dict_pre_hook(_write_back)
            self.register_state_dict_post_hook(_leave_out_sample)
            self.register_load_state_dict_post_hook(_forget)

    def forward(  # type: ignore[override]
        self, local_embeddings: Tensor, local_labels: Tensor, optimizer: torch.optim.Optimizer
    ) -> Tensor:
        """Computes the mean loss of all ranks' rows, the same on all; 0 where there are none.

        Args:
            local_embeddings, local_labels: see :class:`insightface.PartialFC_V2`.
            optimizer: the one that moves the head's parameter; it gets those of the step.
        """
        self._optimizer = optimizer
        return self._mean_loss(local_embeddings, local_labels)

    def reset_parameters(self) -> None:
        """Starts afresh, as after ``to_empty``, with states of 0."""
        super().reset_parameters()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.weight_index = None
        if self.sample_rate < 1:
            for name in self.states.values():
                getattr(self, name).zero_()

    def _checked(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.sample_rate < 1:
            optimizer = self._optimizer
            if not isinstance(optimizer, self.kinds):
                names = " or ".join(f"torch.optim.{kind.__name__}" for kind in self.kinds)
                raise TypeError(f"optimizer: expected {names}, got {type(optimizer).__name__}")
            place = self._place(optimizer)
            if place is None:
                raise ValueError(
                    f"optimizer: expected the parameter of this {type(self).__name__} in it, got "
                    "an optimizer of other parameters"
                )
            if place[0].get("amsgrad"):
                raise ValueError(
                    f"optimizer: expected amsgrad=False for {type(self).__name__}, which keeps "
                    "exp_avg and exp_avg_sq of all classes alone, got amsgrad=True"
                )
        return super()._checked(x, labels)

    def _place(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], int] | None:
        """Returns the group of the optimizer that has the head's parameter, and where in it."""
        for group in optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                if parameter is self.weight_activated:
                    return group, i
        return None

    def _fused(self, margin_loss: MarginLoss, x: Tensor, y: Tensor) -> Tensor:
        if self.sample_rate >= 1:
            return super()._fused(margin_loss, x, y)
        self.update()
        shard, position = self._activate(y)
        return self._losses(margin_loss, x, self.weight_activated, position, shard=shard)

    @torch.no_grad()
    def _activate(self, y: Tensor) -> tuple[ClassShard | None, Tensor]:
        """Chooses a sample, and returns its split and the rows' places in the samples of all ranks.

        The sample and its states become the optimizer's.
        """
        if self.shard is None:
            index = self.sample(y)
            shard, position = None, torch.searchsorted(index, y)
        else:
            group = self.shard.group
            sizes = gather(group, y.new_tensor([len(y)])).flatten().tolist()
            layout = RowLayout(group, len(y), max(1, *sizes), sizes, y.device)
            here = held(layout.every(y, fill=-1), self.class_start, self.num_local, -1)
            index = self.sample(here)
            counts = gather(group, y.new_tensor([len(index)])).flatten().tolist()
            start = sum(counts[: self.rank])
            shard = ClassShard(start, start + len(index), sum(counts), group)
            place = torch.where(here >= 0, start + torch.searchsorted(index, here), -1)
            dist.all_reduce(place, dist.ReduceOp.MAX, group=group)
            position = place[layout.own]
        self._hand_over(index)
        return shard, position

    def _hand_over(self, index: Tensor) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        place = self._place(optimizer)
        assert place is not None
        group, i = place
        parameters: list[nn.Parameter] = group["params"]
        optimizer.state.pop(parameters[i], None)
        self.weight_activated = parameters[i] = nn.Parameter(self.weight[index])
        state = {name: getattr(self, buffer)[index] for name, buffer in self.states.items()}
        optimizer.state[self.weight_activated] = state | self._more_state()

    def _more_state(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def update(self) -> None:
        """Writes the last step's classes and states back; ``forward`` calls it."""
        if self.sample_rate >= 1 or self.weight_index is None or self._optimizer is None:
            return
        state = self._optimizer.state[self.weight_activated]
        self.weight[self.weight_index] = self.weight_activated.detach()
        for name, buffer in self.states.items():
            getattr(self, buffer)[self.weight_index] = state[name]


class PartialFC(_Swapping):
    """Splits the classes over the ranks, each step on a sample of them, for ``torch.optim.SGD``.

    Args:
        margin_loss: a :class:`MarginLoss`, such as :class:`CombinedMarginLoss`.
        embedding_size, num_classes, sample_rate, fp16, backend: see
            :class:`insightface.PartialFC_V2`.
    """

    kinds = (torch.optim.SGD,)
    states = {"momentum_buffer": "weight_mom"}  # noqa: RUF012


class PartialFCAdamW(_Swapping):
    """Splits the classes over the ranks, each step on a sample of them, for Adam and AdamW.

    As in insightface a sample's steps are counted from 2 where ``sample_rate`` is below 1, one
    ahead of torch, and for all classes together.

    Args:
        margin_loss, embedding_size, num_classes, sample_rate, fp16, backend: as of
            :class:`PartialFC`.
    """

    kinds = (torch.optim.Adam, torch.optim.AdamW)
    states = {"exp_avg": "weight_exp_avg", "exp_avg_sq": "weight_exp_avg_sq"}  # noqa: RUF012
    step = 0

    def _more_state(self) -> dict[str, Any]:
        self.step += 1
        return {"step": torch.tensor(float(self.step))}


def _write_back(head: _Swapping, *_: Any) -> None:
    head.update()


def _leave_out_sample(head: _Swapping, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(prefix + "weight_activated", None)


def _forget(head: _Swapping, incompatible: Any) -> None:
    """Begins anew with the weights that were loaded: their states are 0, as in insightface."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.endswith("weight_activated")]
    head._begin_anew()
