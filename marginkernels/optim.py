# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Clipping and loss scaling where sharded and whole parameters train together.

``torch.optim`` steps a mix of DTensors and plain tensors, with ``foreach`` and ``fused`` off (the
default for a mix). ``torch.nn.utils.clip_grad_norm_`` and ``torch.amp.GradScaler`` refuse one,
"got mixed torch.Tensor and DTensor"; these take it.
"""

import math
from collections.abc import Iterable
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def _whole_and_sharded(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    parts = [], []
    for p in parameters:
        parts[hasattr(p, "to_local")].append(p)
    return parts


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for whole and sharded parameters together.

    The norm is that of all gradients, the shards of all ranks included; it comes back as a plain
    tensor, the same on all ranks. Collective where a parameter is sharded. Whole gradients count
    once: they have to be the same on all ranks, as after DistributedDataParallel.
    """
    whole, sharded = _whole_and_sharded(p for p in parameters if p.grad is not None)
    norms = [_sharded_norm(p.grad, norm_type) for p in sharded]
    if whole:
        norms.append(get_total_norm([p.grad for p in whole], norm_type))
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    for part in (whole, sharded):
        clip_grads_with_norm_(part, max_norm, total)
    return total


def _sharded_norm(gradient: Tensor, norm_type: float) -> Tensor:
    """That of a DTensor, a plain tensor (); torch's own fails where a rank has no rows."""
    shard, group = gradient.to_local(), gradient.device_mesh.get_group()
    norm = torch.linalg.vector_norm(shard, norm_type) if shard.numel() else shard.new_zeros(())
    if norm_type == math.inf:
        dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return norm
    power = norm**norm_type
    dist.all_reduce(power, group=group)
    return power ** (1 / norm_type)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for an optimizer of whole and sharded parameters.

    An infinity in any rank's shard makes all ranks skip the step.

    Args:
        process_group: where sharded parameters are plain tensors, as those of
            :mod:`marginkernels.compat.insightface`, the group that they are split over. DTensors
            know theirs.
    """

    def __init__(self, *args, process_group: dist.ProcessGroup | None = None, **settings):
        super().__init__(*args, **settings)
        self._process_group = process_group

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        found = {}
        for part in _whole_and_sharded(parameters):
            stand_in = SimpleNamespace(param_groups=[{"params": part}])
            of_part = super()._unscale_grads_(stand_in, inv_scale, found_inf.clone(), allow_fp16)
            for device, flag in of_part.items():
                found[device] = torch.maximum(found.get(device, flag), flag)
        if self._process_group is not None:
            for flag in found.values():
                dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._process_group)
        return found
