# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Keeps class weights under the names and in the layouts of other projects."""

from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import ops
from ..distributed.shard import ClassShard, watch_wrappers
from ..evaluation import Classes
from ..functional import margin_cross_entropy
from ..update import Update


class FusedHead(nn.Module):
    """Holds one parameter of class weights, and computes the fused loss on it.

    A subclass sets ``self.<weight_name>`` to its parameter. Where ``transposed``, the parameter
    is (D, C K), as pytorch-metric-learning, transformers, AdaFace and others keep theirs. It is the
    transposed view of contiguous rows (C K, D), which the kernels read as they are: name and shape
    in ``state_dict`` are the other project's, and nothing is copied. A parameter that comes in
    another order, as ``load_state_dict(assign=True)`` may bring one, is laid out anew.
    """

    weight_name: ClassVar[str] = "weight"
    transposed: ClassVar[bool] = False

    bias: nn.Parameter | None
    shard: ClassShard | None = None
    sub_centers: int = 1
    _update: Update | None = None  # of an optimizer of marginkernels.optim

    def __init__(self, *args: Any, **kwargs: Any):
        watch_wrappers()
        super().__init__(*args, **kwargs)
        self.register_parameter("bias", None)  # which a subclass may have

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter, and lays out the class weights row by row."""
        if self.transposed and name == self.weight_name and param is not None:
            param.data = param.data.t().contiguous().t()
        super().register_parameter(name, param)

    def rows(self) -> Tensor:
        """Returns the class weights (C K, D), a view of the parameter."""
        weight: Tensor = getattr(self, self.weight_name)
        return weight.t() if self.transposed else weight

    def as_classes(self) -> Classes:
        """Returns the classes for :mod:`marginkernels.evaluation`, to compute cosines with."""
        rows = self.rows()
        return Classes(rows, len(rows) // self.sub_centers, sub_centers=self.sub_centers)

    def fused_loss(self, embeddings: Tensor, labels: Tensor, **options: Any) -> Any:
        """Computes :func:`marginkernels.margin_cross_entropy` of the head's class weights.

        Every label has to be a class, unless ``ignore_index`` is among the options.
        """
        options.setdefault("ignore_index", ops.NO_LABEL)
        return margin_cross_entropy(
            embeddings, self.rows(), labels, sub_centers=self.sub_centers, update=self._update,
            **options,
        )  # fmt: skip


def _is_by_columns(t: object) -> TypeGuard[Tensor]:
    """Returns whether the value is a matrix that lies in memory column by column."""
    return isinstance(t, Tensor) and t.ndim == 2 and not t.is_contiguous() and t.t().is_contiguous()


def _lay_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Gives gradients and states of parameters by columns the order of their parameter.

    Fused steps of torch.optim pair the numbers of a parameter, its gradient and its states as they
    lie in memory. Others in another order, as the states in a checkpoint of the other project or a
    gradient that was put there by hand, would give a wrong step on a CPU and an error on a GPU.
    """
    if torch.compiler.is_compiling():
        return
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if not _is_by_columns(p):
            continue
        if p.grad is not None and p.grad.layout is torch.strided and not _is_by_columns(p.grad):
            p.grad = p.grad.t().contiguous().t()
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and not _is_by_columns(value):
                state[name] = value.t().contiguous().t()
        if _saved_by_rows not in optimizer._optimizer_state_dict_post_hooks.values():
            optimizer.register_state_dict_post_hook(_saved_by_rows)


def _saved_by_rows(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of an optimizer in the order in which the other project keeps it."""
    states = {
        key: {name: v.contiguous() if _is_by_columns(v) else v for name, v in state.items()}
        for key, state in state_dict["state"].items()
    }
    return state_dict | {"state": states}


register_optimizer_step_pre_hook(_lay_out)
