# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Raises a clear error for bad input before anything is computed.

Shapes, dtypes, devices and Python numbers are always checked, values in tensors where
:mod:`marginkernels.device_checks` says so.
"""

import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import arguments, device_checks, numerics, ops
from .distributed.shard import ClassShard
from .margins import MarginHooks, adapted, name_of
from .sampling import PartialFC, Sampling
from .scales import AdaptiveScale
from .settings import Settings

if TYPE_CHECKING:
    from .call import Call, Operands

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_settings(settings: Settings) -> None:
    """Checks what does not depend on the operands of a call."""
    _check_choice("normalize", settings.normalize, ("both", "weight", "none"))
    _check_choice("reduction", settings.reduction, ("mean", "sum", "none"))
    _check_choice("save_tiles", settings.save_tiles, ("auto", True, False))
    arguments.integer("sub_centers", settings.sub_centers)
    _check_choice("other_labels", settings.other_labels, ("exclude", "negatives"))
    ignored, smoothing = settings.ignore_index, settings.label_smoothing
    if not isinstance(ignored, numbers.Integral) or isinstance(ignored, bool):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignored).__name__}")
    if not arguments.is_number(smoothing) or not 0 <= smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {smoothing!r}")
    for name in ("z_loss", "focal_gamma"):
        value = getattr(settings, name)
        if not arguments.is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    if settings.compute_dtype is not None and settings.compute_dtype not in _FLOATING:
        raise ValueError(
            "compute_dtype: expected float16, bfloat16, float32, float64 or None, "
            f"got {settings.compute_dtype!r}"
        )


def check_operands(operands: "Operands", shard: ClassShard | None, sub_centers: int = 1) -> None:
    """Checks types, shapes and devices of the tensors of one call."""
    x, w, y, bias, sample_weight, row_margin, label_weights, _ = operands
    check_factors(x, w, sub_centers, shard)
    n, c = x.shape[0], w.shape[0] // sub_centers  # len would make a constant of a symbol
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        came = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y: expected an int64 tensor, got {came}")
    check_local("y", y)
    if y.ndim not in (1, 2) or y.shape[0] != n or 0 in y.shape[1:]:
        raise ValueError(
            f"y: expected shape ({n},), one label per row of x, or ({n}, L), got {tuple(y.shape)}"
        )
    if y.device != x.device:
        raise ValueError(f"y: expected device {x.device} as x, got {y.device}")
    for name, given, size in (
        ("bias", bias, c),
        ("sample_weight", sample_weight, n),
        ("row_margin", row_margin, n),
    ):
        if given is not None:
            check_tensor(name, given, like=x, shape=(size,))
    if label_weights is not None:
        if y.ndim == 1:
            raise ValueError(f"label_weights: expected None for labels ({n},): see sample_weight")
        check_tensor("label_weights", label_weights, like=x, shape=tuple(y.shape))


def check_factors(x: Tensor, w: Tensor, sub_centers: int, shard: ClassShard | None = None) -> None:
    """Checks embeddings (N, D) and the rows of w, K for each class."""
    check_tensor("x", x)
    check_tensor("w", w, like=x)
    for name, t in (("x", x), ("w", w)):
        if t.ndim != 2:
            raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(t.shape)}")
    (n, d), (c, w_d) = x.shape, w.shape
    if c % sub_centers:
        raise ValueError(f"w: expected {sub_centers} rows for each class (sub_centers), got {c}")
    c //= sub_centers
    if shard is not None and c != shard.size:
        raise ValueError(
            f"w: expected the {shard.size} classes [{shard.start}, {shard.stop}) of the shard, "
            f"got {c}"
        )
    if w_d != d or d == 0 or (c == 0 and shard is None):
        raise ValueError(
            f"w: expected shape (C, {d}) with C, D >= 1 for x of shape ({n}, {d}), got ({c}, {w_d})"
        )


def check_class_weight(
    class_weight: Any,
    num_classes: int,
    label_smoothing: float,
    x: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    """Checks weights of classes, of a head or of a call with x and y, and what goes with them."""
    if class_weight is None:
        return
    check_tensor("class_weight", class_weight, like=x, shape=(num_classes,))
    if class_weight.requires_grad:
        raise ValueError("class_weight: expected constants, got a tensor that requires grad")
    if label_smoothing > 0:
        raise ValueError(
            "class_weight: expected None with label_smoothing, where F.cross_entropy weights the "
            "smoothed classes too, for which a sweep has no weighted sum of logits"
        )
    if y is not None and y.ndim == 2:
        raise ValueError("class_weight: expected None for several labels: see label_weights")


def check_tensor(
    name: str, t: Any, like: Tensor | None = None, shape: tuple[int, ...] | None = None
) -> None:
    """Checks that ``t`` is a floating tensor, of this shape and on the device of ``like``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    check_local(name, t)
    if t.dtype not in _FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {t.dtype}")
    if shape is not None and tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {t.device}")


