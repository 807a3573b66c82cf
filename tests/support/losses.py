# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds every loss beside its textbook definition: dense, naive, in the order of the papers.

A definition gets the cosines (N, C), labels and norms. It returns the numbers that replace the
cosines before the scale and the norms that are kept. It also returns a term of each row's loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import marginkernels as mk
from marginkernels.backends import reasons
from marginkernels.generators import mixed
from marginkernels.testing import assert_within_budget

# replacements of the cosines (N, C), and what is added to the losses of the rows
Defined = tuple[Tensor, Tensor | float]
Definition = Callable[[Tensor, Tensor, Tensor], Defined]  # of c, y and x_norm
PI = math.pi
F64 = torch.float64


def on_target(t: Callable) -> Definition:
    """Returns a definition that replaces the target's cosine by t(c_y, x_norm)."""

    def definition(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
        replaced = t(c.gather(1, y[:, None])[:, 0], x_norm)
        return c.scatter(1, y[:, None], replaced[:, None]), 0.0

    return definition


def with_negatives(t: Callable, negatives: Callable) -> Definition:
    """Returns a definition: t(c_y) for the target, negatives(c, c_y) (N, C) for the others."""

    def definition(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
        c_y = c.gather(1, y[:, None])
        return negatives(c, c_y).scatter(1, y[:, None], t(c_y)), 0.0

    return definition


def hard(c: Tensor, m: float = 0.5) -> Tensor:
    theta = torch.acos(c)
    return torch.where(theta < PI - m, torch.cos(theta + m), c - m * math.sin(m))


def continuous(c: Tensor, m: float) -> Tensor:
    theta = torch.acos(c)
    return torch.where(theta < PI - m, torch.cos(theta + m), c - 1 - math.cos(PI - m))


def easy(c: Tensor, m: float | Tensor = 0.5) -> Tensor:
    return torch.where(c > 0, torch.cos(torch.acos(c) + m), c)


def psi(c: Tensor, m: float) -> Tensor:
    k = torch.floor(m * torch.acos(c) / PI).detach()
    return (-1) ** k * torch.cos(m * torch.acos(c)) - 2 * k


def annealed(m: float, weight: float) -> Definition:
    return on_target(lambda c, _: (weight * c + psi(c, m)) / (1 + weight))


def x2_softmax(c: Tensor, _: Any) -> Tensor:
    return (-0.9 * torch.acos(c) ** 2 + 0.65).detach() + c - c.detach()


def adaface(c: Tensor, x_norm: Tensor, clip: bool = True) -> Tensor:
    n = x_norm.detach()
    mean, std = 0.01 * n.mean() + 0.99 * 20, 0.01 * n.std() + 0.99 * 100
    h = ((n - mean) / (std + 1e-3) * 0.333).clip(-1, 1)
    angle = torch.acos(c) - 0.4 * h
    return torch.cos(angle.clip(1e-3, PI - 1e-3) if clip else angle) - (0.4 + 0.4 * h)


def magface(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    a = x_norm.clip(1.5, 4)
    m = (0.8 - 0.45) / (4 - 1.5) * (a - 1.5) + 0.45
    c, _ = on_target(lambda c_y, _: easy(c_y, m))(c, y, x_norm)
    return c, 35 * (a / 4**2 + 1 / a)


def elastic(plus: bool) -> Definition:
    def t(c: Tensor, _: Any) -> Tensor:
        generator = torch.Generator().manual_seed(mixed(5, 0, 1))  # seed, rank, step
        noise = torch.randn(len(c), generator=generator).to(c.dtype)
        if plus:
            ranks = c.argsort(descending=True).tolist()
            smallest_first = sorted(noise.tolist())
            dealt = {row: margin for row, margin in zip(ranks, smallest_first, strict=True)}
            noise = torch.tensor([dealt[i] for i in range(len(c))], dtype=c.dtype)
        return torch.cos(torch.acos(c) + 0.5 + 0.05 * noise)

    return on_target(t)


def elastic_margin(plus: bool) -> torch.nn.Module:
    return mk.ElasticFace(plus=plus, seed=5)


def adam(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    m = TABLE.to(c)
    return on_target(lambda c_y, _: c_y - m[y])(c, y, x_norm)[0], 70 * (1 - m.mean())


def adam_margin() -> torch.nn.Module:
    margin = mk.AdaMSoftmax(len(TABLE))
    with torch.no_grad():
        margin.m.copy_(TABLE)
    return margin


def airface(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    theta = torch.acos(c)
    return with_negatives(
        lambda c_y: (PI - 2 * (torch.acos(c_y) + 0.4)) / PI, lambda *_: (PI - 2 * theta) / PI
    )(c, y, x_norm)


def curricular(c: Tensor, c_y: Tensor) -> Tensor:
    t = (0.01 * c_y.mean() + 0.99 * 0.0).detach()
    threshold = torch.cos(torch.acos(c_y) + 0.5).detach()
    return torch.where(c > threshold, c * (t + c), c)


def mv_am(c: Tensor, c_y: Tensor) -> Tensor:
    return torch.where(c > (c_y - 0.35).detach(), 1.2 * c + 0.2, c)


def arc_negative(c: Tensor, c_y: Tensor) -> Tensor:
    t = (1.2 * torch.exp(-((c - hard(c_y)) ** 2) / 2)).detach()
    return t * c + t - 1


def inter_top_k(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    others = c.scatter(1, y[:, None], -math.inf)
    nearest = others.topk(min(5, c.shape[1]), dim=1).indices
    closer = torch.cos(torch.acos(c) - 0.06)
    c = c.scatter(1, nearest, closer.gather(1, nearest))
    return with_negatives(lambda c_y: continuous(c_y, 0.2), lambda c, _: c)(c, y, x_norm)


def circle(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    m = 0.25
    target, other = (1 + m - c).clip(0).detach(), (c + m).clip(0).detach()
    return with_negatives(
        lambda c_y: target.gather(1, y[:, None]) * (c_y - (1 - m)), lambda c, _: other * (c - m)
    )(c, y, x_norm)


def sphereface2(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    g = 2 * ((c + 1) / 2) ** 3 - 1
    return with_negatives(
        lambda _: g.gather(1, y[:, None]) - 0.3 - 2.5 / 16, lambda *_: g + 0.3 - 2.5 / 16
    )(c, y, x_norm)


def sphereface2_of_angles(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    theta = torch.acos(c)
    return with_negatives(
        lambda c_y: (continuous(c_y, 0.2) + 1) ** 2 / 2 - 1 + 0.5 / 16,
        lambda *_: (torch.cos(theta - 0.2) + 1) ** 2 / 2 - 1 + 0.5 / 16,
    )(c, y, x_norm)


def unified(c: Tensor, y: Tensor, x_norm: Tensor) -> Defined:
    threshold = torch.tensor(math.log(10 * C)).to(c) / 16
    return with_negatives(lambda c_y: c_y - 0.4 - threshold, lambda *_: c - threshold)(c, y, x_norm)


@dataclass
class Loss:
    make: Callable[[], torch.nn.Module]  # a fresh margin
    define: Definition
    normalize: str = "both"
    scale: float = 16.0
    # of a one-versus-rest loss: the weights of the target's term and of the others'
    binary: tuple[float, float] | None = None

    def accepted(self, **settings: Any) -> dict[str, Any]:
        """Leaves out settings that change a softmax, where the loss is none."""
        softmax = ("label_smoothing", "z_loss", "focal_gamma")
        return {k: v for k, v in settings.items() if self.binary is None or k not in softmax}


C = 61
TABLE = torch.linspace(0.1, 0.6, C, dtype=torch.float64).float()

LOSSES = {
    "softmax": Loss(mk.NSoftmax, on_target(lambda c, _: c), "none", 0.5),
    "modified softmax": Loss(mk.NSoftmax, on_target(lambda c, _: c), "weight", 2.0),
    "N-Softmax": Loss(mk.NSoftmax, on_target(lambda c, _: c)),
    "L-Softmax": Loss(lambda: mk.LSoftmax(3), annealed(3, 1000 * 1.000025**-35), "none", 1.0),
    "L-Softmax without annealing": Loss(
        lambda: mk.LSoftmax(2, base=0), on_target(lambda c, _: psi(c, 2)), "none", 1.0
    ),
    "A-Softmax": Loss(mk.ASoftmax, annealed(4, 1000 / 1.12), "weight", 1.0),
    "SphereFace": Loss(lambda: mk.SphereFace(1.7), on_target(lambda c, _: psi(c, 1.7))),
    "CosFace": Loss(mk.CosFace, on_target(lambda c, _: c - 0.4)),
    "ArcFace": Loss(mk.ArcFace, on_target(lambda c, _: hard(c))),
    "ArcFace easy": Loss(lambda: mk.ArcFace(branch="easy"), on_target(lambda c, _: easy(c))),
    "ArcFace clipped": Loss(
        lambda: mk.ArcFace(branch="clip"),
        on_target(lambda c, _: torch.cos((torch.acos(c) + 0.5).clip(max=PI))),
    ),
    "CosFace with a negative margin": Loss(
        lambda: mk.CosFace(-0.3), on_target(lambda c, _: c + 0.3)
    ),
    "combined": Loss(
        lambda: mk.CombinedMargin(1.0, 0.3, 0.2), on_target(lambda c, _: hard(c, 0.3) - 0.2)
    ),
    "X2-Softmax": Loss(mk.X2Softmax, on_target(x2_softmax)),
    "AdaFace": Loss(mk.AdaFace, on_target(adaface)),
    "AdaFace unclipped": Loss(
        lambda: mk.AdaFace(clip=False), on_target(partial(adaface, clip=False))
    ),
    "MagFace": Loss(lambda: mk.MagFace(1.5, 4.0), magface),
    "ElasticFace": Loss(lambda: elastic_margin(False), elastic(False)),
    "ElasticFace+": Loss(lambda: elastic_margin(True), elastic(True)),
    "AdaM-Softmax": Loss(adam_margin, adam),
    "AirFace": Loss(mk.AirFace, airface),
    "inter-class filter": Loss(
        lambda: mk.InterClassFilter(mk.ArcFace(), 0.3),
        with_negatives(hard, lambda c, _: torch.where(c > 0.3, 0.0, c)),
    ),
    "MV-AM-Softmax": Loss(
        lambda: mk.MVSoftmax(0.35, kind="am"),
        with_negatives(lambda c_y: torch.where(c_y > 0.35, c_y - 0.35, c_y), mv_am),
    ),
    "MV-AM-Softmax of the paper": Loss(
        lambda: mk.MVSoftmax(0.35, kind="am", branch="none"),
        with_negatives(lambda c_y: c_y - 0.35, mv_am),
    ),
    "MV-AM-Softmax of the authors": Loss(
        lambda: mk.MVSoftmax(0.35, kind="am", branch="easy"),
        with_negatives(lambda c_y: torch.where(c_y > 0, c_y - 0.35, c_y), mv_am),
    ),
    "MV-Arc-Softmax": Loss(
        lambda: mk.MVSoftmax(0.5, kind="arc", t=0.12),
        with_negatives(
            easy,
            lambda c, c_y: torch.where(
                c > torch.cos(torch.acos(c_y) + 0.5).detach(), 1.12 * c + 0.12, c
            ),
        ),
    ),
    "CurricularFace": Loss(mk.CurricularFace, with_negatives(hard, curricular)),
    "ArcNegFace": Loss(mk.ArcNegFace, with_negatives(hard, arc_negative)),
    "Circle": Loss(mk.Circle, circle, scale=20.0),
    "inter-top-k": Loss(lambda: mk.InterTopK(mk.ArcFace(0.2, branch="continuous")), inter_top_k),
    "SphereFace2": Loss(
        lambda: mk.SphereFace2(0.3, bias=-2.5, weight=1.5), sphereface2, binary=(1.05, 0.45)
    ),
    "SphereFace2 of the angle": Loss(
        lambda: mk.SphereFace2(0.2, kind="A", t=2, bias=0.5, balance=0.6),
        sphereface2_of_angles,
        binary=(0.6, 0.4),
    ),
    "unified cross-entropy": Loss(
        lambda: mk.UnifiedCE(C, negative=0.5), unified, binary=(1.0, 0.5)
    ),
}


def dense(
    loss: Loss,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    sub_centers: int = 1,
) -> Tensor:
    """Returns the losses of the rows (N,) by the definition."""
    x_norm, w_norm = x.norm(dim=1), w.norm(dim=1)
    c = (F.normalize(x) @ F.normalize(w).T).clamp(-1, 1)
    if sub_centers > 1:
        logits = c * w_norm if loss.normalize == "none" else c
        best = logits.unflatten(1, (-1, sub_centers)).argmax(2)
        best = best + sub_centers * torch.arange(best.shape[1])
        c, w_norm = c.gather(1, best), w_norm[best]
    t, extra = loss.define(c, y, x_norm)
    kept = dict(both=1.0, weight=x_norm[:, None], none=x_norm[:, None] * w_norm)[loss.normalize]
    logits = loss.scale * kept * t
    if loss.binary is not None:
        own = F.one_hot(y, logits.shape[1]).to(logits)
        positive, negative = loss.binary
        weights = positive * own + negative * (1 - own)
        terms = F.binary_cross_entropy_with_logits(logits, own, weights, reduction="none")
        return terms.sum(1) * (1.0 if sample_weight is None else sample_weight)
    rows = F.cross_entropy(logits, y, reduction="none", label_smoothing=label_smoothing)
    p = logits.softmax(1).gather(1, y[:, None])[:, 0]
    rows = rows * (1 - p) ** focal_gamma + z_loss * logits.logsumexp(1) ** 2 + extra
    return rows if sample_weight is None else rows * sample_weight


def fused(loss: Loss, x: Tensor, w: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """Returns the losses of the rows (N,) by the library."""
    margin = loss.make().to(x.device)
    if x.dtype == torch.float64:
        margin.double()  # or the buffers would round to fp32
    return mk.margin_cross_entropy(
        x, w, y, margin=margin, scale=loss.scale, normalize=loss.normalize, reduction="none",
        **settings,
    )  # fmt: skip


def operands(
    n: int = 40,
    d: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sub_centers: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns rows from far beyond the margins' branch points to close to their class."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(C * sub_centers, d, generator=generator, dtype=torch.float64)
    y = torch.randint(0, C, (n,), generator=generator)
    lean = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    x += lean * w[y * sub_centers + y % sub_centers]
    return x.to(dtype), w.to(dtype), y


def solve(function: Callable, x: Tensor, w: Tensor) -> list[Tensor]:
    """Returns the row losses of function(x, w), and the gradients of an uneven sum of them."""
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    rows = function(*leaves)
    upstream = torch.linspace(0.5, 1.5, len(rows), dtype=rows.dtype, device=rows.device)
    return [rows.detach(), *torch.autograd.grad((rows * upstream).sum(), leaves)]


def settings_of(kind: str, n: int, loss: Loss) -> dict[str, Any]:
    """Returns settings that compose with a loss: one of them, all, or none ("alone")."""
    weights = torch.linspace(0.2, 2, n, dtype=F64)
    each = dict(label_smoothing=0.1, sample_weight=weights, z_loss=1e-2, focal_gamma=2.0)
    return loss.accepted(**{"alone": {}, "all": each}.get(kind, {kind: each.get(kind)}))


def stays_in_the_definitions_budget(
    name: str, dtype: torch.dtype, backend: str, device: str = "cpu"
) -> None:
    """Checks a loss against its definition in fp64.

    The plain path is the definition in the same type, with the features in several orders.
    """
    x, w, y = operands(d=96, dtype=dtype)
    loss = LOSSES[name]
    settings = settings_of("all", len(x), loss)
    settings["sample_weight"] = settings["sample_weight"].float()
    exact = solve(lambda x, w: dense(loss, x, w, y, **settings), x.double(), w.double())
    draws = []
    for _ in range(6):
        order = torch.randperm(x.shape[1])
        rows, dx, dw = solve(lambda x, w: plain(loss, x, w, y, settings), x[:, order], w[:, order])
        draws.append([rows, dx[:, order.argsort()], dw[:, order.argsort()]])
    x, w, y, settings["sample_weight"] = (
        t.to(device) for t in (x, w, y, settings["sample_weight"])
    )
    ours = solve(lambda x, w: fused(loss, x, w, y, backend=backend, **settings), x, w)
    for index, what in enumerate(("loss", "dx", "dw")):
        assert_within_budget(what, ours[index].cpu(), [d[index] for d in draws], exact[index])


def plain(loss: Loss, x: Tensor, w: Tensor, y: Tensor, settings: dict[str, Any]) -> Tensor:
    """Returns the losses of the rows by the definition, as the plain path computes them."""
    return dense(loss, x.float(), w.float(), y, **settings)


def finite_at_the_ends(name: str, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Checks that nothing is infinite for features along and against their class, and another."""
    if why_not := reasons(backend, device, dtype):
        pytest.skip("; ".join(why_not))
    w = torch.randn(C, 24, device=device)
    y = torch.arange(30, device=device)
    x = torch.cat([2 * w[:10], -0.5 * w[10:20], w[40:50]])
    loss = LOSSES[name]
    settings = loss.accepted(label_smoothing=0.1, z_loss=1e-3, focal_gamma=0.5)
    for value in solve(
        lambda x, w: fused(loss, x, w, y, backend=backend, **settings), x.to(dtype), w.to(dtype)
    ):
        assert value.isfinite().all()
