# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses wespeaker's projections: its ``bin/train.py`` runs with this import changed::

    from marginkernels.compat.speaker.wespeaker import get_projection

A projection returns ``(outputs, loss)``, which the executor takes as it is. ``outputs`` is
:class:`Outputs`. The criterion of the configuration, a plain ``CrossEntropyLoss`` in all recipes,
is not called: the loss is there.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import arguments, evaluation, margins
from ...loss import HeadStats
from ..weights import FusedHead
from .hits import hits, with_margin

if TYPE_CHECKING:
    import numpy

__all__ = [
    "AddMarginProduct",
    "ArcMarginProduct",
    "ArcMarginProduct_intertopk_subcenter",
    "Outputs",
    "SphereFace2",
    "get_projection",
]


class Outputs:
    """Stands for the logits (N, C) with margins that wespeaker's accuracy meter reads.

    :meth:`numpy` computes them, with the class weights as they are then. That takes a sweep
    without gradient, and N C numbers. :attr:`correct` is there without cost, from the sweep of the
    loss.
    """

    def __init__(
        self, projection: "Projection", embeddings: Tensor, labels: Tensor, t: Tensor, hit: Tensor
    ):
        self._projection, self._embeddings, self._labels = projection, embeddings.detach(), labels
        self._t, self._scale, self._penalty = t, projection.scale, projection.penalty
        self.correct = hit  # (N,) bool, whether the row's own logit is the greatest

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (N, C)."""
        return len(self._labels), self._projection.out_features

    def cpu(self) -> "Outputs":
        """Returns itself: :meth:`numpy` goes to the CPU."""
        return self

    def detach(self) -> "Outputs":
        """Returns itself: there is no gradient."""
        return self

    @torch.no_grad()
    def numpy(self) -> "numpy.ndarray":
        """Computes the logits."""
        head, label = self._projection, self._labels[:, None]
        c = evaluation.logits(head.as_classes(), self._embeddings)
        if self._penalty > 0:
            others = c.scatter(1, label, -2)
            nearest, places = others.topk(min(head.k_top, c.shape[1] - 1), dim=1)
            c.scatter_(1, places, torch.cos(nearest.clamp(-1, 1).acos() - self._penalty))
        return c.scatter_(1, label, self._t[:, None].to(c.dtype)).mul_(self._scale).cpu().numpy()


class Projection(FusedHead):
    """Holds what the projections share.

    The margin may move at every step, by :meth:`update`; nothing is built anew for it.
    """

    limit = math.pi  # of the margin
    penalty = 0.0  # by which angle the k_top nearest of the other classes come nearer
    k_top = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float,
        margin: float,
        centers: int = 1,
    ):
        super().__init__()
        self.in_features = arguments.integer("in_features", in_features)
        self.out_features = arguments.integer("out_features", out_features)
        self.scale = arguments.number("scale", scale, above=0)
        self.sub_centers = arguments.integer("K", centers)
        weight = torch.empty(self.sub_centers * self.out_features, self.in_features)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(weight))
        self.margin = self.checked(margin)

    def checked(self, margin: float) -> float:
        """Returns the margin if it is one."""
        return arguments.number("margin", margin, least=0, below=self.limit)

    def update(self, margin: float = 0.2) -> None:
        """Sets the margin, as the margin scheduler does at every step."""
        self.margin = self.checked(margin)

    def fused(self) -> nn.Module:
        """Makes the margin of this step. It is no submodule: ``state_dict`` is wespeaker's."""
        raise NotImplementedError

    def seen(self, margin: nn.Module, stats: HeadStats, labels: Tensor) -> Tensor:
        """Returns the targets' logits over the scale, (N,), as :class:`Outputs` has them."""
        return with_margin(margin, stats, labels)

    @torch.jit.unused  # train.py exports the network by torch.jit.script, with this in it
    def forward(self, input: Tensor, label: Tensor) -> tuple[Outputs, Tensor]:
        """Returns what the executor takes: :class:`Outputs`, and the mean loss.

        Args:
            input: embeddings (N, D).
            label: (N,), integers.
        """
        label, margin = label.reshape(-1).long(), self.fused()
        loss, stats = self.fused_loss(
            input, label, margin=margin, scale=self.scale, return_stats=True
        )
        t = self.seen(margin, stats, label)
        return Outputs(self, input, label, t, hits(t, stats, self.scale, self.penalty)), loss

    def extra_repr(self) -> str:
        """Returns the settings as ``print`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scale={self.scale:g}, margin={self.margin:g}"
        )


class ArcMarginProduct(Projection):
    """Takes cos(theta + margin), beyond pi - margin cos(theta) - 1 - cos(pi - margin).

    Args:
        in_features, out_features: D and C.
        scale: the factor of the cosines.
        margin: in radians.
        easy_margin: whether only cos(theta) > 0 has a margin. The cosine itself stands elsewhere.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        easy_margin: bool = False,
    ):
        super().__init__(in_features, out_features, scale, margin)
        self.easy_margin = easy_margin

    def fused(self) -> nn.Module:
        """Makes :class:`marginkernels.ArcFace` with wespeaker's branch."""
        return arcface(self.margin, self.easy_margin)


