# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Compares wespeaker's projections with its formulas, in steps as its executor makes them."""

import math
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginkernels.compat.speaker import wespeaker
from tests.support import workers

N, C, D = 40, 23, 8
F64 = torch.float64


class Config(NamedTuple):
    """Holds the settings of a projection, and the greatest margin of its recipes."""

    kind: str
    settings: dict[str, Any]
    margin: float = 0.5
    centers: int = 1

    def make(self, device: str = "cpu") -> nn.Module:
        args = dict(project_type=self.kind, embed_dim=D, num_class=C, scale=32.0, **self.settings)
        return wespeaker.get_projection(args).to(device)


PROJECTIONS = {
    "add": Config("add_margin", {}),
    "arc": Config("arc_margin", dict(easy_margin=False)),
    "arc, easy": Config("arc_margin", dict(easy_margin=True)),
    "inter-top-k": Config("arc_margin_intertopk_subcenter", dict(easy_margin=False), 0.2, 3),
    "large margin": Config(
        "arc_margin_intertopk_subcenter", dict(easy_margin=False, do_lm=True, K=2), 0.5, 2
    ),
    "sphereface2 C": Config("sphereface2", {}, 0.3),
    "sphereface2 A": Config("sphereface2", dict(margin_type="A", t=2, lanbuda=0.6), 0.25),
}


def cosines(x: Tensor, w: Tensor, centers: int) -> Tensor:
    c = F.normalize(x) @ F.normalize(w).T
    return c.reshape(len(x), C, centers).amax(2)


def arc(c: Tensor, m: float, easy: bool) -> Tensor:
    theta = c.acos()
    if easy:
        return torch.where(theta < math.pi / 2, torch.cos(theta + m), c)
    return torch.where(theta < math.pi - m, torch.cos(theta + m), c - 1 - math.cos(math.pi - m))


def formula(
    given: Config, m: float, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns wespeaker's outputs (N, C) and the mean loss, from the angles."""
    c, own = cosines(x, w, given.centers), F.one_hot(y, C).bool()
    if given.kind == "sphereface2":
        share, t = given.settings.get("lanbuda", 0.7), given.settings.get("t", 3)
        spread = lambda c: 2 * ((c + 1) / 2) ** t - 1  # noqa: E731
        if given.settings.get("margin_type") == "A":
            target, others = spread(arc(c, m, False)), spread(torch.cos(c.acos() - m))
        else:
            target, others = spread(c) - m, spread(c) + m
        logits = 32 * torch.where(own, target, others) + bias
        weight = share * own + (1 - share) * ~own
        losses = F.binary_cross_entropy_with_logits(logits, own.to(c), weight, reduction="none")
        return 32 * torch.where(own, c - m, c), losses.sum(1).mean()
    others = c
    if given.kind.endswith("subcenter") and "do_lm" not in given.settings:
        penalty = 0.06 * m / 0.2 if m > 0.001 else 0
        nearest = c.masked_fill(own, -2).topk(5).indices
        near = torch.zeros_like(own).scatter(1, nearest, True)
        others = torch.where(near, torch.cos(c.acos() - penalty), c)
    target = c - m if given.kind == "add_margin" else arc(c, m, given.settings["easy_margin"])
    outputs = 32 * torch.where(own, target, others)
    return outputs, F.cross_entropy(outputs, y)


def batch(given: Config, head: nn.Module, n: int = N) -> tuple[Tensor, Tensor]:
    """Returns rows from far beyond pi - m to close to their class."""
    y = torch.randint(C, (n,))
    lean = torch.linspace(-6, 6, n, dtype=F64)[:, None]
    x = torch.randn(n, D, dtype=F64) + lean * F.normalize(
        head.weight.detach().cpu()[y * given.centers]
    )
    return x.to(head.weight), y.to(head.weight.device)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_loss_gradients_and_outputs_follow_the_margin_from_step_to_step(name, device):
    torch.manual_seed(0)
    given = PROJECTIONS[name]
    head = given.make(device).double()
    if head.bias is not None:
        nn.init.constant_(head.bias, 0.7)
    hits = []
    for m in (0.0, 0.05, given.margin / 2, given.margin):
        head.update(margin=m)
        x, y = batch(given, head)
        leaves = [t for t in (x.requires_grad_(), head.weight, head.bias) if t is not None]
        outputs, loss = head(x, y)
        expected, expected_loss = formula(given, m, x, head.weight, head.bias, y)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected_loss, leaves)
        )
        torch.testing.assert_close(torch.as_tensor(outputs.numpy()), expected.detach().cpu())
        assert torch.equal(outputs.correct, expected.argmax(1) == y) and outputs.shape == (N, C)
        hits.append(outputs.correct.sum().item())
    assert head.margin == given.margin and N > hits[0] > hits[-1] > 0


