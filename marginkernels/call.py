# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The arguments of one call: checked before anything is computed, and described to other ranks."""

import numbers
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backends, loss, numerics, ops, validation


class Settings(NamedTuple):
    """The settings of a call as they were given."""

    normalize: str
    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    focal_gamma: float
    compute_dtype: torch.dtype | None
    save_tiles: str | bool
    backend: str
    sample_rate: float
    logq: bool


class CheckedCall(NamedTuple):
    """A call that has passed all checks."""

    x: Tensor  # (n, D), wide where its gradients have to be added up before they are rounded
    label: Tensor  # (n,), y after the check of all values
    x_norm: Tensor  # (n,), norms of this rank's rows
    scale: float | Tensor
    observer: nn.Module | None  # the scale's module, where it wants to observe
    learns_scale: bool  # whether it may be trained
    compute_dtype: torch.dtype
    backend: str
    tile_obstacles: list[str]


def check(
    settings: Settings, x, w, y, margin, scale, bias, shard, sampler, generator, sample_weight,
    row_margin,
) -> CheckedCall:  # fmt: skip
    """Raises whatever is wrong with the arguments of a call, before anything is exchanged."""
    validation.check_settings(*settings[:8])
    validation.check_operands(x, w, y, bias, sample_weight, row_margin, shard)
    scale, observer, learns_scale = _called(scale)
    compute_dtype = resolve_compute_dtype(x, w, settings.compute_dtype)
    stats_dtype = ops.statistics_dtype(compute_dtype)
    validation.check_scale(scale)
    validation.check_numbers(
        stats_dtype, scale=scale, z_loss=settings.z_loss, focal_gamma=settings.focal_gamma
    )
    num_classes = w.shape[0] if shard is None else shard.total
    validation.check_margin(margin, row_margin, num_classes, w.device)
    validation.check_cosines(margin, observer, settings.normalize, bias is not None)
    validation.check_sampling(
        settings.sample_rate, settings.logq, sampler, generator, settings.label_smoothing, margin,
        observer,
    )  # fmt: skip
    backend = backends.select(settings.backend, x.device, compute_dtype)
    obstacles = _tile_obstacles(settings, bias, margin, scale, compute_dtype, backend)
    if settings.save_tiles is True and obstacles:
        raise ValueError("save_tiles: cannot be True with " + ", ".join(obstacles))
    if settings.normalize != "both":  # gradients of logits and norms may cancel
        x = x.to(stats_dtype)
    x_norm = loss.row_norm(x, compute_dtype)
    label = validation.check_values(
        y, num_classes, settings.ignore_index, x_norm, scale, bias, settings.label_smoothing,
        margin, row_margin, sample_weight,
    )  # fmt: skip
    return CheckedCall(
        x, label, x_norm, scale, observer, learns_scale, compute_dtype, backend, obstacles
    )


def agreed(
    settings: Settings, call: CheckedCall, margin, scale, bias, shard, sampler, **rows_given
) -> dict:
    """Lists what changes what ranks exchange or compute, and so has to be the same on all."""
    names = (
        "normalize", "reduction", "ignore_index", "label_smoothing", "z_loss", "focal_gamma",
        "sample_rate", "logq",
    )  # fmt: skip
    training, described = margin.training, scale
    if isinstance(scale, nn.Module):
        training, described = (margin.training, scale.training), _described(scale)
    elif isinstance(scale, Tensor):
        described = type(scale).__name__
    given = dict(bias=bias, sampler=sampler)
    return {
        "shard": f"{shard.total} classes with grad_scale={shard.grad_scale!r}",
        "margin": _described(margin),
        "training": training,
        "scale": described,
        "learnable scale": call.learns_scale,
        "compute_dtype": call.compute_dtype,
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        **{name: getattr(settings, name) for name in names},
        **{name: "None" if value is None else "given" for name, value in given.items()},
        # the numbers of rows are gathered as they are
        **{name: v if v is None else f"given in {v.dtype}" for name, v in rows_given.items()},
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


def _called(
    scale: float | Tensor | nn.Module,
) -> tuple[float | Tensor, nn.Module | None, bool]:
    """The scale now, its module where that wants to observe, and whether it may be trained."""
    module, learns = None, isinstance(scale, nn.Parameter)
    if isinstance(scale, nn.Module):
        module = scale if getattr(scale, "adapts", False) else None
        learns = any(True for _ in scale.parameters())
        scale = scale()
    return scale, module, learns or (isinstance(scale, Tensor) and scale.requires_grad)


def resolve_compute_dtype(x: Tensor, w: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """``asked``, or for None autocast's type where that is on, else x's; float64 if x or w is."""
    if torch.float64 in (x.dtype, w.dtype):
        if asked not in (None, torch.float64):
            raise ValueError(f"compute_dtype: expected float64 for float64 x or w, got {asked}")
        return torch.float64
    if asked is not None:
        return asked
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _tile_obstacles(settings: Settings, bias, margin, scale, compute_dtype, backend) -> list[str]:
    """Lists what forbids to keep exponentials."""
    is_number = not isinstance(scale, Tensor)
    obstacles = {
        f"normalize={settings.normalize!r}": settings.normalize != "both",
        "a bias": bias is not None,
        "logq": settings.logq,
        "label_smoothing": settings.label_smoothing > 0,
        f"{type(margin).__name__}, which transforms the negatives": hasattr(margin, "negatives"),
        "a scale that is no number": not is_number,
        f"a scale of {numerics.OFFSET_SCALE_LIMIT:g} or more": is_number
        and scale >= numerics.OFFSET_SCALE_LIMIT,
        f"compute type {compute_dtype}": compute_dtype not in (torch.float32, torch.bfloat16),
        f"backend {backend!r}": not backends.get(backend).keeps_tiles,
    }
    return [obstacle for obstacle, applies in obstacles.items() if applies]
