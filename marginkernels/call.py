# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks the arguments of one call, and describes them to other ranks."""

import math
import numbers
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import arguments, backends, numerics, ops, validation
from .distributed.shard import ClassShard
from .margins import MarginHooks, name_of
from .sampling import Sampling
from .scales import AdaptiveScale, observer_of
from .settings import Settings, shared
from .update import Update

# built at import, because torch.compile(dynamic=True) cannot format a float
_GREAT_SCALE = f"a scale of {numerics.OFFSET_SCALE_LIMIT:g} or more"


class Operands(NamedTuple):
    """Holds the tensors of a call as they were given."""

    x: Tensor  # (n, D)
    w: Tensor  # (C K, D), K the sub_centers
    y: Tensor  # (n,) or (n, L)
    bias: Tensor | None  # (C,)
    sample_weight: Tensor | None  # (n,)
    row_margin: Tensor | None  # (n,)
    label_weights: Tensor | None  # (n, L)
    class_weight: Tensor | None  # (C,) of all ranks


class Call(NamedTuple):
    """Holds a call that has passed all checks: n rows and C classes of this rank."""

    settings: Settings
    x: Tensor  # (n, D), wide where its gradients have to be added up before they are rounded
    w: Tensor  # (C K, D), K the sub_centers
    bias: Tensor | None  # (C,)
    label: Tensor  # (n,) or (n, L), y after the check of all values
    sample_weight: Tensor | None  # (n,)
    row_margin: Tensor | None  # (n,)
    label_weights: Tensor | None  # (n, L)
    class_weight: Tensor | None  # (C,) of all ranks
    margin: MarginHooks
    scale: float | Tensor
    observer: AdaptiveScale | None  # the scale's module, where it wants to observe
    learns_scale: bool  # whether it may be trained
    sampling: Sampling | None
    update: Update | None  # of an optimizer that moves w in backward
    x_dtype: torch.dtype  # of x as given
    compute_dtype: torch.dtype
    stats_dtype: torch.dtype
    backend: str
    fuses_rows: bool  # whether ops of the backend do the work on N numbers
    tile_obstacles: list[str]
    num_classes: int  # of all ranks


def check(
    settings: Settings,
    operands: Operands,
    margin: nn.Module,
    scale: float | Tensor | nn.Module,
    shard: ClassShard | None,
    sampling: Sampling | None,
    update: Update | None,
    return_stats: bool,
) -> Call:
    """Raises an error for the first bad argument of a call, before anything is exchanged."""
    validation.check_settings(settings)
    arguments.boolean("return_stats", return_stats)
    validation.check_operands(operands, shard, settings.sub_centers)
    x, w, y, bias, sample_weight, row_margin, label_weights, class_weight = operands
    observer = observer_of(scale)
    value: float | Tensor
    if isinstance(scale, nn.Module):
        value, learns_scale = scale(), any(True for _ in scale.parameters())
    else:
        value, learns_scale = scale, isinstance(scale, nn.Parameter)
    learns_scale |= isinstance(value, Tensor) and value.requires_grad
    compute_dtype = resolve_compute_dtype(x, w, settings.compute_dtype)
    stats_dtype = ops.statistics_dtype(compute_dtype)
    validation.check_scale(value)
    validation.check_numbers(
        stats_dtype, scale=value, z_loss=settings.z_loss, focal_gamma=settings.focal_gamma
    )
    num_classes = w.shape[0] // settings.sub_centers if shard is None else shard.total
    validation.check_class_weight(class_weight, num_classes, settings.label_smoothing, x, y)
    hooks = validation.check_margin(margin, num_classes, w.device, row_margin)
    validation.check_cosines(hooks, observer, settings.normalize, bias is not None)
    validation.check_sum(hooks, settings)
    if y.ndim == 2 and observer is not None:
        raise ValueError(f"y: expected labels ({len(x)},) with {type(observer).__name__}")
    validation.check_sampling(sampling, settings.label_smoothing, hooks, observer)
    backend = backends.select(settings.backend, x.device, compute_dtype, _work(x, w, shard))
    if update is not None and not backends.get(backend).updates:
        raise RuntimeError(
            f"backend: expected one that serves marginkernels.optim, got {backend!r}, which has no "
            "head_step. Take an optimizer of torch.optim"
        )
    if update is not None and not torch.compiler.is_compiling():
        update.check(w)
    obstacles = _tile_obstacles(settings, y, bias, hooks, value, sampling, compute_dtype, backend)
    if settings.save_tiles is True and obstacles:
        raise ValueError("save_tiles: cannot be True with " + ", ".join(obstacles))
    x_dtype = x.dtype
    if settings.normalize != "both":  # gradients of logits and norms may cancel
        x = x.to(stats_dtype)
    call = Call(
        settings=settings, x=x, w=w, bias=bias, label=y,
        sample_weight=sample_weight, row_margin=row_margin, label_weights=label_weights,
        class_weight=class_weight, margin=hooks, scale=value,
        observer=observer, learns_scale=learns_scale, sampling=sampling, update=update,
        x_dtype=x_dtype, compute_dtype=compute_dtype, stats_dtype=stats_dtype, backend=backend,
        # a compiler fuses what it sees, and compiles no graph for each number
        fuses_rows=backends.get(backend).fuses_rows and not torch.compiler.is_compiling(),
        tile_obstacles=obstacles, num_classes=num_classes,
    )  # fmt: skip
    return call._replace(label=validation.check_values(call))


