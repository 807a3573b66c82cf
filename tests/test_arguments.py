# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tests that constructors say in one sentence what they expected and what they got."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from marginkernels import (
    AdaCos,
    AdaFace,
    AdaMSoftmax,
    AirFace,
    ArcFace,
    ArcNegFace,
    ASoftmax,
    Circle,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    InterClassFilter,
    InterTopK,
    LSoftmax,
    MagFace,
    MarginSchedule,
    MarginSoftmaxHead,
    MVSoftmax,
    NSoftmax,
    Sharding,
    SphereFace,
    SphereFace2,
    TripletLoss,
    UnifiedCE,
    X2Softmax,
    margin_cross_entropy,
    margins_from_counts,
)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ArcFace(math.pi), ["ArcFace", "[0, 3.14", "3.14"]),
        (lambda: ArcFace(-0.1), ["ArcFace", "-0.1"]),
        (lambda: ArcFace(28.6), ["ArcFace", "28.6"]),
        (lambda: ArcFace(math.nan), ["ArcFace", "nan"]),
        (lambda: CosFace(torch.tensor([0.1, 2.5])), ["CosFace", "[-2, 2]", "2.5"]),
        (lambda: SphereFace(0.5), ["SphereFace", "[1, 10000]", "0.5"]),
        (lambda: X2Softmax(k=math.inf), ["X2Softmax", "[-10000, 10000]", "inf"]),
        (lambda: X2Softmax(a=-math.inf), ["a:", "[-10000, 0)", "inf"]),
        (lambda: CosFace(torch.zeros(2, 2)), ["m:", "(num_classes,)", "(2, 2)"]),
        (lambda: CosFace(torch.zeros(0)), ["m:", "(num_classes,)", "(0,)"]),
        (lambda: CosFace(torch.tensor(1)), ["m:", "floating", "int64"]),
        (lambda: ArcFace(0.5, branch="soft"), ["branch:", "hard", "soft"]),
        (lambda: CombinedMargin(1.2, 0.3, branch="hard"), ["branch:", "monotone", "hard"]),
        (lambda: MVSoftmax(branch="hard"), ["branch:", "'above_m'", "'am'", "hard"]),
        (lambda: MVSoftmax(kind="arc", branch="above_m"), ["branch:", "'keep'", "above_m"]),
        (lambda: Circle(1.5), ["Circle", "[0, 1]", "1.5"]),
        (lambda: CombinedMargin(0.0), ["m1:", "> 0", "got 0"]),
        (lambda: ElasticFace(seed=-1), ["seed:", "[0, 9223372036854775807]", "-1"]),
        (lambda: CombinedMargin(m3=-1.0), ["m3:", "[0, 2]", "-1"]),
        (lambda: ArcFace(0.5, gradient="ste"), ["gradient:", "straight_through", "ste"]),
        (
            lambda: MarginSoftmaxHead(0, 5, margin=ArcFace(), scale=1.0),
            ["embedding_size:", "positive", "0"],
        ),
        (
            lambda: MarginSoftmaxHead(4, 5, margin=ArcFace(torch.zeros(4)), scale=1.0),
            ["margin:", "5", "4"],
        ),
        (lambda: MarginSoftmaxHead(4, 5, margin=ArcFace(), scale=-1.0), ["scale:", "-1"]),
        (
            lambda: MarginSoftmaxHead(4, 5, margin=ArcFace(), scale=1.0, normalize="w"),
            ["normalize:", "'w'"],
        ),
        (
            lambda: MarginSoftmaxHead(4, 5, margin=ArcFace(), scale=1.0).topk(torch.zeros(2, 4), 6),
            ["k:", "[1, 5]", "6"],
        ),
        (
            lambda: MarginSoftmaxHead(4, 5, margin=ArcFace(), scale=1.0).logits(torch.zeros(2, 3)),
            ["embeddings:", "(N, 4)"],
        ),
    ],
)
def test_settings_out_of_range(make, words):
    with pytest.raises(ValueError) as raised:
        make()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


def head(embedding_size=4, num_classes=5, **settings):
    settings = dict(margin=ArcFace(), scale=8.0) | settings
    return MarginSoftmaxHead(embedding_size, num_classes, **settings)


