# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Checks single arguments of constructors. Each error says name, expected and got."""

import math
import numbers
import warnings
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def is_number(value: Any) -> TypeGuard[float]:
    """Returns whether a value is a real number, of Python or numpy, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    """Returns the value as a float if it is a finite number in the given range.

    The range starts at ``least``, or just above ``above``, and ends at ``most``, or just below
    ``below``.

    Raises:
        TypeError: the value is no number.
        ValueError: it is out of range.
    """
    if most == below == math.inf:
        expected = "a finite number"
        if least is not None or above > -math.inf:
            expected += f" > {above:g}" if least is None else f" >= {least:g}"
    else:
        low = f"({above:g}" if least is None else f"[{least:g}"
        expected = f"a number in {low}, " + (f"{below:g})" if most == math.inf else f"{most:g}]")
    if not is_number(value):
        raise TypeError(f"{name}: expected {expected}, got {_shown(value)}")
    above_low = value > above if least is None else value >= least
    below_high = value <= most if most < math.inf else value < below
    if not (above_low and below_high):
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return float(value)


def integer(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Returns the value as an int if it is an integer from ``least`` to ``most``.

    Raises:
        TypeError: the value is no integer.
        ValueError: it is out of range.
    """
    expected = f"an integer in [{least}, {most}]"
    if most is None:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {_shown(value)}")
    whole = int(value)
    if whole < least or (most is not None and whole > most):
        raise ValueError(f"{name}: expected {expected}, got {value}")
    return whole


def boolean(name: str, value: Any) -> None:
    """Raises TypeError unless the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {_shown(value)}")


def module(name: str, value: Any, example: str) -> None:
    """Raises TypeError unless the value is a module, and not its class."""
    if isinstance(value, type):
        raise TypeError(
            f"{name}: expected an instance such as {example}, got the class {value.__name__}"
        )
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module such as {example}, got {_shown(value)}")


def trainable(name: str, value: Any) -> None:
    """Raises ValueError for a tensor that no optimizer of the module's parameters will train."""
    if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
        raise ValueError(
            f"{name}: expected torch.nn.Parameter({name}), which is trained and saved, got a plain "
            "tensor that requires grad"
        )


def replace(owner: nn.Module, name: str, value: Any) -> None:
    """Makes room for a value that is about to be assigned to an attribute of a module.

    A number, tensor or module may take the place of another kind. A plain tensor will be a buffer.
    ``owner._given_<name>`` becomes what :func:`kept` returns for the value.

    Raises:
        TypeError: a number would take the place of a tensor.
        ValueError: the value is not :func:`trainable`.
    """
    homes: tuple[tuple[type, dict[str, Any]], ...] = (
        (nn.Parameter, owner._parameters),
        (Tensor, owner._buffers),
        (nn.Module, owner._modules),
        (numbers.Real, owner.__dict__),
    )
    # FullyShardedDataParallel takes a parameter out, and then sets views of its own
    if f"_given_{name}" in owner.__dict__ and not any(name in entries for _, entries in homes):
        return
    now = owner._parameters.get(name, owner._buffers.get(name))
    if now is not None and isinstance(value, numbers.Real):
        raise TypeError(
            f"{name}: expected a tensor, as it is one now, got {value}: fill it, "
            f"{name}.data.fill_({value}), or delete it before you assign a number"
        )
    trainable(name, value)
    home = next((entries for kind, entries in homes if isinstance(value, kind)), None)
    if home is None:
        return
    for _, entries in homes:
        if entries is not home:
            entries.pop(name, None)
    if home is owner._buffers and name not in home:
        owner.register_buffer(name, None)
    # fully_shard puts a whole parameter in the place of its part, and back, at each step
    if not any(is_dtensor(tensor) for tensor in (now, value)):
        setattr(owner, f"_given_{name}", kept(value))


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} {value!r}" if isinstance(value, str | bool | numbers.Real) else kind


def kept(value: Any) -> Tensor | None:
    """Returns a copy of a tensor, for :func:`restore`, and None for anything else."""
    if not isinstance(value, Tensor):
        return None
    return value.detach() if value.is_meta else value.detach().cpu().clone()


@torch.no_grad()
def restore(name: str, tensor: Any, given: Tensor | None) -> None:
    """Fills a tensor that may have lost its values with the copy that :func:`kept` made.

    A tensor that was given on the meta device is filled with NaN, which no call takes for a value,
    and a warning says so. A tensor of another shape stays as it is.
    """
    if given is None or not isinstance(tensor, Tensor) or tensor.shape != given.shape:
        return
    if given.is_meta:
        warnings.warn(
            f"{name}: NaN until it is filled or loaded, because it was given on the meta device, "
            "where it has no values",
            stacklevel=3,
        )
        given = torch.full_like(tensor, math.nan)
    tensor.copy_(given)


def is_dtensor(value: object) -> bool:
    """Returns whether the value is a DTensor, of which this process may hold a part only."""
    return hasattr(value, "device_mesh")  # torch.compile says of ``to_local`` that it is not there


def reset_inside(owner: nn.Module) -> None:
    """Calls ``reset_parameters`` of every module inside ``owner`` that has one."""
    for module in owner.modules():
        reset = getattr(module, "reset_parameters", None)
        if module is not owner and callable(reset):
            reset()
