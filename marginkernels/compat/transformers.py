# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses the objective of transformers' ``*ForXVector`` models with one line::

    from marginkernels.compat.transformers import replace_objective

    model = replace_objective(Wav2Vec2ForXVector.from_pretrained(path, num_labels=7205))

Unchanged are the loss and its gradients, ``objective.weight`` (D, C) in ``state_dict`` and in files
of safetensors, ``scale`` and ``margin``, and the Trainer. These things differ:

- Under autocast the products are summed, and the softmax is taken, in float32; theirs rounds the
  logits to the narrow type.
- A label of -100 leaves its row out of the mean; theirs is an error. Others outside [0, num_labels)
  are an error in both.
"""

import sys
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import arguments
from ..margins import CosFace
from .weights import FusedHead

__all__ = ["AMSoftmaxLoss", "replace_objective"]

_NAME = "AMSoftmaxLoss"
Model = TypeVar("Model")


class AMSoftmaxLoss(FusedHead):
    """Takes cos(theta) - margin as the target's cosine, in place of transformers' class.

    ``scale`` and ``margin`` may be reassigned at any step.

    Args:
        input_dim, num_labels: D and C.
        scale: a number above 0.
        margin: a number in [-2, 2].
    """

    transposed = True

    def __init__(self, input_dim: int, num_labels: int, scale: float = 30.0, margin: float = 0.4):
        super().__init__()
        self.input_dim = arguments.integer("input_dim", input_dim)
        self.num_labels = arguments.integer("num_labels", num_labels)
        self.scale = arguments.number("scale", scale, above=0)
        self._cosface = CosFace(margin)
        self.weight = nn.Parameter(torch.randn(input_dim, num_labels))

    @property
    def margin(self) -> float | Tensor:
        """Returns the margin, which may be reassigned."""
        return self._cosface.m

    @margin.setter
    def margin(self, value: float | Tensor) -> None:
        self._cosface.m = value

    def forward(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Computes the mean loss of hidden states (N, D) and as many labels, of any shape."""
        return self.fused_loss(
            hidden_states, labels.flatten(), margin=self._cosface, scale=self.scale
        )

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, num_labels={self.num_labels}, scale={self.scale:g}"


def replace_objective(model: Model) -> Model:
    """Puts :class:`AMSoftmaxLoss` in the place of the model's objective, and returns the model.

    The parameter stays, with the optimizer that may have it, and so do ``scale`` and ``margin``.

    Args:
        model: a ``*ForXVector`` model of transformers; or its class, whose models then have the
            fused objective from the start, those of ``from_pretrained`` included. The other models
            of the same file do so too.
    """
    if isinstance(model, type):
        file = sys.modules[model.__module__]
        if not model.__name__.endswith("ForXVector") or not hasattr(file, _NAME):
            raise TypeError(_expected(f"the class {model.__name__}"))
        setattr(file, _NAME, AMSoftmaxLoss)
        return model
    holder: Any = model
    objective: Any = getattr(model, "objective", None)
    if isinstance(objective, AMSoftmaxLoss):
        return model
    if type(objective).__name__ != _NAME:
        raise TypeError(_expected(f"{type(model).__name__} with {type(objective).__name__}"))
    input_dim, num_labels = objective.weight.shape
    with torch.device("meta"):  # no second set of weights is drawn
        fused = AMSoftmaxLoss(input_dim, num_labels, objective.scale, objective.margin)
    fused.weight = objective.weight
    holder.objective = fused.train(objective.training)
    return model


def _expected(got: str) -> str:
    return f"model: expected a *ForXVector model of transformers, or its class, got {got}"