def agreed(call: Call, margin: nn.Module, scale: float | Tensor | nn.Module) -> dict[str, object]:
    """Lists the values that have to be equal on all ranks."""
    training: object = margin.training
    described: object = type(scale).__name__ if isinstance(scale, Tensor) else scale
    if isinstance(scale, nn.Module):
        training, described = (margin.training, scale.training), _described(scale)
    given = dict(
        sample_weight=call.sample_weight, row_margin=call.row_margin,
        label_weights=call.label_weights, class_weight=call.class_weight,
    )  # fmt: skip
    return {
        "margin": _described(margin),
        "training": training,
        "scale": described,
        "learnable scale": call.learns_scale,
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        **shared(call.settings),
        "compute_dtype": call.compute_dtype,  # as it was resolved
        "labels": f"(rows{''.join(f', {size}' for size in call.label.shape[1:])})",
        "bias": "None" if call.bias is None else "given",
        "optimizer": "None" if call.update is None else call.update.described(),
        "sampling": "None" if call.sampling is None else call.sampling.described(),
        # the numbers of rows are gathered as they are
        **{name: v if v is None else f"given in {v.dtype}" for name, v in given.items()},
    }


def _described(module: nn.Module) -> str:
    """Names a margin or scale and what is inside, with the settings of the library's own."""
    parts = []
    for part in module.modules():
        m = getattr(part, "m", None)  # exact, where extra_repr rounds
        settings = [str(m)] if isinstance(m, numbers.Real) else []
        if type(part).__module__.startswith(__package__ + "."):
            settings.append(part.extra_repr())
        parts.append(f"{type(part).__name__}({', '.join(settings)})")
    return " of ".join(parts)


def resolve_compute_dtype(x: Tensor, w: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Returns ``asked``, or for None autocast's type where that is on, else x's.

    It is float64 if x or w is.
    """
    if torch.float64 in (x.dtype, w.dtype):
        if asked not in (None, torch.float64):
            raise ValueError(f"compute_dtype: expected float64 for float64 x or w, got {asked}")
        return torch.float64
    if asked is not None:
        return asked
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _work(x: Tensor, w: Tensor, shard: ClassShard | None) -> float:
    """Returns N C D of this rank's sweep, as if all ranks gave as many rows."""
    if torch.compiler.is_compiling():
        return math.inf  # a constant, where sizes may be none
    ranks = 1 if shard is None else dist.get_world_size(shard.group)
    return ranks * x.shape[0] * w.numel()


def _tile_obstacles(
    settings: Settings,
    y: Tensor,
    bias: Tensor | None,
    margin: MarginHooks,
    scale: float | Tensor,
    sampling: Sampling | None,
    compute_dtype: torch.dtype,
    backend: str,
) -> list[str]:
    """Lists why exponentials cannot be kept."""
    is_number = not isinstance(scale, Tensor)
    obstacles = {
        f"normalize={settings.normalize!r}": settings.normalize != "both",
        "several labels": y.ndim == 2,
        "a bias": bias is not None,
        "logq": sampling is not None and sampling.logq,
        "label_smoothing": settings.label_smoothing > 0,
        "sub_centers": settings.sub_centers > 1,
        f"{name_of(margin)}, which transforms the negatives": margin.transforms_negatives,
        "a scale that is no number": not is_number,
        _GREAT_SCALE: is_number and scale >= numerics.OFFSET_SCALE_LIMIT,
        f"compute type {compute_dtype}": compute_dtype not in (torch.float32, torch.bfloat16),
        f"backend {backend!r}": not backends.get(backend).keeps_tiles,
    }
    return [obstacle for obstacle, applies in obstacles.items() if applies]
