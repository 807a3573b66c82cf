# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares the losses with pytorch-metric-learning's own, and trains with its trainers."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from marginkernels.optim import SGD
from marginkernels.testing import assert_within_budget
from tests.support import workers

pytest.importorskip("pytorch_metric_learning", exc_type=ImportError)
from pytorch_metric_learning import (
    distances,
    losses,
    miners,
    reducers,
    regularizers,
    trainers,
)
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

from marginkernels.compat import metric_learning

C, D, N = 10, 3, 60
NOT_NORMALIZED = dict(normalize_embeddings=False)
CASES = {
    "ArcFace": ("ArcFaceLoss", dict(margin=30, scale=64)),
    "ArcFace, defaults": ("ArcFaceLoss", {}),
    "CosFace": ("CosFaceLoss", dict(margin=0.5, scale=64)),
    "sub-centre": ("SubCenterArcFaceLoss", dict(margin=30, sub_centers=1)),
    "sub-centres": ("SubCenterArcFaceLoss", dict(margin=30, sub_centers=4)),
    "large margin": ("LargeMarginSoftmaxLoss", dict(margin=10, scale=2)),
    "large margin, defaults": ("LargeMarginSoftmaxLoss", {}),
    "SphereFace": ("SphereFaceLoss", dict(margin=10, scale=2)),
    "SphereFace, odd": ("SphereFaceLoss", dict(margin=3)),
    "normalized softmax": ("NormalizedSoftmaxLoss", dict(temperature=0.1)),
    "its weights alone": (
        "NormalizedSoftmaxLoss",
        dict(temperature=0.5, distance=distances.DotProductSimilarity(**NOT_NORMALIZED)),
    ),
    "ProxyNCA": ("ProxyNCALoss", {}),
    "ProxyNCA, scale": ("ProxyNCALoss", dict(softmax_scale=2)),
    "ProxyNCA, norms": (
        "ProxyNCALoss",
        dict(softmax_scale=0.1, distance=distances.LpDistance(power=2, **NOT_NORMALIZED))),
    "ProxyNCA, cosines": (
        "ProxyNCALoss", dict(softmax_scale=3, distance=distances.CosineSimilarity())),
    "ProxyNCA, products": (
        "ProxyNCALoss", dict(distance=distances.DotProductSimilarity(**NOT_NORMALIZED))),
}  # fmt: skip
NAMES = metric_learning.__all__


def made(module, name, **settings):
    """Makes a loss of either module, with the same first weights."""
    torch.manual_seed(0)
    return getattr(module, name)(num_classes=C, embedding_size=D, **copy.deepcopy(settings))


def pair(name, **settings):
    return made(losses, name, **settings), made(metric_learning, name, **settings)


