# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the calls of margin_cross_entropy that have to be refused, and what the errors say."""

import math
from typing import Any

import torch
from torch import Tensor

from marginkernels import ArcFace, CosFace, NSoftmax, ParametricMargin, X2Softmax

N, C, D = 6, 11, 5


def operands() -> dict[str, Any]:
    """Returns the arguments of a good call."""
    return dict(
        x=torch.randn(N, D),
        w=torch.randn(C, D),
        y=torch.randint(0, C, (N,)),
        margin=ArcFace(0.5),
        scale=64.0,
    )


def row(values: Tensor, index: Any, value: Any) -> Tensor:
    """Returns a copy of ``values`` with another value at an index."""
    values = values.clone()
    values[index] = value
    return values


def changed(margin: ParametricMargin, m: Any) -> ParametricMargin:
    """Sets a margin past the checks of its constructor, as training may."""
    if isinstance(margin.m, torch.Tensor):
        margin.m.fill_(m)
    else:
        margin.m = m
    return margin


class Unbounded(ParametricMargin):
    """Subtracts a number of any size, as a margin of a user's own may."""

    def target(self, c: Tensor, m: float | Tensor) -> Tensor:
        return c - m


class Split(torch.Tensor):
    """Has the attributes that a DTensor is known by."""

    device_mesh = None

    @staticmethod
    def __new__(cls, *shape: int) -> "Split":
        return torch.zeros(*shape).as_subclass(cls)

    def to_local(self) -> "Split":
        return self


