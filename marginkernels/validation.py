# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Bad input gets a clear error before anything is computed.

Shapes, dtypes, devices and Python numbers are always checked. Values in tensors are checked where
that costs no synchronisation: on the CPU always, elsewhere only after ``set_device_checks(True)``
or with MARGINKERNELS_CHECK=1 in the environment.
"""

import math
import numbers
import os

import torch
from torch import Tensor

from . import arguments, numerics, ops
from .margins import InterClassFilter, Margin

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_device_checks = os.environ.get("MARGINKERNELS_CHECK", "0") == "1"


def set_device_checks(enabled: bool) -> None:
    """Whether values of tensors on an accelerator are checked too; each check waits for it."""
    global _device_checks
    _device_checks = bool(enabled)


def checks_values(device: torch.device) -> bool:
    """Whether the values of tensors on this device are looked at."""
    return device.type == "cpu" or _device_checks


def check_settings(
    normalize, reduction, ignore_index, label_smoothing, z_loss, focal_gamma, compute_dtype,
    save_tiles,
) -> None:  # fmt: skip
    """What does not depend on the operands of a call."""
    _check_choice("normalize", normalize, ("both", "weight", "none"))
    _check_choice("reduction", reduction, ("mean", "sum", "none"))
    _check_choice("save_tiles", save_tiles, ("auto", True, False))
    if not isinstance(ignore_index, numbers.Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
    if not arguments.is_number(label_smoothing) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing!r}")
    for name, value in (("z_loss", z_loss), ("focal_gamma", focal_gamma)):
        if not arguments.is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    if compute_dtype is not None and compute_dtype not in _FLOATING:
        raise ValueError(
            "compute_dtype: expected float16, bfloat16, float32, float64 or None, "
            f"got {compute_dtype!r}"
        )


def check_operands(x, w, y, bias, sample_weight, row_margin, shard) -> None:
    """Types, shapes and devices of the tensors of one call."""
    check_tensor("x", x)
    check_tensor("w", w, like=x)
    for name, t in (("x", x), ("w", w)):
        if t.ndim != 2:
            raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(t.shape)}")
    (n, d), (c, w_d) = x.shape, w.shape
    if shard is not None and c != shard.size:
        raise ValueError(
            f"w: expected the {shard.size} classes [{shard.start}, {shard.stop}) of the shard, "
            f"got {c}"
        )
    if w_d != d or d == 0 or (c == 0 and shard is None):
        raise ValueError(
            f"w: expected shape (C, {d}) with C, D >= 1 for x of shape ({n}, {d}), got ({c}, {w_d})"
        )
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        came = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y: expected an int64 tensor, got {came}")
    check_local("y", y)
    if tuple(y.shape) != (n,):
        raise ValueError(f"y: expected shape ({n},), one label per row of x, got {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y: expected device {x.device} as x, got {y.device}")
    for name, t, size in (
        ("bias", bias, c),
        ("sample_weight", sample_weight, n),
        ("row_margin", row_margin, n),
    ):
        if t is not None:
            check_tensor(name, t, like=x, shape=(size,))


def check_tensor(name: str, t, like: Tensor | None = None, shape: tuple | None = None) -> None:
    """A floating tensor, where given of this shape and on the device of ``like``."""
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
    """Not a DTensor, of which this process may hold a part only."""
    if hasattr(t, "to_local"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor. MarginSoftmaxHead(..., device_mesh=) "
            "splits the classes over ranks; of a tensor that fully_shard or another wrapper has "
            "split give the whole, t.full_tensor()"
        )


def check_scale(scale, name: str = "scale") -> None:
    """A number is checked here, a tensor's value with the other values."""
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


def check_margin(margin, row_margin, num_classes: int, device: torch.device | None = None) -> None:
    """Type, shape and device of the margin, and its value where it is a number."""
    arguments.module("margin", margin, "ArcFace(0.5)")
    margin = _inner(margin)
    if row_margin is not None and not getattr(margin, "takes_row_margin", True):
        raise ValueError(f"row_margin: expected None for {type(margin).__name__}, which has no m")
    if not isinstance(margin, Margin):
        return
    margin.check_type()
    if not isinstance(margin.m, Tensor):
        margin.check_range()
    elif margin.m.ndim == 1:
        if margin.m.shape[0] != num_classes:
            raise ValueError(
                f"margin: expected a table of {num_classes} classes, got {margin.m.shape[0]}"
            )
        if device not in (None, margin.m.device):
            raise ValueError(f"margin: expected a table on {device} as x, got {margin.m.device}")


