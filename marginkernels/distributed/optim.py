# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Helps optimizers where sharded and whole parameters train together.

``torch.optim`` steps a mix of DTensors and plain tensors with ``foreach`` and ``fused`` off, which
is the default for a mix. Functions of torch that handle many tensors at once refuse a mix, "got
mixed torch.Tensor and DTensor": ``foreach=True``, ``fused=True``,
``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_``, ``torch.amp.GradScaler``. The functions
here take it. For averaged weights there is
``torch.optim.swa_utils.AveragedModel(model, avg_fn=get_ema_avg_fn(decay))``, while functions for
``multi_avg_fn`` refuse a mix.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..arguments import is_dtensor
from ..update import moved
from .shard import local


def param_groups(parameters: nn.Module | Tensor | Iterable[Any]) -> list[dict[str, Any]]:
    """Returns parameter groups without a mix of whole and sharded parameters.

    An optimizer with ``foreach=True`` or ``fused=True`` handles each group by itself::

        optimizer = torch.optim.AdamW(marginkernels.param_groups(model), fused=True)

    torch has fused steps of DTensors for Adam and AdamW. With others of its optimizers give the
    group of the sharded parameters, which comes after that of the whole ones, ``fused=False``.

    Args:
        parameters: a module, or whatever optimizers take: parameters, with or without names, or
            groups, whose settings stay.
    """
    groups = _listed(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return [
        group | {"params": part}
        for group in groups
        for part in _by_layout(_listed(group["params"]))
    ]


def _listed(tensors: Tensor | Iterable[Any]) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _by_layout(parameters: list[Any]) -> list[list[Any]]:
    """Returns the whole parameters first, then lists of parameters split alike over one mesh."""
    parts: dict[tuple[Any, ...], list[Any]] = defaultdict(list, {(None, None): []})
    for p in parameters:
        tensor = p[1] if isinstance(p, tuple) else p
        layout = tuple(getattr(tensor, name, None) for name in ("device_mesh", "placements"))
        parts[layout].append(p)
    return [part for part in parts.values() if part]


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Returns the gradients, after a check that none is yet to be reduced, or never there."""
    parameters = _listed(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    held = moved()
    if any(p.grad is None and id(p) in held for p in parameters):
        raise ValueError(
            "parameters: expected those with gradients, got the weight of a head whose optimizer "
            "moves it in backward, so that its gradient is never there. Leave it out: "
            "clip_row_norm= of that optimizer bounds the gradient of each class"
        )
    for gradient in gradients:
        if any(placement.is_partial() for placement in getattr(gradient, "placements", ())):
            raise ValueError(
                "parameters: expected gradients that are sharded or replicated, got one that is "
                f"yet to be reduced, {gradient.placements}"
            )
    return gradients


def _holders(gradients: list[Tensor]) -> list[Any]:
    """Makes stand-ins of parameters for torch's clipping, with this rank's parts of gradients."""
    return [SimpleNamespace(grad=local(gradient)) for gradient in gradients]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clips as ``torch.nn.utils.clip_grad_norm_``, whole and sharded parameters together.

    The norm covers all gradients, the shards of all ranks included. It comes back as a plain
    tensor, the same on all ranks. Collective where a parameter is sharded, over whatever mesh.
    Whole gradients count once: they have to be the same on all ranks, as after
    DistributedDataParallel.
    """
    gradients = _gradients(parameters)
    whole = [g for g in gradients if not is_dtensor(g)]
    norms = [_norm(g, norm_type) for g in gradients if is_dtensor(g)]
    if whole:
        norms.append(get_total_norm(whole, norm_type))
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    clip_grads_with_norm_(_holders(gradients), max_norm, total)
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Clips as ``torch.nn.utils.clip_grad_value_``, whole and sharded parameters together."""
    nn.utils.clip_grad_value_(_holders(_gradients(parameters)), clip_value)


def _norm(gradient: Any, norm_type: float) -> Tensor:
    """Returns the norm () of a DTensor as a plain tensor.

    torch's own norm fails where a rank has no rows.
    """
    shard, mesh = gradient.to_local(), gradient.device_mesh
    dtype = torch.promote_types(shard.dtype, torch.float32)  # powers leave the range of fp16
    norm = shard.new_zeros((), dtype=dtype)
    if shard.numel() > 0:
        norm = torch.linalg.vector_norm(shard, norm_type, dtype=dtype)
    greatest = norm_type == math.inf
    value = norm if greatest else norm**norm_type
    for dimension, placement in enumerate(gradient.placements):
        if not placement.is_replicate():
            operation = dist.ReduceOp.MAX if greatest else dist.ReduceOp.SUM
            dist.all_reduce(value, operation, group=mesh.get_group(dimension))
    return value if greatest else value ** (1 / norm_type)


class GradScaler(torch.amp.GradScaler):
    """Scales the loss as ``torch.amp.GradScaler``, for whole and sharded parameters together.

    An infinity in any rank's shard makes all ranks skip the step.

    Args:
        process_group: the group that sharded parameters are split over, where they are plain
            tensors as in :mod:`marginkernels.compat.insightface`. DTensors know their group.
    """

    def __init__(
        self, *args: Any, process_group: dist.ProcessGroup | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self._process_group = process_group

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found: dict[torch.device, Tensor] = {}
        for part in _by_layout(parameters):
            stand_in: Any = SimpleNamespace(param_groups=[{"params": part}])
            of_part = super()._unscale_grads_(stand_in, inv_scale, found_inf.clone(), allow_fp16)
            for device, flag in of_part.items():
                found[device] = torch.maximum(found.get(device, flag), flag)
        if self._process_group is not None:
            for flag in found.values():
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._process_group)
        return found
