# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Tells the story of one call of :func:`margin_cross_entropy`."""

from typing import Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from . import loss, rotated_loss
from .batch import Batch
from .call import Operands, agreed, check
from .distributed.exchange import opened
from .distributed.shard import ClassShard
from .loss import HeadStats
from .options import Options
from .sampling import Sampling
from .settings import Settings
from .sweep import Sweep
from .update import Update


@overload
def margin_cross_entropy(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def margin_cross_entropy(
    x: Tensor, w: Tensor, y: Tensor, *, return_stats: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, HeadStats]: ...


@overload
def margin_cross_entropy(
    x: Tensor, w: Tensor, y: Tensor, *, return_stats: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, HeadStats]: ...


def margin_cross_entropy(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    margin: nn.Module,
    scale: float | Tensor | nn.Module,
    bias: Tensor | None = None,
    normalize: str = "both",
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    sample_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    row_margin: Tensor | None = None,
    label_weights: Tensor | None = None,
    other_labels: str = "exclude",
    compute_dtype: torch.dtype | None = None,
    save_tiles: str | bool = "auto",
    backend: str = "auto",
    sub_centers: int = 1,
    return_stats: bool = False,
    shard: ClassShard | None = None,
    sampling: Sampling | None = None,
    update: Update | None = None,
) -> Tensor | tuple[Tensor, HeadStats]:
    r"""Computes normalised linear layer, margin and softmax cross-entropy, without the (N, C)
     logits.

    The loss and gradients of, in plain PyTorch (``normalize="both"``)::

        cos = F.linear(F.normalize(x), F.normalize(w))  # (N, C)
        target = margin(cos.gather(1, y[:, None])[:, 0], rows)  # (N,)
        logits = scale * cos.scatter(1, y[:, None], target[:, None]) + bias
        loss = F.cross_entropy(logits, y, ignore_index=..., label_smoothing=...)

    computed in one sweep over the classes forward and one backward. The target is left out of the
    softmax sum by its index, and the loss is -logsigmoid(z_y - lse of the others): exact also where
    the loss is near 0. Losses that change the other classes' logits too, as CurricularFace, and
    one-versus-rest losses, which are no softmax, as SphereFace2, have their formula in
    :mod:`marginkernels.margins`; they need ``normalize="both"`` and no bias.

    Args:
        x: embeddings (N, D); float16, bfloat16, float32 or float64. N may be 0.
        w: class weights (C, D), row-major; any of the same dtypes, also another than x's. With
            ``sub_centers`` = K they are (C K, D).
        y: labels (N,), int64, in [0, C) or ``ignore_index``. Where values are not checked, as on a
            GPU, a row of any other label has the loss NaN and no gradient. Several labels of a row
            are (N, L), where a label may come twice, and a row with fewer is filled up with
            ``ignore_index``. Its loss is the sum of weight * cross-entropy over its labels.
        margin: a module of :mod:`marginkernels.margins`, or any ``nn.Module`` with
            ``forward(c, rows) -> t``; :mod:`marginkernels.margins.base` says what else it may have.
        scale: s > 0: a number, a 0-d tensor (learnable if it requires grad), or a module whose call
            gives one of these, as :class:`AdaCos`.
        bias: (C,), added to the logits after the margin, or None. -inf masks a class: it has no
            part in the softmax and no gradient; with label smoothing it is an error.
        normalize: "both" x and w are normalised, only the "weight", or "none"; logits of
            un-normalised sides keep the norms: the target logit is scale * |x| * |w_y| * t.
        reduction: "mean", "sum" or "none". "mean" is the sum of weight * loss over the sum of
            weight, over the rows kept; the mean of no rows is 0. "none" gives weighted losses (N,),
            0 for ignored rows.
        ignore_index: label of rows that take no part. Their x must still be finite.
        label_smoothing: epsilon in [0, 1): targets (1 - eps) + eps / C, others eps / C, as
            F.cross_entropy.
        z_loss: adds z_loss times the square of the log-sum-exp of all logits to each row's loss.
        focal_gamma: multiplies each row's cross-entropy by (1 - p_y)^gamma, p_y the target's
            probability: the focal loss (arXiv:1708.02002), row by row, with the factor's gradient.
            Others have other factors, which a loss without ``focal_gamma`` gives: the losses
            ``rows`` of ``reduction="none"``, or their ``mean``. sphereface_pytorch takes the factor
            for a constant, ``rows * (1 - torch.exp(-rows.detach())) ** gamma``. arcface-pytorch has
            one for the batch, ``mean * (1 - torch.exp(-mean)) ** gamma``.
        sample_weight: (N,) weights >= 0, or None.
        class_weight: (C,) weights >= 0, or None: each row has that of its class, times its
            ``sample_weight``, as ``weight`` of F.cross_entropy. The classes are those of all ranks.
            Label smoothing refuses it, and so do several labels, which have their own weights.
        row_margin: (N,) margins that replace the margin's m (CombinedMargin: m2), or None. That of
            a row is for all its labels.
        label_weights: (N, L) weights >= 0 of several labels, as mixup and CutMix have them (L = 2);
            a label of weight 0 is none. None: equal ones that add up to 1 in each row.
        other_labels: what the other labels of a row are to the cross-entropy of one: "exclude"
            leaves them out, so that each label stands against the classes that the row has not;
            with "negatives" they compete without a margin, as in L softmaxes of one label each. A
            margin sees each pair of a row and a label. A transform of the other classes takes the
            label with the greatest cosine for the target.
        compute_dtype: the type that x and w are rounded to; accumulation and statistics are fp32
            (fp64 for float64). None: autocast's where that is on, else x's; float64 if x or w is.
        save_tiles: whether forward keeps exp(z), 2 (bfloat16) or 4 (float32) bytes per logit, to
            save backward a quarter of its work. "auto" keeps at most 256 MiB. True is an error
            where they cannot be kept. They need ``normalize="both"``, a number below 73 as scale,
            float32 or bfloat16, and a backend that can. Bias, label smoothing, logq, sub_centers
            and a margin that changes the other classes forbid them.
        backend: "auto" (the best that runs here) or a name of :func:`marginkernels.backend_report`.
        sub_centers: K, the rows of ``w`` that each class has, its centres: ``w`` is (C K, D), and
            class c has the rows c K to c K + K - 1. The centre with the greatest cosine (without
            normalised weights, the greatest product) stands for its class and alone gets a
            gradient, of equals the first (Deng et al., ECCV 2020). All else counts classes.
        return_stats: also return :class:`HeadStats`, from the same sweep.
        shard: a :class:`ClassShard`, which says which classes ``w`` and ``bias`` hold. The other
            ranks hold the other classes, and make the same call. x, y, sample_weight, row_margin
            and label_weights are this rank's rows. y, class_weight and a margin's table count the
            classes of all ranks. The loss is that of all ranks' rows, the same on each; with "none"
            the rows come rank after rank. dx is times the number of ranks unless the shard says
            otherwise.
        sampling: :class:`PartialFC`, a step on a sample of the classes, or None for all.
        update: of an optimizer of :mod:`marginkernels.optim`, which moves ``w`` in backward, so
            that ``w`` gets no gradient; a head passes its own. None: ``w`` gets its gradient.

    Returns:
        The loss, fp32 (float64 for float64), () or (N,); with ``return_stats`` a pair with
        :class:`HeadStats`. dx has x's dtype, dw has w's. A row of norm below 1e-12 (float16: 1e-4)
        on a normalised side has gradient 0.

    Raises:
        ValueError, TypeError: bad input, naming the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here, for the reasons that the message lists; or
            a second derivative is asked for.
    """
    settings = Settings(
        normalize, reduction, ignore_index, label_smoothing, z_loss, focal_gamma, compute_dtype,
        save_tiles, backend, sub_centers, other_labels,
    )  # fmt: skip
    operands = Operands(x, w, y, bias, sample_weight, row_margin, label_weights, class_weight)
    exchange, call = opened(
        shard, x, w,
        lambda: check(settings, operands, margin, scale, shard, sampling, update, return_stats),
        lambda call: agreed(call, margin, scale),
        bool(return_stats),
    )  # fmt: skip

    batch = Batch(exchange, call, loss.drawn(call) if exchange.is_split else None)
    sweep = Sweep(exchange, call, batch)
    s = sweep.scale()
    result = sweep.result(s)

    rotation = rotated_loss.rotation_of(call)
    if rotation is None:
        value, seen = loss.loss(call, batch, result, s, sweep.transform, return_stats)
    else:
        value, seen = rotated_loss.loss(call, batch, result, s, rotation, return_stats)
    return value if seen is None else (value, seen)