class Returns(torch.nn.Module):
    """Returns one value for any cosines, and is no margin."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any) -> Any:
        return self.value


# what is changed in a good call, the error, and words that its message must hold
BAD = {
    "y float": (lambda a: dict(y=a["y"].float()), TypeError, ["y:", "int64", "float32"]),
    "y int32": (lambda a: dict(y=a["y"].int()), TypeError, ["y:", "int64", "int32"]),
    "y list": (lambda a: dict(y=a["y"].tolist()), TypeError, ["y:", "int64", "list"]),
    "y shape": (
        lambda a: dict(y=a["y"][:, None, None]),
        ValueError,
        ["y:", f"({N},)", f"({N}, L)", f"({N}, 1, 1)"],
    ),
    "y too large": (
        lambda a: dict(y=row(a["y"], 2, C)),
        ValueError,
        ["y:", f"[0, {C})", f"got {C} in row 2"],
    ),
    "y negative": (
        lambda a: dict(y=row(a["y"], 4, -1)),
        ValueError,
        ["y:", "got -1 in row 4", "-100"],
    ),
    "y device": (lambda a: dict(y=a["y"].to("meta")), ValueError, ["y:", "cpu", "meta"]),
    "x integer": (
        lambda a: dict(x=torch.ones(N, D, dtype=torch.int32)),
        TypeError,
        ["x:", "float32", "int32"],
    ),
    "x complex": (
        lambda a: dict(x=a["x"].to(torch.complex64)),
        TypeError,
        ["x:", "float32", "complex64"],
    ),
    "x array": (lambda a: dict(x=a["x"].numpy()), TypeError, ["x:", "tensor", "ndarray"]),
    "x 3-d": (lambda a: dict(x=a["x"][None]), ValueError, ["x:", "2 dimensions", f"(1, {N}, {D})"]),
    "x nan": (lambda a: dict(x=row(a["x"], (1, 1), math.nan)), ValueError, ["x:", "finite", "nan"]),
    "x inf": (lambda a: dict(x=row(a["x"], (1, 1), math.inf)), ValueError, ["x:", "finite", "inf"]),
    "x huge": (lambda a: dict(x=1e16 * a["x"]), ValueError, ["x:", "1e+15", "e+16"]),
    "x overflows fp16": (
        lambda a: dict(x=1e5 * a["x"], compute_dtype=torch.float16),
        ValueError,
        ["x:", "finite", "inf"],
    ),
    "w integer": (lambda a: dict(w=a["w"].long()), TypeError, ["w:", "float32", "int64"]),
    "w columns": (
        lambda a: dict(w=a["w"][:, 1:]),
        ValueError,
        ["w:", f"(C, {D})", f"({C}, {D - 1})"],
    ),
    "w none": (lambda a: dict(w=None), TypeError, ["w:", "tensor", "NoneType"]),
    "shard number": (lambda a: dict(shard=3), TypeError, ["shard:", "ClassShard", "int"]),
    "w empty": (lambda a: dict(w=a["w"][:0]), ValueError, ["w:", "C, D >= 1", f"(0, {D})"]),
    "w device": (lambda a: dict(w=a["w"].to("meta")), ValueError, ["w:", "cpu", "meta"]),
    "w 1-d": (lambda a: dict(w=a["w"][0]), ValueError, ["w:", "2 dimensions", f"({D},)"]),
    "w nan": (
        lambda a: dict(w=row(a["w"], (C - 1, 0), math.nan)),
        ValueError,
        ["w:", "finite", "nan"],
    ),
    "w huge": (lambda a: dict(w=row(a["w"], 0, 3e15)), ValueError, ["w:", "1e+15", "e+15"]),
    "w inf": (lambda a: dict(w=row(a["w"], 0, math.inf)), ValueError, ["w:", "finite", "inf"]),
    "w overflows fp16": (
        lambda a: dict(w=1e5 * a["w"], compute_dtype=torch.float16),
        ValueError,
        ["w:", "finite", "inf"],
    ),
    "bias shape": (
        lambda a: dict(bias=torch.zeros(C + 1)),
        ValueError,
        ["bias:", f"({C},)", f"({C + 1},)"],
    ),
    "bias nan": (
        lambda a: dict(bias=row(torch.zeros(C), 1, math.nan)),
        ValueError,
        ["bias:", "finite", "nan"],
    ),
    "bias inf": (
        lambda a: dict(bias=row(torch.zeros(C), 1, math.inf)),
        ValueError,
        ["bias:", "finite", "inf"],
    ),
    "bias beyond fp32": (
        lambda a: dict(bias=row(torch.zeros(C).double(), 1, 1e39)),
        ValueError,
        ["bias:", "finite", "1e+39"],
    ),
    "bias -inf with smoothing": (
        lambda a: dict(bias=row(torch.zeros(C), 1, -math.inf), label_smoothing=0.1),
        ValueError,
        ["bias:", "label_smoothing", "-inf"],
    ),
    "bias DTensor": (lambda a: dict(bias=Split(C)), TypeError, ["bias:", "DTensor", "full_tens"]),
    "x DTensor": (lambda a: dict(x=Split(N, D)), TypeError, ["x:", "DTensor", "full_tensor"]),
    "w DTensor": (lambda a: dict(w=Split(C, D)), TypeError, ["w:", "DTensor", "sharding=mesh"]),
    "y DTensor": (lambda a: dict(y=Split(N).long()), TypeError, ["y:", "DTensor", "full_tensor"]),
    "sample_weight beyond fp32": (
        lambda a: dict(sample_weight=row(torch.ones(N).double(), 1, 1e39)),
        ValueError,
        ["sample_weight:", "finite", "1e+39"],
    ),
    "row_margin beyond fp32": (
        lambda a: dict(row_margin=row(torch.ones(N).double(), 1, 1e39), margin=Unbounded(0.0)),
        ValueError,
        ["row_margin:", "Unbounded", "1e+39"],
    ),
    "sample_weight shape": (
        lambda a: dict(sample_weight=torch.ones(1)),
        ValueError,
        ["sample_weight:", f"({N},)"],
    ),
    "sample_weight integer": (
        lambda a: dict(sample_weight=torch.ones(N, dtype=torch.int64)),
        TypeError,
        ["sample_weight:", "float32", "int64"],
    ),
    "sample_weight nan": (
        lambda a: dict(sample_weight=row(torch.ones(N), 2, math.nan)),
        ValueError,
        ["sample_weight:", "finite", "nan"],
    ),
    "sample_weight negative": (
        lambda a: dict(sample_weight=row(torch.ones(N), 0, -0.5)),
        ValueError,
        ["sample_weight:", ">= 0", "-0.5"],
    ),
    "row_margin shape": (
        lambda a: dict(row_margin=torch.zeros(C)),
        ValueError,
        ["row_margin:", f"({N},)"],
    ),
    "row_margin range": (
        lambda a: dict(row_margin=row(torch.zeros(N), 3, 3.2)),
        ValueError,
        ["row_margin:", "[0, 3.14", "3.2"],
    ),
    "row_margin nan": (
        lambda a: dict(row_margin=row(torch.zeros(N), 3, math.nan)),
        ValueError,
        ["row_margin:", "[0, 3.14", "nan"],
    ),
    "row_margin inf": (
        lambda a: dict(margin=X2Softmax(), row_margin=row(torch.zeros(N), 3, math.inf)),
        ValueError,
        ["row_margin:", "[-10000, 10000]", "inf"],
    ),
    "row_margin device": (
        lambda a: dict(row_margin=torch.zeros(N, device="meta")),
        ValueError,
        ["row_margin:", "cpu", "meta"],
    ),
    "row_margin unused": (
        lambda a: dict(row_margin=torch.zeros(N), margin=NSoftmax()),
        ValueError,
        ["row_margin:", "NSoftmax"],
    ),
    "margin class": (
        lambda a: dict(margin=ArcFace),
        TypeError,
        ["margin:", "instance", "the class ArcFace"],
    ),
    "scale class": (lambda a: dict(scale=NSoftmax), TypeError, ["scale:", "the class NSoftmax"]),
    "margin bool": (lambda a: dict(margin=changed(ArcFace(0.5), True)), TypeError, ["m:", "bool"]),
    "ignore_index bool": (lambda a: dict(ignore_index=True), TypeError, ["ignore_index:", "bool"]),
    "margin number": (lambda a: dict(margin=0.5), TypeError, ["margin:", "nn.Module", "float"]),
    "margin table": (
        lambda a: dict(margin=ArcFace(torch.zeros(C - 1))),
        ValueError,
        ["margin:", f"{C}", f"{C - 1}"],
    ),
    "margin table range": (
        lambda a: dict(margin=changed(ArcFace(torch.zeros(C)), 4.0)),
        ValueError,
        ["margin:", "ArcFace", "[0, 3.14", "got 4"],
    ),
    "margin 0-d range": (
        lambda a: dict(margin=changed(CosFace(torch.zeros(())), -2.1)),
        ValueError,
        ["margin:", "CosFace", "[-2, 2]", "-2.1"],
    ),
    "margin number range": (
        lambda a: dict(margin=changed(ArcFace(0.5), 4)),
        ValueError,
        ["ArcFace", "[0, 3.14", "got 4"],
    ),
    "margin text": (
        lambda a: dict(margin=changed(ArcFace(0.5), "0.4")),
        TypeError,
        ["m:", "number", "str"],
    ),
    "margin device": (
        lambda a: dict(margin=ArcFace(torch.zeros(C, device="meta"))),
        ValueError,
        ["margin:", "cpu", "meta"],
    ),
    "margin result": (
        lambda a: dict(margin=Returns(torch.zeros(N, 1))),
        ValueError,
        ["margin:", "Returns", f"({N},)", f"({N}, 1)"],
    ),
    "scale bool": (lambda a: dict(scale=True), TypeError, ["scale:", "number", "bool"]),
    "scale zero": (lambda a: dict(scale=0.0), ValueError, ["scale:", "> 0", "got 0"]),
    "scale inf": (lambda a: dict(scale=math.inf), ValueError, ["scale:", "finite", "inf"]),
    "scale nan": (lambda a: dict(scale=math.nan), ValueError, ["scale:", "> 0", "nan"]),
    "scale beyond fp32": (lambda a: dict(scale=1e39), ValueError, ["scale:", "3.4", "1e+39"]),
    "scale below fp32": (lambda a: dict(scale=1e-39), ValueError, ["scale:", "1.17", "1e-39"]),
    "scale tensor beyond fp32": (
        lambda a: dict(scale=torch.tensor(1e39, dtype=torch.float64)),
        ValueError,
        ["scale:", "finite", "1e+39"],
    ),
    "z_loss beyond fp32": (lambda a: dict(z_loss=1e39), ValueError, ["z_loss:", "3.4", "1e+39"]),
    "focal_gamma beyond fp32": (
        lambda a: dict(focal_gamma=1e39),
        ValueError,
        ["focal_gamma:", "3.4", "1e+39"],
    ),
    "scale tensor negative": (
        lambda a: dict(scale=torch.tensor(-2.0)),
        ValueError,
        ["scale:", "> 0", "-2"],
    ),
    "scale tensor nan": (
        lambda a: dict(scale=torch.tensor(math.nan)),
        ValueError,
        ["scale:", "> 0", "nan"],
    ),
    "scale module": (
        lambda a: dict(scale=Returns(torch.tensor(0.0))),
        ValueError,
        ["scale:", "> 0", "got 0"],
    ),
    "scale vector": (lambda a: dict(scale=torch.ones(2)), ValueError, ["scale:", "0-d", "(2,)"]),
    "scale text": (lambda a: dict(scale="64"), TypeError, ["scale:", "str"]),
    "normalize": (lambda a: dict(normalize="rows"), ValueError, ["normalize:", "weight", "rows"]),
    "reduction": (lambda a: dict(reduction="avg"), ValueError, ["reduction:", "mean", "avg"]),
    "label_smoothing": (
        lambda a: dict(label_smoothing=1.5),
        ValueError,
        ["label_smoothing:", "[0, 1)", "1.5"],
    ),
    "label_smoothing text": (
        lambda a: dict(label_smoothing="0.1"),
        ValueError,
        ["label_smoothing:", "number", "'0.1'"],
    ),
    "ignore_index": (
        lambda a: dict(ignore_index=None),
        TypeError,
        ["ignore_index:", "integer", "NoneType"],
    ),
    "compute_dtype": (
        lambda a: dict(compute_dtype=torch.int8),
        ValueError,
        ["compute_dtype:", "int8"],
    ),
    "compute_dtype narrow": (
        lambda a: dict(x=a["x"].double(), compute_dtype=torch.float32),
        ValueError,
        ["compute_dtype:", "float64", "float32"],
    ),
    "save_tiles": (lambda a: dict(save_tiles="yes"), ValueError, ["save_tiles:", "auto", "yes"]),
    "save_tiles impossible": (
        lambda a: dict(
            save_tiles=True, normalize="none", scale=80.0, label_smoothing=0.1, backend="reference"
        ),
        ValueError,
        ["save_tiles:", "normalize", "73", "label_smoothing", "reference"],
    ),
    "return_stats": (lambda a: dict(return_stats="yes"), TypeError, ["return_stats:", "bool"]),
    "sampling": (lambda a: dict(sampling=0.5), TypeError, ["sampling:", "PartialFC", "float"]),
    "backend list": (lambda a: dict(backend=[]), ValueError, ["backend:", "reference", "[]"]),
    "backend": (lambda a: dict(backend="cudnn"), ValueError, ["backend:", "'auto'", "cudnn"]),
}