def check_cosines(margin, scale, normalize: str, bias: bool) -> None:
    """What looks at all cosines needs logits that are scale times a cosine."""
    adapts = isinstance(scale, torch.nn.Module) and getattr(scale, "adapts", False)
    transforms = hasattr(margin, "negatives")
    if adapts and transforms:
        raise ValueError(
            f"scale: expected one that does not adapt with {type(margin).__name__}, got "
            f"{type(scale).__name__}"
        )
    needs = scale if adapts else margin if transforms else None
    if needs is not None and normalize != "both":
        raise ValueError(
            f"normalize: expected 'both' with {type(needs).__name__}, got {normalize!r}"
        )
    if needs is not None and bias:
        raise ValueError(f"bias: expected none with {type(needs).__name__}")


def check_sampling(sample_rate, logq, sampler, generator, label_smoothing, margin, scale) -> None:
    """A sample stands for all classes in the sum of exponentials only."""
    if not arguments.is_number(sample_rate) or not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate: expected a number in (0, 1], got {sample_rate!r}")
    if sampler is not None and not callable(sampler):
        raise TypeError(f"sampler: expected a function of labels, got {type(sampler).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None, got {type(generator).__name__}"
        )
    arguments.boolean("logq", logq)
    if (sample_rate < 1 or sampler is not None) and label_smoothing > 0:
        raise ValueError(f"label_smoothing: expected 0 with a sample, got {label_smoothing}")
    looks = scale if getattr(scale, "adapts", False) else margin
    if logq and (looks is scale or hasattr(margin, "negatives")):
        raise ValueError(
            f"logq: expected False with {type(looks).__name__}, which looks at all cosines"
        )


def check_numbers(dtype: torch.dtype, **values) -> None:
    """Positive numbers that statistics in ``dtype`` can hold."""
    held = torch.finfo(dtype)
    for name, value in values.items():
        if not isinstance(value, Tensor) and value != 0 and not held.tiny <= value <= held.max:
            raise ValueError(
                f"{name}: expected a number from {held.tiny:g} to {held.max:g} for {dtype}, got "
                f"{value}"
            )


def check_values(
    y, num_classes, ignore_index, x_norm, scale, bias, label_smoothing, margin, row_margin,
    sample_weight,
) -> Tensor:  # fmt: skip
    """Copy of the labels that waits for the checks of all values."""
    statistics = torch.finfo(x_norm.dtype)  # values have to be finite there too
    label = y
    if checks_values(y.device):
        label = ops.checked_labels(y, num_classes, ignore_index)
    label = _checked(label, x_norm, 0, numerics.GREATEST_NORM, ops.BAD_X)
    if isinstance(scale, Tensor):
        what = "scale: expected a finite number > 0"
        label = _checked(label, scale, statistics.tiny, statistics.max, what)
    if bias is not None:
        what = "bias: expected finite numbers, or -inf for classes to leave out"
        low = -math.inf
        if label_smoothing > 0:
            what, low = "bias: expected finite numbers with label_smoothing", statistics.min
        label = _checked(label, bias, low, statistics.max, what)
    if sample_weight is not None:
        what = "sample_weight: expected finite weights >= 0"
        label = _checked(label, sample_weight, 0, statistics.max, what)
    margin = _inner(margin)
    if isinstance(margin, Margin):
        m, name = (margin.m, "margin") if row_margin is None else (row_margin, "row_margin")
        if isinstance(m, Tensor):
            what = f"{name}: expected {type(margin).__name__}'s m in {margin.interval.text}"
            low = max(margin.interval.first, statistics.min)
            high = min(margin.interval.last, statistics.max)
            label = _checked(label, m, low, high, what)
    return label


def _inner(margin):
    """The margin that has the m."""
    return margin.margin if isinstance(margin, InterClassFilter) else margin


def _checked(label: Tensor, value: Tensor, low: float, high: float, what: str) -> Tensor:
    if not checks_values(value.device):
        return label
    return ops.checked(label, value.detach(), low, high, what)


def _check_choice(name: str, value, allowed: tuple) -> None:
    # by identity first, because 1 == True
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