def check_local(name: str, t: Tensor) -> None:
    """Checks that ``t`` is no DTensor, of which this process may hold a part only."""
    if arguments.is_dtensor(t):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor. MarginSoftmaxHead(..., sharding=mesh)"
            " splits the classes over ranks; of a tensor that fully_shard or another wrapper has "
            "split give the whole, t.full_tensor()"
        )


def check_scale(scale: Any, name: str = "scale") -> None:
    """Checks a number; a tensor's value is checked with the other values."""
    if isinstance(scale, Tensor):
        if scale.ndim != 0 or not scale.is_floating_point():
            raise ValueError(
                f"{name}: expected a 0-d floating tensor, got {scale.dtype} {tuple(scale.shape)}"
            )
    elif not arguments.is_number(scale):
        came = f"the class {scale.__name__}" if isinstance(scale, type) else type(scale).__name__
        raise TypeError(f"{name}: expected a number, 0-d tensor or module, got {came}")
    elif not 0 < scale < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {scale}")


def check_margin(
    margin: nn.Module,
    num_classes: int,
    device: torch.device | None = None,
    row_margin: Tensor | None = None,
) -> MarginHooks:
    """Checks the margin and returns it with all hooks."""
    arguments.module("margin", margin, "ArcFace(0.5)")
    if isinstance(margin, AdaptiveScale):
        raise TypeError(
            f"margin: expected a margin such as ArcFace(0.5), got the scale {type(margin).__name__}"
        )
    hooks = adapted(margin)
    hooks.check(num_classes, device, row_margin)
    return hooks


def _looks_at_all(margin: MarginHooks, observer: AdaptiveScale | None) -> str | None:
    """Names the scale or margin that inspects every cosine, or returns None."""
    if observer is not None:
        return type(observer).__name__
    return name_of(margin) if margin.transforms_negatives else None


def check_cosines(
    margin: MarginHooks, observer: AdaptiveScale | None, normalize: str, bias: bool
) -> None:
    """Checks that losses that inspect every cosine have normalize="both" and no bias."""
    looks = _looks_at_all(margin, observer)
    if observer is not None and margin.transforms_negatives:
        raise ValueError(
            f"scale: expected one that does not adapt with {name_of(margin)}, got {looks}"
        )
    if margin.one_versus_rest and not margin.transforms_negatives:
        raise ValueError(
            f"margin: expected {name_of(margin)}, which is one_versus_rest, to define negatives"
        )
    if looks is not None and normalize != "both":
        raise ValueError(f"normalize: expected 'both' with {looks}, got {normalize!r}")
    if looks is not None and bias:
        raise ValueError(f"bias: expected none with {looks}")


