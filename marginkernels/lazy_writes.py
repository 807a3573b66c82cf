# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Refuses to write to a tensor that is computed from others: what it stands for would not change.

Nor would what shares storage with it, such as ``z.detach()``, which holds factors of its own.
"""

from typing import Any

from torch.utils._pytree import tree_leaves

_ITEMS = {
    "__setitem__", "__set__", "__delitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__",
    "__idiv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__",
    "__ilshift__", "__irshift__",
}  # fmt: skip


def refuse(cls: type, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises if a function of Python, or an op, writes to an argument of this class."""
    name = getattr(func, "__name__", str(func)).partition(".")[0]
    written = [kwargs.get("out")]
    # collectives tell it by their name alone
    if name in _ITEMS or (name[-1:] == "_" and name[-2:] != "__") or kwargs.get("inplace") is True:
        written.append(args[:1])
    schema = getattr(func, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    if any(isinstance(t, cls) for t in tree_leaves(written)):
        raise RuntimeError(
            f"{name}: a {cls.__name__} is computed from x and w, and cannot be written to. "
            "tensor() gives a tensor that can"
        )
