# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares speechbrain's head for speakers with its formulas, and with the package in its loop."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from marginkernels import LazyCosine
from marginkernels.compat.speaker import (
    AdditiveAngularMargin,
    AngularMargin,
    Classifier,
    LogSoftmaxWrapper,
)

N, C, D, F64 = 12, 11, 6, torch.float64
LOSSES = {
    "angular": (AngularMargin, {}),
    "additive": (AdditiveAngularMargin, {}),
    "easy": (AdditiveAngularMargin, dict(easy_margin=True)),
}


def theirs():
    """Returns the module that has speechbrain's losses, and the one that has its classifier."""
    losses = pytest.importorskip("speechbrain.nnet.losses", exc_type=ImportError)
    models = pytest.importorskip("speechbrain.lobes.models.ECAPA_TDNN", exc_type=ImportError)
    return losses, models


def formula(weight, x, targets, m, s, kind):
    """Computes the loss from speechbrain's formulas."""
    cos = F.linear(F.normalize(x.squeeze(1)), F.normalize(weight))
    one_hot = F.one_hot(targets.squeeze(1), C)
    m = cos.new_tensor(m)
    phi = cos * m.cos() - (1 - cos**2).sqrt() * m.sin()
    phi = {
        "angular": cos - m,
        "additive": torch.where(cos > torch.cos(torch.pi - m), phi, cos - m * torch.sin(m)),
        "easy": torch.where(cos > 0, phi, cos),
    }[kind]
    log_p = torch.log_softmax(s * torch.where(one_hot == 1, phi, cos), dim=1)
    return F.kl_div(log_p, one_hot.to(F64), reduction="sum") / one_hot.sum()


def problem():
    torch.manual_seed(0)
    classifier = Classifier(D, out_neurons=C).double()
    x, targets = torch.randn(N, 1, D, dtype=F64), torch.randint(C, (N, 1))
    with torch.no_grad():  # some rows lie beyond pi - m
        x[:4] = 0.1 * x[:4] - classifier.weight[targets[:4, 0]][:, None]
    return classifier, x.requires_grad_(), targets


@pytest.mark.filterwarnings("error:LazyCosine")
@pytest.mark.parametrize("m", [0.0, 0.4])
@pytest.mark.parametrize("kind", LOSSES)
def test_loss_and_gradients_are_those_of_the_formulas_by_a_sweep(kind, m):
    classifier, x, targets = problem()
    loss_fn, options = LOSSES[kind]
    outputs = classifier(x)
    assert isinstance(outputs, LazyCosine) and outputs.shape == (N, 1, C)
    ours = LogSoftmaxWrapper(loss_fn(margin=m, scale=30, **options))(
        outputs, targets, torch.ones(N)
    )
    exact = formula(classifier.weight, x, targets, m, 30, kind)
    torch.testing.assert_close(ours, exact)
    leaves = (x, classifier.weight)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves)
    )
    error = (outputs.argmax(dim=-1) != targets).float()
    assert outputs.accuracy(targets) == 1 - error.mean()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_plain_tensor_of_cosines_is_taken_as_it_is(kind):
    classifier, x, targets = problem()
    loss_fn, options = LOSSES[kind]
    cosines = classifier(x).tensor()
    assert type(cosines) is torch.Tensor
    ours = LogSoftmaxWrapper(loss_fn(margin=0.4, scale=30, **options))(cosines, targets)
    torch.testing.assert_close(ours, formula(classifier.weight, x, targets, 0.4, 30, kind))
    plain = LogSoftmaxWrapper(torch.nn.Identity())(30 * cosines, targets)
    torch.testing.assert_close(plain, formula(classifier.weight, x, targets, 0.0, 30, "angular"))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"margin: expected a number in \[0, 3\.14159\), got 4"):
        AdditiveAngularMargin(margin=4)
    with pytest.raises(TypeError, match="easy_margin: expected a bool"):
        AdditiveAngularMargin(easy_margin="yes")
    with pytest.raises(ValueError, match="lin_blocks: expected an integer of at least 0, got -1"):
        Classifier(D, lin_blocks=-1)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("blocks", [0, 2])