def test_without_an_update_there_is_no_penalty():
    torch.manual_seed(0)
    given = PROJECTIONS["inter-top-k"]
    head = wespeaker.ArcMarginProduct_intertopk_subcenter(D, C, margin=0.2).double()
    x, y = batch(given, head)
    plain = given._replace(settings=dict(easy_margin=False, do_lm=True))
    expected = formula(plain, 0.2, x, head.weight, None, y)[1]
    torch.testing.assert_close(head(x, y)[1], expected)


class ErrorMeter:
    """Counts as torchnet's ClassErrorMeter with accuracy=True does."""

    def __init__(self) -> None:
        self.hits = self.rows = 0

    def add(self, output: Any, target: Any) -> None:
        assert output.ndim == 2 and target.shape == output.shape[:1]
        self.hits += (torch.from_numpy(output).topk(1, 1)[1].numpy() == target[:, None]).sum()
        self.rows += len(target)

    def value(self) -> float:
        return 100.0 * self.hits / self.rows


def epoch(model: nn.Module, device: str, criterion: Callable | None) -> tuple[list[float], float]:
    """Trains as wespeaker's ``run_epoch`` does, the margin moving at each step."""
    torch.manual_seed(1)
    meter, losses = ErrorMeter(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(device, enabled=False)
    for i in range(6):
        model.projection.update(margin=0.2 * i / 5)
        features, targets = torch.randn(16, 5), torch.randint(C, (16,))
        features, targets = features.to(model.projection.weight), targets.to(device)
        outputs = model.projection(model(features), targets)
        if isinstance(outputs, tuple):
            outputs, loss = outputs
        else:
            loss = criterion(outputs, targets)
        losses.append(loss.item())
        meter.add(outputs.cpu().detach().numpy(), targets.cpu().numpy())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return losses, meter.value()


class Plain(nn.Module):
    """Returns all logits, as wespeaker's projection does."""

    margin = 0.0
    bias = None

    def __init__(self, given: Config, weight: Tensor):
        super().__init__()
        self.given, self.weight = given, nn.Parameter(weight.clone())

    def update(self, margin: float) -> None:
        self.margin = margin

    def forward(self, input: Tensor, label: Tensor) -> Tensor:
        return formula(self.given, self.margin, input, self.weight, None, label)[0]


def network(projection: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, D)).to(projection.weight)
    model.add_module("projection", projection)
    model.forward = lambda features: model[0](features)
    return model


@pytest.mark.parametrize("name", ["arc", "inter-top-k"])
def test_an_epoch_of_the_executor_is_the_same(name, device):
    torch.manual_seed(0)
    given = PROJECTIONS[name]
    ours = given.make(device).double()
    nn.init.normal_(ours.weight)
    plain = Plain(given, ours.weight.detach())
    expected = epoch(network(plain), device, nn.CrossEntropyLoss())
    losses, accuracy = epoch(network(ours), device, None)
    assert losses == pytest.approx(expected[0], rel=1e-9) and accuracy == expected[1]
    torch.testing.assert_close(ours.weight, plain.weight)


