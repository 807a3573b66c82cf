# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Uses the drop-in for insightface's Partial FC: numbers that change, odd labels, late groups."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_compat import LOSSES, C, D, batch, make, same

from marginkernels import (
    AdaCos,
    CurricularFace,
    MarginSchedule,
    MarginSoftmaxHead,
    NSoftmax,
)
from marginkernels.compat import insightface
from marginkernels.compat.insightface import (
    ArcFace,
    CombinedMarginLoss,
    CosFace,
    MarginLoss,
    PartialFC_V2,
)
from tests.support import workers

# functions that make the loss, and the loss with the numbers that are assigned one after another
REASSIGNED = {
    "ArcFace": (ArcFace, dict(margin=0.3, s=32.0), lambda: ArcFace(32.0, 0.3)),
    "CosFace": (CosFace, dict(m=0.2, s=16), lambda: CosFace(16.0, 0.2)),
    "arc": (
        lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.0),
        dict(m2=0.4, interclass_filtering_threshold=0.2),
        lambda: CombinedMarginLoss(64, 1.0, 0.4, 0.0, 0.2),
    ),
    "arc to cos": (
        lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.0, 0.2),
        dict(m3=0.35, interclass_filtering_threshold=0),
        lambda: CombinedMarginLoss(64, 1.0, 0.0, 0.35),
    ),
}


@pytest.mark.parametrize("name", REASSIGNED)
def test_new_numbers_hold_from_the_next_step(name):
    make, numbers, make_expected = REASSIGNED[name]
    head, (x, y) = PartialFC_V2(make(), D, C).double(), batch(9)
    before = head(x, y)
    loss = head.margin_softmax
    for number, value in numbers.items():
        setattr(loss, number, value)
        assert getattr(loss, number) == value
    expected = PartialFC_V2(make_expected(), D, C).double()
    expected.load_state_dict(head.state_dict())
    same(head(x, y), expected(x, y))
    assert head(x, y) != before
    cosines = F.normalize(x) @ F.normalize(head.weight).T
    same(loss(cosines, y), make_expected()(cosines, y))
    same(copy.deepcopy(loss)(cosines, y), loss(cosines, y))


@pytest.mark.parametrize(
    "make, number, value, error",
    [
        (ArcFace, "margin", 4.0, r"margin: expected a number in \[0, 3.14159\), got 4"),
        (ArcFace, "s", -1.0, "s: expected a finite number > 0, got -1"),
        (CosFace, "m", "0.4", r"m: expected a number in \[0, 2\], got str"),
        (LOSSES["arc"][0], "m1", 1.35, "m1, m2, m3: expected m1 = 1 and m3 = 0"),
        (LOSSES["arc"][0], "m2", -0.5, "m2: expected a number in"),
        (LOSSES["arc"][0], "interclass_filtering_threshold", 2, "interclass_filtering_threshold: "),
    ],
)
def test_wrong_numbers_change_nothing(make, number, value, error):
    loss = make()
    before, made = getattr(loss, number), loss.fused
    with pytest.raises((TypeError, ValueError), match=f"^{error}"):
        setattr(loss, number, value)
    assert getattr(loss, number) == before and loss.fused is made


@pytest.mark.parametrize(
    "make, number, margin_of",
    [
        (ArcFace, "margin", lambda loss: loss.fused),
        (CosFace, "m", lambda loss: loss.fused),
        (lambda: CombinedMarginLoss(64, 1.0, 0.5, 0.0), "m2", lambda loss: loss.fused),
        (LOSSES["cos, filtered"][0], "m3", lambda loss: loss.fused.margin),
    ],
)
def test_a_scheduled_margin_keeps_its_place(make, number, margin_of):
    loss = make()
    limits = dict(initial=0.1, final=0.3, finish=2, ramp="linear")
    schedule = MarginSchedule(margin_of(loss), **limits)
    assert getattr(loss, number) == 0.1
    loss.s = 30
    schedule.step()
    assert getattr(loss, number) == margin_of(loss).m == 0.2


def test_a_new_number_makes_a_margin_in_the_mode_of_its_loss():
    loss = LOSSES["cos, filtered"][0]().eval()
    loss.m3 = 0.2
    assert not any(module.training for module in loss.modules())


@pytest.mark.parametrize(
    "margin, s, error",
    [
        (NSoftmax, 64.0, r"margin: expected an instance such as .* got the class NSoftmax"),
        (0.5, 64.0, "margin: expected an nn.Module such as .* got float 0.5"),
        (NSoftmax(), -3.0, "s: expected a finite number > 0, got -3.0"),
        (NSoftmax(), AdaCos, "s: expected a number, 0-d tensor or module, got the class AdaCos"),
    ],
)
def test_a_margin_loss_refuses_wrong_parts(margin, s, error):
    with pytest.raises((TypeError, ValueError), match=f"^{error}"):
        MarginLoss(margin, s)


@pytest.mark.parametrize("s", [AdaCos(C), torch.nn.Parameter(torch.tensor(64.0))], ids=type)
def test_a_margin_loss_with_any_scale_is_shown(s):
    head, (x, y) = PartialFC_V2(MarginLoss(NSoftmax(), s), D, C), batch(9)
    assert "NSoftmax()" in repr(head)
    assert head(x.float(), y).isfinite()


