# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the optimizers by name; :mod:`marginkernels.rules` has their formulas."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import arguments
from .base import Head, HeadOptimizer, Number


def _learning_rate(lr: Any) -> Number:
    """Returns a learning rate: a number of at least 0, or a tensor ()."""
    if isinstance(lr, Tensor):
        if lr.ndim:
            raise ValueError(f"lr: expected a number or a tensor (), got {tuple(lr.shape)}")
        return lr
    return arguments.number("lr", lr, least=0)


class SGD(HeadOptimizer):
    """Takes the steps of ``torch.optim.SGD`` inside backward.

    Args:
        lr, momentum, dampening, weight_decay, nesterov: as for ``torch.optim.SGD``.
        head, state_dtype, project, clip_row_norm, scaler: see :class:`HeadOptimizer`.
    """

    rule: ClassVar[str] = "sgd"

    def __init__(
        self,
        head: Head,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **shared: Any,
    ):
        momentum = arguments.number("momentum", momentum, least=0)
        arguments.boolean("nesterov", nesterov)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov: expected a momentum above 0 and no dampening")
        settings = dict(
            lr=_learning_rate(lr),
            momentum=momentum,
            dampening=arguments.number("dampening", dampening),
            weight_decay=arguments.number("weight_decay", weight_decay, least=0),
            nesterov=nesterov,
        )
        super().__init__(head, settings, **shared)

    def has_state(self, group: dict[str, Any]) -> bool:
        return group["momentum"] > 0

    def coefficients(self, group: dict[str, Any], step: Tensor) -> list[Number]:
        if group["momentum"] != 0 and "momentum_buffer" not in self.state[group["params"][0]]:
            raise ValueError(
                f"momentum: expected 0 in an optimizer that was made without, got "
                f"{group['momentum']}. Make it with a momentum above 0, which may then be any"
            )
        grad_weight: Number = 1.0
        if group["dampening"] != 0:  # not in the first step, as in torch
            grad_weight = 1 - group["dampening"] * (step > 0).to(step.dtype)
        momentum = group["momentum"]
        direct, through = (1.0, momentum) if group["nesterov"] else (0.0, 1.0)
        if momentum == 0:  # a buffer stays as it is, as in torch
            momentum, grad_weight, direct, through = 1.0, 0.0, 1.0, 0.0
        return [group["lr"], group["weight_decay"], momentum, grad_weight, direct, through]


class AdamW(HeadOptimizer):
    """Takes the steps of ``torch.optim.AdamW`` inside backward.

    Args:
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        head, state_dtype, project, clip_row_norm, scaler: see :class:`HeadOptimizer`.
    """

    rule: ClassVar[str] = "adamw"

    def __init__(
        self,
        head: Head,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **shared: Any,
    ):
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas}")
        settings = dict(
            lr=_learning_rate(lr),
            betas=tuple(arguments.number("betas", beta, least=0, below=1) for beta in betas),
            eps=arguments.number("eps", eps, least=0),
            weight_decay=arguments.number("weight_decay", weight_decay, least=0),
        )
        super().__init__(head, settings, **shared)

    def coefficients(self, group: dict[str, Any], step: Tensor) -> list[Number]:
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        # with the betas as the rule sees them: 1 - 0.999 has 5 digits in fp32
        one, two = (_complement(_rounded(beta, step.dtype), step + 1) for beta in (beta1, beta2))
        decay = 1 - lr * group["weight_decay"]
        return [decay, beta1, beta2, group["eps"], lr / one, two.sqrt()]


def _rounded(number: float, dtype: torch.dtype) -> float:
    (value,) = torch.tensor([number], dtype=dtype, device="cpu").tolist()
    return value


def _complement(beta: float, power: Tensor) -> Tensor:
    """Returns 1 - beta^power, (), with all digits where beta is near 1."""
    return torch.ones_like(power) if beta == 0 else -torch.expm1(power * math.log(beta))


class RowwiseAdagrad(HeadOptimizer):
    """Takes steps of Adagrad with one number per class, inside backward.

    The number is the sum over the steps of the mean square of the class's gradient, as in FBGEMM's
    EXACT_ROWWISE_ADAGRAD with L2 weight decay, for tables of embeddings.

    Args:
        lr, eps, weight_decay: the learning rate is divided by the root of the sum, plus eps;
            ``weight_decay`` times the weight is added to the gradient first.
        head, state_dtype, project, clip_row_norm, scaler: see :class:`HeadOptimizer`. The sum is
            in float32 always.
    """

    rule: ClassVar[str] = "rowwise_adagrad"

    def __init__(
        self,
        head: Head,
        lr: float | Tensor = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **shared: Any,
    ):
        settings = dict(
            lr=_learning_rate(lr),
            eps=arguments.number("eps", eps, least=0),
            weight_decay=arguments.number("weight_decay", weight_decay, least=0),
        )
        super().__init__(head, settings, **shared)

    def coefficients(self, group: dict[str, Any], step: Tensor) -> list[Number]:
        return [group["lr"], group["weight_decay"], group["eps"]]