class ArcMarginProduct_intertopk_subcenter(Projection):  # noqa: N801
    """Takes :class:`ArcMarginProduct` of the nearest of K centres, with the inter-top-k penalty.

    The k_top nearest of the other classes come nearer by the angle mp, times margin / 0.2: the
    penalty follows the margin. As in wespeaker there is none before the first :meth:`update`.

    Args:
        in_features, out_features, scale, margin, easy_margin: as for :class:`ArcMarginProduct`.
        K: the centres of each class. ``weight`` is (C K, D), K rows for each class.
        mp: the penalty for a margin of 0.2, an angle.
        k_top: how many classes get it.
        do_lm: whether this is large-margin fine-tuning, without a penalty.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        easy_margin: bool = False,
        K: int = 3,  # noqa: N803
        mp: float = 0.06,
        k_top: int = 5,
        do_lm: bool = False,
    ):
        super().__init__(in_features, out_features, scale, margin, K)
        self.easy_margin, self.K, self.do_lm = easy_margin, self.sub_centers, do_lm
        self.mp = 0.0 if do_lm else arguments.number("mp", mp, least=0, most=1)
        self.k_top = 0 if do_lm else arguments.integer("k_top", k_top, least=0)

    def update(self, margin: float = 0.2) -> None:
        """Sets the margin, and the penalty in proportion."""
        margin = self.checked(margin)
        penalty = self.mp * margin / 0.2 if self.k_top > 0 and margin > 0.001 else 0.0
        self.penalty = arguments.number("mp: for this margin", penalty, most=1)
        self.margin = margin

    def fused(self) -> nn.Module:
        """Makes :class:`marginkernels.InterTopK`."""
        arc = arcface(self.margin, self.easy_margin)
        return margins.InterTopK(arc, self.k_top, self.penalty)

    def extra_repr(self) -> str:
        """Returns the settings as ``print`` shows them."""
        settings = f"K={self.K}, mp={self.mp:g}, k_top={self.k_top}, do_lm={self.do_lm}"
        return f"{super().extra_repr()}, {settings}"


class AddMarginProduct(Projection):
    """Takes cos(theta) - margin.

    Args:
        in_features, out_features: D and C.
        scale: the factor of the cosines.
        margin: of the cosine.
    """

    limit = 2.0

    def __init__(
        self, in_features: int, out_features: int, scale: float = 32.0, margin: float = 0.20
    ):
        super().__init__(in_features, out_features, scale, margin)

    def fused(self) -> nn.Module:
        """Makes :class:`marginkernels.CosFace`."""
        return margins.CosFace(self.margin)


class _OneBias(margins.SphereFace2):
    """Has its bias as wespeaker does, (1, 1)."""

    def bias_of_values(self, rows: margins.Rows) -> Tensor:
        return super().bias_of_values(rows).reshape(())


class SphereFace2(Projection):
    """Takes :class:`marginkernels.SphereFace2`, a binary classification of each class.

    Args:
        in_features, out_features: D and C.
        scale: the factor of the cosines.
        margin: of the cosine for "C", of the angle for "A".
        lanbuda: the share of the row's own class in the loss.
        t: how far the similarities are spread.
        margin_type: "C" or "A".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        lanbuda: float = 0.7,
        t: int = 3,
        margin_type: str = "C",
    ):
        super().__init__(in_features, out_features, scale, margin)
        if margin_type not in ("C", "A"):
            raise ValueError(f"margin_type: expected 'C' or 'A', got {margin_type!r}")
        self.lanbuda = arguments.number("lanbuda", lanbuda, least=0, most=1)
        self.t, self.margin_type = arguments.integer("t", t), margin_type
        del self.bias  # to come after the weight: the states of optimizers go by that order
        self.bias = nn.Parameter(torch.zeros(1, 1))

    def fused(self) -> nn.Module:
        """Makes :class:`marginkernels.SphereFace2` with this bias."""
        margin = _OneBias(self.margin, kind=self.margin_type, t=self.t, balance=self.lanbuda)
        margin.bias = self.bias  # type: ignore[assignment]
        return margin

    def seen(self, margin: nn.Module, stats: HeadStats, labels: Tensor) -> Tensor:
        """Returns cos(theta) - margin, by which wespeaker measures the accuracy."""
        return stats.target_cosine - self.margin

    def extra_repr(self) -> str:
        """Returns the settings as ``print`` shows them."""
        settings = f"lanbuda={self.lanbuda:g}, t={self.t}, margin_type={self.margin_type}"
        return f"{super().extra_repr()}, {settings}"


def arcface(margin: float, easy_margin: bool) -> margins.ArcFace:
    """Makes the margin of wespeaker's ArcFace."""
    return margins.ArcFace(margin, branch="easy" if easy_margin else "continuous")


_SETTINGS: dict[str, tuple[type[Projection], dict[str, Any]]] = {
    # what a configuration may leave out; None: it may not
    "add_margin": (AddMarginProduct, {}),
    "arc_margin": (ArcMarginProduct, dict(easy_margin=None)),
    "arc_margin_intertopk_subcenter": (
        ArcMarginProduct_intertopk_subcenter,
        dict(easy_margin=None, K=3, mp=0.06, k_top=5, do_lm=False),
    ),
    "sphereface2": (SphereFace2, dict(t=3, lanbuda=0.7, margin_type="C")),
}


def get_projection(conf: dict[str, Any]) -> nn.Module:
    """Makes the projection that ``projection_args`` of a configuration asks for, with margin 0.

    ``project_type`` is add_margin, arc_margin, arc_margin_intertopk_subcenter or sphereface2. Every
    other one is made by wespeaker itself, which has to be installed then.
    """
    if conf["project_type"] not in _SETTINGS:
        from wespeaker.models import projections

        return projections.get_projection(conf)
    kind, settings = _SETTINGS[conf["project_type"]]
    given = {
        name: conf[name] if default is None else conf.get(name, default)
        for name, default in settings.items()
    }
    return kind(conf["embed_dim"], conf["num_class"], scale=conf["scale"], margin=0.0, **given)