@pytest.mark.parametrize("name", ["CosFace", "any callable"])
def test_floating_labels_and_no_rows(name):
    head, (x, y) = make(name), batch(9)
    same(head(x, y[:, None].float()), head(x, y))
    for wrong in (1.5, math.nan):
        labels = y.double()
        labels[3] = wrong
        with pytest.raises(ValueError, match=r"local_labels: expected labels in \[0, 11\)"):
            head(x, labels)
    head.num_classes = 2**11 + 1
    with pytest.raises(
        TypeError, match=r"local_labels: expected integers, got torch.float16.* 2048"
    ):
        head(x, y.half())
    head.num_classes = C
    loss = head(x[:0], y[:0])
    assert loss == 0
    (dw,) = torch.autograd.grad(loss, head.weight)
    assert (dw == 0).all()


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("embedding_size", 0, "a positive integer, got 0"),
        ("embedding_size", True, "a positive integer, got bool"),
        ("num_classes", 1.5, "a positive integer, got float"),
        ("num_classes", True, "a positive integer, got bool"),
        ("sample_rate", 1.5, r"a number in \[0, 1\], got 1.5"),
        ("sample_rate", "x", r"a number in \[0, 1\], got str"),
        ("loss_cap", "x", "a finite number, got str"),
        ("backend", "nope", "'auto' or one of .* got 'nope'"),
    ],
)
def test_the_head_refuses_wrong_settings(name, value, error):
    settings = dict(embedding_size=D, num_classes=C) | {name: value}
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected {error}"):
        PartialFC_V2(CosFace(), **settings)


def test_a_head_starts_afresh_after_meta():
    def made():
        torch.manual_seed(0)
        s = torch.nn.Parameter(torch.tensor(64.0, device="cpu"))
        return PartialFC_V2(MarginLoss(CurricularFace(0.5), s), D, C)

    fresh = made().state_dict()
    with torch.device("meta"):
        head = made()
    head.to_empty(device="cpu")
    for tensor in head.state_dict().values():
        tensor.fill_(math.nan)
    torch.manual_seed(0)
    head.reset_parameters()
    assert len(fresh) == 3
    torch.testing.assert_close(head.state_dict(), fresh, rtol=0, atol=0)


# the embeddings and labels that one rank gives instead of its own, and the error
ONE_RANKS_OWN = {
    "range": (
        lambda x, y: (x, y + C),
        ValueError,
        r"local_labels: expected labels in \[0, 11\), got",
    ),
    "list": (lambda x, y: (x, y.tolist()), TypeError, "local_labels: expected a tensor, got list"),
    "float8": (
        lambda x, y: (x, y.to(torch.float8_e5m2)),
        TypeError,
        "local_labels: expected integers, got torch.float8_e5m2",
    ),
    "no tensor": (
        lambda x, y: (None, y),
        TypeError,
        "local_embeddings: expected a tensor, got NoneType",
    ),
    "not finite": (
        lambda x, y: (x / 0, y),
        ValueError,
        "local_embeddings: expected finite rows of norm at most 1e.15, got",
    ),
}


def wrong_on_one_rank(name):
    head, rank = make(name), torch.distributed.get_rank()
    for change, error, text in ONE_RANKS_OWN.values():
        given = change(*batch(5)) if rank == 1 else batch(5)
        with pytest.raises(error, match="^rank 1: " * (rank == 0) + text):
            head(*given)
    assert head(*batch(5)).isfinite()


@pytest.mark.parametrize("name", ["CosFace", "any callable"])
def test_what_is_wrong_on_one_rank_is_raised_on_all(name):
    workers.run(2, wrong_on_one_rank, name)


class Raises(torch.nn.Module):
    """Stands for a user's margin or margin loss with an error in it."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, *_):
        raise self.error


# the second error is of a class that cannot be made from a text alone
@pytest.mark.parametrize(
    "error", [ValueError("y: no x: "), UnicodeDecodeError("y: ", b"x", 0, 1, "y: ")], ids=type
)
@pytest.mark.parametrize("fused", [True, False])
def test_errors_of_the_users_own_are_left_alone(error, fused):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that the loss is not fused
        loss = MarginLoss(Raises(error), 8.0) if fused else Raises(error)
        head = PartialFC_V2(loss, D, C).double()
    with pytest.raises(type(error)) as raised:
        head(*batch(5))
    assert raised.value is error and error.__cause__ is None


def made_before_the_group():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(insightface, "in_group", lambda: False)
        head = make("CosFace")
    x, y = batch(5)
    with pytest.warns(UserWarning, match="made before init_process_group.*the 2 ranks"):
        head(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(x, y)
        make("CosFace")(x, y)


def test_a_head_made_before_the_group_says_that_it_is_alone():
    workers.run(2, made_before_the_group)


def test_a_loss_of_insightface_is_no_margin_of_the_head():
    head = MarginSoftmaxHead(8, 5, margin=CosFace(), scale=16.0)
    with pytest.raises(TypeError, match="margin: expected a margin, got insightface's CosFace"):
        head(torch.randn(3, 8), torch.arange(3))