def test_either_part_goes_with_the_others_of_the_package(blocks, kind):
    losses, models = theirs()
    loss_fn, options = LOSSES[kind]
    torch.manual_seed(1)
    original = models.Classifier(D, lin_blocks=blocks, lin_neurons=5, out_neurons=C)
    torch.manual_seed(1)
    classifier = Classifier(D, lin_blocks=blocks, lin_neurons=5, out_neurons=C)
    for one, other in ((classifier, original), (original, classifier)):  # and drawn alike
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
        one.load_state_dict(other.state_dict())
    x, targets = torch.randn(N, 1, D), torch.randint(C, (N, 1))
    settings = dict(margin=0.4, scale=30, **options)
    wrapper = losses.LogSoftmaxWrapper(getattr(losses, loss_fn.__name__)(**settings))
    ours = LogSoftmaxWrapper(loss_fn(**settings))
    exact = wrapper(original(x), targets)
    gradients = torch.autograd.grad(exact, [*original.parameters()])
    inner = losses.LogSoftmaxWrapper(ours.loss_fn)
    for layer, loss, warns in (
        (classifier, ours, 0), (classifier, wrapper, 1), (original, ours, 0), (classifier, inner, 1)
    ):  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = loss(layer(x), targets)
        assert sum("LazyCosine" in str(c.message) for c in caught) == warns
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(value, [*layer.parameters()])
        torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-4)


HPARAMS = """
embedding_model: !new:torch.nn.Linear
    in_features: 6
    out_features: 6

classifier: !new:{classifier}
    input_size: 6
    out_neurons: 11

compute_cost: !new:{losses}.LogSoftmaxWrapper
    loss_fn: !new:{losses}.AdditiveAngularMargin
        margin: 0.2
        scale: 30

error_stats: !name:speechbrain.utils.metric_stats.MetricStats
    metric: !name:speechbrain.nnet.losses.classification_error
        reduction: batch

modules:
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>

checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: {folder}
    recoverables:
        embedding_model: !ref <embedding_model>
        classifier: !ref <classifier>
"""
ORIGINAL = dict(
    classifier="speechbrain.lobes.models.ECAPA_TDNN.Classifier", losses="speechbrain.nnet.losses"
)
FUSED = dict(
    classifier="marginkernels.compat.speaker.Classifier", losses="marginkernels.compat.speaker"
)


def fit(names, folder, resume=False):
    """Trains as the recipes do, and returns the losses, the error rates and the classifier."""
    import speechbrain
    from hyperpyyaml import load_hyperpyyaml

    class SpeakerBrain(speechbrain.Brain):
        def compute_forward(self, batch, stage):
            embeddings = self.modules.embedding_model(batch[0])
            return self.modules.classifier(embeddings), torch.ones(len(batch[0]))

        def compute_objectives(self, predictions, batch, stage):
            predictions, lens = predictions
            loss = self.hparams.compute_cost(predictions, batch[1], lens)
            if stage != speechbrain.Stage.TRAIN:
                self.errors.append(range(len(batch[0])), predictions, batch[1], lens)
            else:
                losses.append(loss.item())
            return loss

        def on_stage_start(self, stage, epoch=None):
            self.errors = self.hparams.error_stats()

        def on_stage_end(self, stage, stage_loss, epoch=None):
            if stage == speechbrain.Stage.VALID:
                rates.append(self.errors.summarize("average"))
                self.checkpointer.save_checkpoint()

    losses, rates = [], []
    torch.manual_seed(0)
    hparams = load_hyperpyyaml(HPARAMS.format(folder=folder, **names))
    brain = SpeakerBrain(
        hparams["modules"], lambda p: torch.optim.Adam(p, lr=0.01), hparams,
        run_opts={"device": "cpu"}, checkpointer=hparams["checkpointer"],
    )  # fmt: skip
    batches = [(torch.randn(16, 1, 6), torch.randint(11, (16, 1))) for _ in range(5)]
    loaders = [DataLoader(part, batch_size=None) for part in (batches, batches[:2])]
    brain.fit(range(4 if resume else 2), *loaders, progressbar=False)
    return losses, rates, hparams["classifier"].weight


@pytest.mark.filterwarnings("ignore", "error:LazyCosine")
def test_a_recipe_trains_from_yaml_as_with_the_package_and_goes_on_from_its_checkpoint(tmp_path):
    theirs()
    found = {}
    for kind, names in (("theirs", ORIGINAL), ("ours", FUSED)):
        found[kind] = fit(names, tmp_path / kind)
    losses, rates, weight = zip(*found.values(), strict=True)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*weight, rtol=1e-3, atol=1e-4)
    assert rates[0] == rates[1] and len(losses[0]) == 10
    # Brain recovers the newest checkpoint, optimizer and all
    crossed = [fit(FUSED, tmp_path / "theirs", True), fit(ORIGINAL, tmp_path / "ours", True)]
    torch.testing.assert_close(*(torch.tensor(c[0]) for c in crossed), rtol=1e-3, atol=1e-3)
    assert crossed[0][0][0] < losses[0][0]