def check_sum(margin: MarginHooks, settings: Settings) -> None:
    """Checks that what changes a softmax cross-entropy is off for a one-versus-rest loss."""
    for name in ("label_smoothing", "z_loss", "focal_gamma"):
        if margin.one_versus_rest and getattr(settings, name) > 0:
            raise ValueError(
                f"{name}: expected 0 with {name_of(margin)}, which is no softmax, got "
                f"{getattr(settings, name)}"
            )


def check_sampling(
    sampling: Sampling | None,
    label_smoothing: float,
    margin: MarginHooks,
    observer: AdaptiveScale | None,
) -> None:
    """Checks that a sample stands for all classes in the sum of exponentials only."""
    if sampling is None:
        return
    if not isinstance(sampling, Sampling):
        raise TypeError(
            f"sampling: expected PartialFC(rate) or None, got {type(sampling).__name__}"
        )
    if label_smoothing > 0 and not sampling.takes_all:
        raise ValueError(f"label_smoothing: expected 0 with a sample, got {label_smoothing}")
    looks = _looks_at_all(margin, observer)
    if sampling.logq and looks is not None:
        raise ValueError(f"logq: expected False with {looks}, which looks at all cosines")


def check_own_generator(sampling: Sampling | None) -> None:
    """Checks that a head's sampling leaves the generator to the head."""
    if sampling is not None and not (isinstance(sampling, PartialFC) and not sampling.generator):
        raise TypeError(
            "sampling: expected PartialFC without a generator, as the head keeps its own, got "
            f"{sampling}"
        )


def check_numbers(dtype: torch.dtype, **values: float | Tensor) -> None:
    """Checks that statistics in ``dtype`` can hold these positive numbers."""
    held = torch.finfo(dtype)
    for name, value in values.items():
        if not isinstance(value, Tensor) and value != 0 and not held.tiny <= value <= held.max:
            raise ValueError(
                f"{name}: expected a number from {held.tiny:g} to {held.max:g} for {dtype}, got "
                f"{value}"
            )


def check_values(call: "Call") -> Tensor:
    """Returns a copy of the labels that waits for the checks of all values."""
    statistics = torch.finfo(call.stats_dtype)  # values have to be finite there too
    label = call.label
    if device_checks.checks_values(label.device):
        label = ops.checked_labels(label, call.num_classes, call.settings.ignore_index)
        norm = torch.linalg.vector_norm(ops.rounded(call.x.detach(), call.compute_dtype), dim=1)
        label = ops.checked(label, norm, 0, numerics.GREATEST_NORM, ops.BAD_X)
    if isinstance(call.scale, Tensor):
        what = "scale: expected a finite number > 0"
        label = _checked(label, call.scale, statistics.tiny, statistics.max, what)
    if call.bias is not None:
        what = "bias: expected finite numbers, or -inf for classes to leave out"
        low = -math.inf
        if call.settings.label_smoothing > 0:
            what, low = "bias: expected finite numbers with label_smoothing", statistics.min
        label = _checked(label, call.bias, low, statistics.max, what)
    if call.sample_weight is not None:
        what = "sample_weight: expected finite weights >= 0"
        label = _checked(label, call.sample_weight, 0, statistics.max, what)
    if call.class_weight is not None:
        what = "class_weight: expected finite weights >= 0"
        label = _checked(label, call.class_weight, 0, statistics.max, what)
    if call.label_weights is not None:
        what = "label_weights: expected finite weights >= 0"
        label = _checked(label, call.label_weights, 0, statistics.max, what)
    bounded = call.margin.bounded(call.row_margin)
    if bounded is not None:
        low, high = max(bounded.low, statistics.min), min(bounded.high, statistics.max)
        label = _checked(label, bounded.value, low, high, bounded.expected)
    return label


def _checked(label: Tensor, value: Tensor, low: float, high: float, what: str) -> Tensor:
    if not device_checks.checks_values(value.device):
        return label
    return ops.checked(label, value.detach(), low, high, what)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    # by identity first, because 1 == True
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