def gradients_of_a_rank() -> dict[str, Tensor]:
    """Makes a backward pass as train.py does: DDP around the model, the projection outside it."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Linear(5, D)
            self.projection = PROJECTIONS["sphereface2 C"].make()

        def forward(self, features: Tensor) -> Tensor:
            return self.network(features)

    model = Model().double()
    nn.init.normal_(model.projection.weight)
    ddp = nn.parallel.DistributedDataParallel(model)
    features, targets = torch.randn(2, 6, 5, dtype=F64), torch.randint(C, (2, 6))
    _, loss = ddp.module.projection(ddp(features[rank]), targets[rank])
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    _, loss = model.projection(model(features.flatten(0, 1)), targets.flatten())
    loss.backward()
    return dict(by_ddp=grads, whole=[p.grad for p in model.parameters()])


def test_gradients_are_averaged_over_ranks_outside_of_ddps_forward():
    for rank in workers.run(2, gradients_of_a_rank):
        torch.testing.assert_close(rank["by_ddp"], rank["whole"])


@pytest.mark.parametrize("name", PROJECTIONS)
def test_checkpoints_have_wespeakers_names_and_shapes(name):
    torch.manual_seed(3)
    given = PROJECTIONS[name]
    head = given.make()
    head.update(0.1)
    torch.manual_seed(3)
    first = nn.init.xavier_uniform_(torch.empty(C * given.centers, D))
    expected = dict(weight=first)
    if given.kind == "sphereface2":
        expected["bias"] = torch.zeros(1, 1)
    state = head.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in state)
    other = given.make()
    other.load_state_dict(expected, assign=True)
    x, y = batch(given, other.double())
    other(x, y)[1].backward()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_model_with_its_projection_exports_by_script(name, tmp_path):
    """Checks what train.py tries: ``init.zip``."""

    class Model(nn.Module):
        def __init__(self, projection: nn.Module):
            super().__init__()
            self.network, self.projection = nn.Linear(5, D), projection

        def forward(self, features: Tensor) -> Tensor:
            return self.network(features)

    model = Model(PROJECTIONS[name].make())
    torch.jit.script(model).save(str(tmp_path / "init.zip"))
    again = torch.jit.load(str(tmp_path / "init.zip"))
    features = torch.randn(2, 5)
    assert torch.equal(again(features), model(features))
    assert torch.equal(again.projection.weight, model.projection.weight)


def test_half_precision_and_a_single_row_work(device):
    given = PROJECTIONS["arc"]
    head = given.make(device)
    head.update(0.2)
    x, y = batch(given, head, 1)
    with torch.autocast(device, torch.bfloat16):
        outputs, loss = head(x.bfloat16().requires_grad_(), y.int())
    loss.backward()
    assert outputs.numpy().shape == (1, C) and loss.isfinite()
    expected = formula(given, 0.2, x, head.weight, None, y)[1]
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)


def test_other_projections_are_made_by_wespeaker(monkeypatch):
    module = types.ModuleType("wespeaker.models")
    module.projections = types.SimpleNamespace(get_projection=lambda conf: conf["project_type"])
    monkeypatch.setitem(sys.modules, "wespeaker", types.ModuleType("wespeaker"))
    monkeypatch.setitem(sys.modules, "wespeaker.models", module)
    assert wespeaker.get_projection(dict(project_type="sphere")) == "sphere"


def test_bad_settings_say_what_was_expected_and_change_nothing():
    with pytest.raises(ValueError, match=r"margin_type: expected 'C' or 'A', got 'B'"):
        wespeaker.SphereFace2(D, C, margin_type="B")
    with pytest.raises(ValueError, match="scale: expected a finite number > 0, got -1"):
        wespeaker.ArcMarginProduct(D, C, scale=-1)
    head = wespeaker.ArcMarginProduct_intertopk_subcenter(D, C, mp=0.5)
    for margin, name in ((3.2, "margin"), (0.5, "mp")):
        with pytest.raises(ValueError, match=f"^{name}.*expected a number in"):
            head.update(margin)
        assert (head.margin, head.penalty) == (0.2, 0.0)