def schedule(**settings):
    return MarginSchedule(ArcFace(0.1), **dict(final=0.5, finish=10) | settings)


def counts(**settings):
    return margins_from_counts(torch.tensor([1, 5]), **settings)


# constructors, with what they need, and those of their arguments that are numbers
NUMBERS = {
    AdaFace: ({}, ["m", "h", "t_alpha"]),
    AirFace: ({}, ["m"]),
    ArcFace: ({}, ["m"]),
    ArcNegFace: ({}, ["m", "alpha", "sigma"]),
    ASoftmax: ({}, ["base", "gamma", "power", "low"]),
    Circle: ({}, ["m"]),
    CombinedMargin: ({}, ["m1", "m3"]),
    CosFace: ({}, ["m"]),
    CurricularFace: ({}, ["m", "alpha"]),
    ElasticFace: ({}, ["m", "std"]),
    InterClassFilter: (dict(margin=CosFace()), ["threshold"]),
    InterTopK: (dict(margin=CosFace()), ["penalty"]),
    LSoftmax: ({}, ["base", "gamma", "power", "low"]),
    MagFace: ({}, ["l_a", "u_a", "l_m", "u_m", "lambda_g"]),
    MVSoftmax: ({}, ["m", "t"]),
    SphereFace: ({}, ["m"]),
    SphereFace2: ({}, ["m", "balance", "bias", "weight"]),
    UnifiedCE: (dict(num_classes=5), ["m", "negative", "rate"]),
    X2Softmax: ({}, ["a", "h"]),
    AdaMSoftmax: (dict(num_classes=5), ["weight"]),
    TripletLoss: ({}, ["margin"]),
    counts: ({}, ["low", "high", "power"]),
    schedule: ({}, ["initial", "final"]),
    head: ({}, ["scale"]),
}
INTEGERS = {
    ASoftmax: ({}, ["m"]),
    InterTopK: (dict(margin=CosFace()), ["top_k"]),
    LSoftmax: ({}, ["m"]),
    AdaMSoftmax: ({}, ["num_classes"]),
    AdaCos: ({}, ["num_classes"]),
    SphereFace2: ({}, ["t"]),
    UnifiedCE: ({}, ["num_classes"]),
    ElasticFace: ({}, ["seed"]),
    TripletLoss: ({}, ["block_rows", "ignore_index"]),
    schedule: ({}, ["start", "finish"]),
    head: ({}, ["embedding_size", "num_classes", "ignore_index"]),
}


def arguments(table):
    return [
        pytest.param(make, given, name, id=f"{make.__name__} {name}")
        for make, (given, names) in table.items()
        for name in names
    ]


def refused(error, words, function, *args, **settings):
    with pytest.raises(error) as refusal:
        function(*args, **settings)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("make, given, name", arguments(NUMBERS))
def test_numbers(make, given, name):
    for wrong, came in (("0.5", "str"), (None, "NoneType"), (True, "bool"), ([0.5], "list")):
        refused(TypeError, [f"{name}: expected", "number", came], make, **given, **{name: wrong})
    refused(ValueError, [name, "got nan"], make, **given, **{name: math.nan})


@pytest.mark.parametrize("make, given, name", arguments(INTEGERS))
def test_integers(make, given, name):
    for wrong, came in (("3", "str"), (True, "bool"), (3.0, "float")):
        refused(TypeError, [f"{name}: expected", "integer", came], make, **given, **{name: wrong})
    made = make(**given, **{name: np.int64(4)})
    assert getattr(made, name, 4) == 4


@pytest.mark.parametrize("make", [ArcFace, MagFace, ElasticFace, X2Softmax, CurricularFace, head])
def test_numpy_numbers_are_numbers(make):
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if isinstance(parameter.default, float)
    }
    made = make(**{name: np.float32(value) for name, value in defaults.items()})
    module = made if make is head else head(margin=made, scale=np.float32(8.0))
    loss = module(torch.randn(3, 4), torch.tensor([1, 2, 4]))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_modules_are_instances():
    refused(TypeError, ["margin:", "ArcFace(0.5)", "the class CosFace"], head, margin=CosFace)
    refused(TypeError, ["scale:", "the class AdaCos"], head, scale=AdaCos)
    refused(TypeError, ["margin:", "the class CosFace"], InterClassFilter, CosFace)
    refused(
        TypeError, ["margin:", "instance", "the class"], MarginSchedule, ArcFace, final=1, finish=9
    )