def batch(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(N, D).to(dtype), torch.randint(C, (N,))


def gradients(loss, value, x):
    weight = next(loss.parameters())
    weight.grad = None
    value.backward()
    return x.grad, weight.grad


def elements(loss, x, y):
    """Returns the element losses, and gradients of their weighted sum."""
    x = x.clone().requires_grad_()
    value = loss.compute_loss(x, y, None, x, y)["loss"]["losses"]
    torch.manual_seed(2)
    return value.detach(), *gradients(loss, (value * torch.rand(N).to(value.dtype)).sum(), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_as_near_to_fp64_as_the_originals(case, dtype):
    name, settings = CASES[case]
    theirs, ours = pair(name, **settings)
    x, y = batch(dtype)
    judge = copy.deepcopy(theirs)
    judge.cast_types(dtype, x.device)
    exact = elements(judge, x.double(), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = elements(ours, x, y)
    # scale and slope of the margin multiply the rounding of a cosine; the original is one draw of
    # it, and in fp64 the judge itself
    conditioning = {torch.float64: 100.0, torch.float32: 20.0, torch.float16: 1.0}[dtype]
    for what, mine, plain, right in zip(
        ("losses", "dx", "dw"), got, elements(theirs, x, y), exact, strict=True
    ):
        assert mine.dtype == plain.dtype and mine.shape == plain.shape
        assert_within_budget(what, mine, [plain], right, conditioning)
    assert ours.rows().is_contiguous() and ours.rows().dtype == dtype


MINERS = {
    "none": lambda x, y: None,
    "triplets": miners.TripletMarginMiner(margin=0.1),
    "pairs": miners.MultiSimilarityMiner(),
    "empty": lambda x, y: tuple(torch.empty(3, 0, dtype=torch.long)),
}
REDUCERS = {
    "mean": reducers.MeanReducer(),
    "nonzero": reducers.AvgNonZeroReducer(),
    "threshold": reducers.ThresholdReducer(low=1.0, high=9.0),
    "nothing passes": reducers.ThresholdReducer(low=1e9),
    "classes": reducers.ClassWeightedReducer(torch.arange(1.0, C + 1)),
}


@pytest.mark.parametrize("name", NAMES)
def test_miners_reducers_and_regularizers_are_the_originals(name):
    x, y = batch()
    of_weights = [regularizers.RegularFaceRegularizer(), regularizers.CenterInvariantRegularizer()]
    for mine, regularizer in zip(MINERS.values(), of_weights * 2, strict=True):
        for reducer in REDUCERS.values():
            settings = dict(
                reducer=reducer, weight_regularizer=regularizer,
                weight_reg_weight=0.3, embedding_regularizer=regularizers.LpRegularizer(),
            )  # fmt: skip
            results = []
            for loss in pair(name, **settings):
                rows = x.clone().requires_grad_()
                value = loss(rows, y, mine(x, y))
                results.append((value.detach(), *gradients(loss, value, rows)))
            torch.testing.assert_close(*results[::-1])
    theirs, ours = (loss(x, y)["loss"] for loss in pair(name, reducer=reducers.DoNothingReducer()))
    assert theirs.pop("reduction_type") == ours.pop("reduction_type")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_and_records_are_the_originals(name):
    x, y = batch()
    theirs, ours = pair(name, collect_stats=True)
    for loss in (theirs, ours):
        loss.distance.collect_stats = True
        loss(x, y)
    for a, b in ((theirs, ours), (theirs.distance, ours.distance), (theirs.reducer, ours.reducer)):
        for names in ("_record_these", "_record_these_stats"):
            kept = getattr(a, names, [])
            assert kept == getattr(b, names, [])
            values = [[float(getattr(m, n)) for n in kept] for m in (a, b)]
            torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", NAMES)
def test_types_first_weights_and_checkpoints_are_the_originals(name):
    theirs, ours = pair(name)
    assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
    ((key, value),) = theirs.state_dict().items()
    assert torch.equal(ours.state_dict()[key], value)
    x, y = batch(torch.float32)
    for loss in (theirs, ours):
        nn.init.zeros_(next(loss.parameters()))
    ours.load_state_dict({key: value})
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x))
    started = made(metric_learning, name, weight_init_func=nn.init.ones_)
    assert torch.equal(started.state_dict()[key], torch.ones_like(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_under_autocast_are_the_originals(dtype):
    x, y = batch(dtype)
    theirs, ours = pair("ArcFaceLoss")
    with torch.autocast("cpu", torch.bfloat16):
        values = ours(x, y), theirs(x, y)
    assert values[0].dtype == values[1].dtype == torch.float32 and ours.W.dtype == theirs.W.dtype
    # a logit of 64 in bfloat16 is a multiple of 1 / 4
    torch.testing.assert_close(*values, rtol=0, atol=0.25)


def test_copies_and_weights_in_bfloat16_under_a_fused_optimizer():
    x, y = batch(torch.float32)
    ours = made(metric_learning, "SubCenterArcFaceLoss")
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(x, y), ours(x, y)) and copied.rows().is_contiguous()
    optimizer = SGD(ours.bfloat16(), lr=0.1, momentum=0.9)
    before = ours.W.detach().clone()
    ours(x, y).backward()
    optimizer.step()
    assert ours.W.dtype == torch.bfloat16 and not torch.equal(ours.W, before)


def test_outliers_are_the_originals():
    x, y = torch.randn(N, D), torch.arange(N) % C
    found = [loss.get_outliers(x, y, threshold=60) for loss in pair("SubCenterArcFaceLoss")]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_missing_labels_and_references_are_refused_in_the_originals_words(name):
    x, y = batch()
    for arguments in ((x,), (x, y, None, x.clone(), y)):
        told = []
        for loss in pair(name):
            with pytest.raises(ValueError) as error:
                loss(*arguments)
            told.append(str(error.value))
        assert told[0] == told[1]
    assert all(loss(x[:0], y[:0]).isnan() for loss in pair(name))


def test_proxy_nca_leaves_out_rows_without_a_class_or_a_probability():
    x, y = batch(torch.float32)
    y[:3] = torch.tensor([-1, C, -100])
    told = [
        loss.compute_loss(x, y, None, x, y)["loss"]
        for loss in pair("ProxyNCALoss", softmax_scale=60)
    ]
    assert N - len(told[0]["indices"]) > 3  # some vanish
    assert torch.equal(told[0]["indices"], told[1]["indices"])


def test_scale_and_margin_may_be_parameters():
    x, y = batch()
    results = []
    for loss in pair("CosFaceLoss"):
        numbers = [nn.Parameter(torch.tensor(t, dtype=torch.float64)) for t in (16.0, 0.2)]
        loss.scale, loss.margin = numbers
        results.append(torch.autograd.grad(loss(x, y), numbers))
    torch.testing.assert_close(*results[::-1])


class Overriding(metric_learning.ArcFaceLoss):
    """Has a margin of its own."""

    def modify_cosine_of_target_classes(self, cosine):
        return cosine - 0.1


UNFUSED = {
    "another distance": ("ProxyNCALoss", dict(distance=distances.SNRDistance())),
    "another power": ("ArcFaceLoss", dict(distance=distances.CosineSimilarity(power=2))),
    "another norm": ("CosFaceLoss", dict(distance=distances.CosineSimilarity(p=1))),
    "a negative margin": ("ArcFaceLoss", dict(margin=-5)),
    "a margin for each row": ("CosFaceLoss", dict(margin=torch.linspace(0, 0.4, N))),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_settings_without_a_fused_form_are_computed_by_the_original_with_one_warning(case):
    name, settings = UNFUSED[case]
    theirs, ours = pair(name, **settings)
    x, y = batch(torch.float32)
    with pytest.warns(UserWarning, match=f"^{name} is not fused"):
        value = ours(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(value, ours(x, y)) and torch.equal(value, theirs(x, y))
    SGD(ours, lr=0.1)
    with pytest.raises(TypeError, match=f"^{name}: expected settings with a fused form"):
        ours(x, y)


def test_an_override_and_another_cross_entropy_count():
    x, y = batch()
    smoothed = pair("CosFaceLoss")
    for loss in smoothed:
        loss.cross_entropy = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    with pytest.warns(UserWarning, match="cross_entropy: expected"):
        torch.testing.assert_close(smoothed[1](x, y), smoothed[0](x, y))
    own = Overriding(num_classes=C, embedding_size=D)
    with pytest.warns(UserWarning, match="modify_cosine_of_target_classes: expected"):
        value = own(x, y)
    cosface = made(losses, "CosFaceLoss", margin=0.1)
    cosface.load_state_dict(own.state_dict())
    torch.testing.assert_close(value, cosface(x, y))


def train(module, name, fused=False, classifier=False):
    """Trains with a trainer of the package in fp64, and returns the loss of each step."""
    loss, seen = made(module, name).double(), []
    optimizer = SGD(loss, lr=0.5) if fused else torch.optim.SGD(loss.parameters(), lr=0.5)
    torch.manual_seed(3)
    models = {"trunk": nn.Linear(8, 5), "embedder": nn.Linear(5, D), "classifier": nn.Linear(D, C)}
    loss_funcs = {"metric_loss": loss, "classifier_loss": nn.CrossEntropyLoss()}
    kind = trainers.TrainWithClassifier
    if not classifier:
        kind = trainers.MetricLossOnly
        del models["classifier"], loss_funcs["classifier_loss"]
    optimizers = {
        f"{key}_optimizer": torch.optim.SGD(model.double().parameters(), lr=0.1)
        for key, model in models.items()
    }
    data = torch.utils.data.TensorDataset(torch.randn(8 * N, 8), torch.randint(C, (8 * N,)))
    kind(
        models, optimizers | {"metric_loss_optimizer": optimizer}, N, loss_funcs, data,
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()}, dtype=torch.float64,
        data_device=torch.device("cpu"), dataloader_num_workers=0,
        end_of_iteration_hook=lambda trainer: seen.append(trainer.losses["metric_loss"].item()),
    ).train(num_epochs=2)  # fmt: skip
    return torch.tensor(seen)


@pytest.mark.parametrize("name", NAMES)
def test_its_trainer_trains_as_with_the_original(name):
    curve = train(losses, name)
    assert len(curve) == 16 and curve[-1] < curve[0]
    torch.testing.assert_close(train(metric_learning, name), curve)


@pytest.mark.parametrize("settings", [dict(fused=True), dict(classifier=True)], ids=str)
def test_a_fused_optimizer_and_the_trainer_with_a_classifier(settings):
    curve = train(losses, "ArcFaceLoss", classifier="classifier" in settings)
    torch.testing.assert_close(train(metric_learning, "ArcFaceLoss", **settings), curve)


def gathered(name):
    """Trains in a DistributedLossWrapper, and returns loss and weights of both kinds."""
    results = []
    for module in (losses, metric_learning):
        loss = DistributedLossWrapper(made(module, name))
        x, y = batch(torch.float32)
        half = slice(dist.get_rank(), None, 2)
        rows = x[half].requires_grad_()
        value = loss(rows, y[half])
        results.append((value.detach(), *gradients(loss, value, rows)))
    return results


@pytest.mark.parametrize("name", ["ArcFaceLoss", "ProxyNCALoss"])
def test_distributed_loss_wrapper_sees_the_rows_of_all_ranks(name):
    ranks = workers.run(2, gathered, name)
    for theirs, ours in ranks:
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ranks[0][1][2], ranks[1][1][2])
