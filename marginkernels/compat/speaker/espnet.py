# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses ESPnet's losses for speakers: in ``espnet2/tasks/spk.py`` two imports change::

    from marginkernels.compat.speaker.espnet import (
        AAMSoftmax,
        ArcMarginProduct_intertopk_subcenter,
    )

Where ESPnet is installed, they are its ``AbsLoss``, as its task and its model demand.
"""

from typing import Any

from torch import Tensor, nn

from ... import evaluation
from ..weights import FusedHead
from . import voxceleb, wespeaker

try:
    from espnet2.spk.loss.abs_loss import AbsLoss
except ImportError:

    class AbsLoss(nn.Module):  # type: ignore[no-redef]
        """Stands for ESPnet's, where that is not installed."""


__all__ = ["AAMSoftmax", "ArcMarginProduct_intertopk_subcenter"]

# loss, accuracy and predictions
Judged = tuple[Tensor | None, Tensor | None, Tensor]


class AAMSoftmax(AbsLoss, voxceleb.AAMSoftmax):
    """Takes :class:`marginkernels.compat.speaker.voxceleb.AAMSoftmax` as ESPnet calls it.

    Args:
        nout, nclasses: D and C.
        margin: in radians.
        scale: the factor of the cosines.
        easy_margin: whether only cos(theta) > 0 has a margin. The cosine itself stands elsewhere.
        kwargs: ignored, as in ESPnet.
    """

    def __init__(
        self,
        nout: int,
        nclasses: int,
        margin: float = 0.3,
        scale: float = 15,
        easy_margin: bool = False,
        **kwargs: Any,
    ):
        voxceleb.AAMSoftmax.__init__(self, nout, nclasses, margin, scale, easy_margin)

    def forward(  # type: ignore[override]
        self, input: Tensor, label: Tensor | None = None
    ) -> Judged:
        """Returns the mean loss, the accuracy and the nearest classes (N,); see :func:`judged`."""
        return judged(self, input, label, self.fused(), self.s)


class ArcMarginProduct_intertopk_subcenter(  # noqa: N801
    AbsLoss, wespeaker.ArcMarginProduct_intertopk_subcenter
):
    """Takes wespeaker's loss of that name as ESPnet calls it, ``aamsoftmax_sc_topk``.

    ESPnet's task never calls ``update``, without which there is no penalty.

    Args:
        nout, nclasses: D and C.
        scale, margin, easy_margin, K, mp, k_top, do_lm: see wespeaker's.
    """

    def __init__(
        self,
        nout: int,
        nclasses: int,
        scale: float = 32.0,
        margin: float = 0.2,
        easy_margin: bool = False,
        K: int = 3,  # noqa: N803
        mp: float = 0.06,
        k_top: int = 5,
        do_lm: bool = False,
    ):
        wespeaker.ArcMarginProduct_intertopk_subcenter.__init__(
            self, nout, nclasses, scale, margin, easy_margin, K, mp, k_top, do_lm
        )

    def forward(  # type: ignore[override]
        self, input: Tensor, label: Tensor | None = None
    ) -> Judged:
        """Returns the mean loss, the accuracy and the nearest classes (N,); see :func:`judged`."""
        return judged(self, input, label, self.fused(), self.scale)


def judged(
    head: FusedHead, input: Tensor, label: Tensor | None, margin: nn.Module, scale: float
) -> Judged:
    """Returns the mean loss, the share of rows that are nearest to their class, and predictions.

    Neither of the latter two has a margin in it. The prediction of a right row is its label; only
    the other rows are swept for theirs. Without labels all are, and loss and accuracy are None.

    Args:
        input: embeddings (N, D).
        label: integers, (N,), (N, 1), or () for one row.
    """
    if label is None:
        return None, None, nearest(head, input)
    label = label.reshape(-1)
    loss, stats = head.fused_loss(input, label, margin=margin, scale=scale, return_stats=True)
    wrong = ~stats.correct
    predictions = label.masked_scatter(wrong, nearest(head, input[wrong]))
    return loss, stats.correct.float().mean(), predictions


def nearest(head: FusedHead, input: Tensor) -> Tensor:
    """Returns the nearest class of each row, (N,)."""
    return evaluation.topk(head.as_classes(), input, 1)[1].squeeze(1)