def test_what_a_head_is_made_of():
    refused(ValueError, ["backend:", "'auto'", "'cudnn'"], head, backend="cudnn")
    refused(ValueError, ["backend:", "'auto'", "[]"], head, backend=[])
    refused(TypeError, ["bias: expected a bool", "'x'"], head, bias="x")
    refused(TypeError, ["even_batches: expected a bool"], Sharding, None, even_batches="x")
    refused(TypeError, ["max_local_batch:", "integer"], Sharding, None, max_local_batch=True)
    refused(ValueError, ["grad_scale:", "'ddp'", "'mean'"], Sharding, None, grad_scale="mean")
    refused(TypeError, ["sharding:", "process group", "NoneType"], Sharding, None)
    refused(ValueError, ["scale:", "AdaCos(5)", "AdaCos(3)"], head, scale=AdaCos(3))
    refused(TypeError, ["k:", "integer", "bool"], head().topk, torch.zeros(2, 4), True)


def test_a_number_in_the_place_of_a_tensor():
    """Names a remedy: torch refuses a number for a parameter or buffer, but names none."""
    for tensor in (torch.tensor(0.3), torch.nn.Parameter(torch.tensor(0.3))):
        margin, module = ArcFace(tensor), head(scale=tensor)
        for owner, name in ((margin, "m"), (module, "scale")):
            refused(
                TypeError,
                [f"{name}:", "got 0.4", f"{name}.data.fill_(0.4)"],
                setattr,
                owner,
                name,
                0.4,
            )
            getattr(owner, name).data.fill_(0.4)
            delattr(owner, name)
            setattr(owner, name, 0.2)


# a head's scale or its margin's m: a number, one that is saved, one that is trained as well
KINDS = {"number": float, "buffer": torch.tensor, "parameter": lambda v: Parameter(torch.tensor(v))}


@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", ["buffer", "parameter"])
def test_a_tensor_in_any_place_is_saved_and_moves(before, after):
    module = head(margin=ArcFace(KINDS[before](0.5)), scale=KINDS[before](8.0))
    module.scale, module.margin.m = KINDS[after](20.0), KINDS[after](0.3)
    state, parameters = module.state_dict(), dict(module.named_parameters())
    assert state["scale"] == 20 and state["margin.m"].item() == pytest.approx(0.3)
    assert ("scale" in parameters) == ("margin.m" in parameters) == (after == "parameter")
    assert {t.dtype for t in (module.double().scale, module.margin.m)} == {torch.float64}


@pytest.mark.parametrize("before", KINDS)
def test_a_module_as_scale_in_any_place_and_back(before):
    module = head(margin=NSoftmax(), scale=KINDS[before](8.0))
    with pytest.raises(ValueError, match=r"scale: expected AdaCos\(5\) .*, got AdaCos\(3\)"):
        module.scale = AdaCos(3)
    assert torch.as_tensor(module.scale) == 8
    module.scale = AdaCos(5)
    assert set(module.state_dict()) == {"weight", "scale.s"}
    assert module(torch.randn(3, 4), torch.tensor([1, 2, 4])).isfinite()
    module.scale = KINDS[before](16.0)
    assert torch.as_tensor(module.scale) == 16 and "scale.s" not in module.state_dict()


def test_a_tensor_that_would_never_be_trained():
    wanted = torch.tensor(0.3, requires_grad=True)
    for tensor in (wanted, wanted + 0.0):
        refused(ValueError, ["m:", "torch.nn.Parameter(m)", "requires grad"], ArcFace, tensor)
        refused(ValueError, ["scale:", "torch.nn.Parameter(scale)"], head, scale=tensor)
        for owner, name in ((ArcFace(), "m"), (head(), "scale")):
            refused(ValueError, [f"{name}:", "Parameter"], setattr, owner, name, tensor)
    loss = margin_cross_entropy(
        torch.randn(3, 4), torch.randn(5, 4), torch.arange(3), margin=NSoftmax(), scale=wanted
    )
    loss.backward()
    assert wanted.grad != 0
