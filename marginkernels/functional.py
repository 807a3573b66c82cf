# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""``margin_cross_entropy``: validation, the call of the sweep, and the loss of :mod:`.loss`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, loss, ops, sampling
from .autograd import HeadFunction
from .call import Settings, agreed, check
from .distributed.exchange import opened
from .distributed.shard import ClassShard
from .loss import HeadStats
from .margins import Rows
from .results import SweepResult
from .transforms import IDENTITY, Transform

_AUTO_TILES_BYTES = 256 << 20


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
    row_margin: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    save_tiles: str | bool = "auto",
    backend: str = "auto",
    return_stats: bool = False,
    shard: ClassShard | None = None,
    sample_rate: float = 1.0,
    logq: bool = False,
    generator: torch.Generator | None = None,
    sampler: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | tuple[Tensor, HeadStats]:
    r"""Normalised linear layer, margin and softmax cross-entropy, without the (N, C) logits.

    The loss and gradients of, in plain PyTorch (``normalize="both"``)::

        cos = F.linear(F.normalize(x), F.normalize(w))  # (N, C)
        target = margin(cos.gather(1, y[:, None])[:, 0], rows)  # (N,)
        logits = scale * cos.scatter(1, y[:, None], target[:, None]) + bias
        loss = F.cross_entropy(logits, y, ignore_index=..., label_smoothing=...)

    computed in one sweep over the classes forward and one backward. The target is left out of the
    softmax sum by its index, and the loss is -logsigmoid(z_y - lse of the others): exact also where
    the loss is near 0. Losses that change the other classes' logits too, as CurricularFace, have
    their formula in :mod:`marginkernels.margins`; they need ``normalize="both"`` and no bias.

    Args:
        x: embeddings (N, D); float16, bfloat16, float32 or float64. N may be 0.
        w: class weights (C, D), row-major; any of the same dtypes, also another than x's.
        y: labels (N,), int64, in [0, C) or ``ignore_index``. Where values are not checked, as on a
            GPU, a row of any other label has the loss NaN and no gradient.
        margin: a module of :mod:`marginkernels.margins`, or any ``nn.Module`` with
            ``forward(c, rows) -> t``; :mod:`marginkernels.margins.base` says what else it may have.
        scale: s > 0: a number, a 0-d tensor (learnable if it requires grad), or a module whose call
            gives one of these, as :class:`AdaCos`.
        bias: (C,), added to the logits after the margin, or None. -inf masks a class: it has no
            part in the softmax and no gradient; with label smoothing it is an error.
        normalize: "both" x and w are normalised, only the "weight", or "none"; logits of
            un-normalised sides keep the norms: the target logit is scale * |x| * |w_y| * t.
        reduction: "mean" (sum of weight * loss over sum of weight, over the rows kept; 0 where that
            is 0/0), "sum", or "none" (weighted losses (N,), 0 for ignored rows).
        ignore_index: label of rows that take no part. Their x must still be finite.
        label_smoothing: epsilon in [0, 1): targets (1 - eps) + eps / C, others eps / C, as
            F.cross_entropy.
        z_loss: adds z_loss times the square of the log-sum-exp of all logits to each row's loss.
        focal_gamma: multiplies each row's cross-entropy by (1 - p_y)^gamma, p_y the target's
            probability: the focal loss (arXiv:1708.02002).
        sample_weight: (N,) weights >= 0, or None.
        row_margin: (N,) margins that replace the margin's m (CombinedMargin: m2), or None.
        compute_dtype: the type that x and w are rounded to; accumulation and statistics are fp32
            (fp64 for float64). None: autocast's where that is on, else x's; float64 if x or w is.
        save_tiles: whether forward keeps exp(z), 2 (bfloat16) or 4 (float32) bytes per logit, to
            save backward a quarter of its work. "auto" keeps at most 256 MiB. True needs both sides
            normalised, no bias, no smoothing, a margin that leaves the other classes alone, a
            number below 73 as scale, float32 or bfloat16 and a backend that can.
        backend: "auto" (the best that runs here) or a name of :func:`marginkernels.backend_report`.
        return_stats: also return :class:`HeadStats`, from the same sweep.
        shard: which classes of how many ``w`` and ``bias`` hold, the others being held by other
            ranks that make the same call: a :class:`ClassShard`. Then x, y, sample_weight and
            row_margin are this rank's rows, y and a margin's table count the classes of all ranks,
            the loss is that of all ranks' rows and the same on each ("none": of all rows, rank
            after rank); dx is times the number of ranks unless the shard says otherwise.
        sample_rate: the share of the classes (of each rank) that a step is computed on, in (0, 1]:
            Partial FC (arXiv:2203.15565). The rows' own classes and as many others at random as
            make it max(int(rate C), min(N, C)); all other classes have gradient 0.
        logq: adds -log(pi) to the logits of the classes sampled at random, pi = (n - P) / (C - P)
            for n sampled of C (on the rank), P of them the rows' own: the sum over the sample then
            estimates that over all.
        generator: of the sample, on x's device; None: torch's default one.
        sampler: chooses the classes instead: a function of the rows' classes (N,), -1 for those
            that ``w`` does not hold, to the sorted indices of a row of ``w`` at least, the rows'
            own among them. On a GPU a bad sample gives the loss NaN, as a bad label does.

    Returns:
        The loss, fp32 (float64 for float64), () or (N,); with ``return_stats`` a pair with
        :class:`HeadStats`. dx has x's dtype, dw has w's. A row of norm below 1e-12 (float16: 1e-4)
        on a normalised side has gradient 0.

    Raises:
        ValueError, TypeError: bad input, naming the argument, what was expected and what came.
        RuntimeError: the named backend cannot run here, with all reasons; a second derivative is
        asked for.
    """
    settings = Settings(
        normalize, reduction, ignore_index, label_smoothing, z_loss, focal_gamma, compute_dtype,
        save_tiles, backend, sample_rate, logq,
    )  # fmt: skip
    rows_given = dict(sample_weight=sample_weight, row_margin=row_margin)
    exchange, call = opened(
        shard, x, w,
        lambda: check(
            settings, x, w, y, margin, scale, bias, shard, sampler, generator, **rows_given,
        ),
        lambda call: agreed(settings, call, margin, scale, bias, shard, sampler, **rows_given),
        return_stats,
    )  # fmt: skip
    scale, observer, compute_dtype, backend = (
        call.scale, call.observer, call.compute_dtype, call.backend,
    )  # fmt: skip
    num_classes = w.shape[0] if shard is None else shard.total
    stats_dtype = ops.statistics_dtype(compute_dtype)

    noise = None if shard is None else _noise(margin, x)
    x, label = exchange.features(call.x, x.dtype), exchange.rows(call.label, fill=ignore_index)
    x_norm = exchange.of_own_rows(call.x_norm, loss.row_norm, x, compute_dtype)
    sample_weight, row_margin, noise = (
        None if given is None else exchange.rows(given)
        for given in (sample_weight, row_margin, noise)
    )
    kept = label != ignore_index
    valid = kept & (label >= 0) & (label < num_classes)  # on a GPU labels are not checked
    rows = Rows(torch.where(valid, label, 0), x_norm, None, row_margin, valid, noise)
    label = exchange.held(torch.where(valid, label, -1))
    bias = None if bias is None else bias.to(stats_dtype)
    uniform = None
    if sampler is None and sample_rate < 1:
        uniform = sampling.uniform(w.shape[0], sample_rate, generator)
    w, bias, label, sample_ok = _swept_classes(
        exchange, w, bias, label, sampler, uniform, logq, stats_dtype
    )
    keep_tiles = _keep_tiles(save_tiles, call.tile_obstacles, x, w, compute_dtype, backend)

    def sweep(
        scale: Tensor, transform: Transform, save_tiles: bool, want_sum: bool, want_max: bool
    ) -> SweepResult:
        settings = ops.SweepSettings(
            backend, normalize == "both", normalize != "none", compute_dtype, save_tiles, want_sum,
            want_max, transform.name, exchange.check,
        )  # fmt: skip
        result = SweepResult(*HeadFunction.apply(
            x, w, bias, scale, label, transform.row_parameter, transform.constants, settings
        ))  # fmt: skip
        if sample_ok is not None:
            result = result._replace(lse=torch.where(sample_ok, result.lse, torch.nan))
        if bias is not None:
            bias_y = torch.where(label >= 0, bias[label.clamp_min(0)], 0)
            result = result._replace(bias_y=bias_y)
        return exchange.merge(label, result)

    if observer is not None and not observer.delayed:
        with torch.no_grad():
            result = sweep(_scale_tensor(scale, x, stats_dtype), IDENTITY, False, False, False)
        observer.observe(result.lse, result.target_cosine, valid)
        scale = observer()
    scale = _scale_tensor(scale, x, stats_dtype)
    transform = _transform(margin, x, w, label, rows, compute_dtype, exchange)
    lse, d, w_norm, logit_sum, logit_max, bias_y = sweep(
        exchange.scale(scale, call.learns_scale), transform, keep_tiles, label_smoothing > 0,
        exchange.wants_stats,
    )  # fmt: skip
    if observer is not None and observer.delayed:
        observer.observe(lse.detach(), d.detach(), valid)

    found = w_norm.detach() > 0  # a rank holds the row's class
    rows = rows._replace(w_norm=torch.where(found, w_norm, 1.0))
    norms = loss.unnormalised_norms(normalize, rows)
    c = d if norms is None else d / norms
    bias_y = 0.0 if bias_y is None else bias_y
    if return_stats:  # now, because a margin may overwrite the cosines
        cosine = torch.where(found, c, 0.0).detach()
        correct = (found & (scale * d + bias_y > logit_max)).detach()
    t = loss.margined(margin, c, rows)
    z_y = scale * (t if norms is None else norms * t) + bias_y
    row_loss = loss.row_losses(
        z_y, lse, logit_sum, num_classes, label_smoothing, focal_gamma, z_loss
    )
    if hasattr(margin, "regularizer"):
        row_loss = row_loss + margin.regularizer(rows)
    # a label that no rank holds must not pass for a loss; its row has no gradient
    row_loss = torch.where(found, row_loss, torch.where(kept, torch.nan, 0.0))
    result = loss.reduced(row_loss, kept, sample_weight, reduction)
    return (result, HeadStats(cosine, correct, row_loss.detach())) if return_stats else result


def _swept_classes(
    exchange, w, bias, label, sampler, uniform, logq, dtype
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Weights and bias of the classes that the sweep is over, the rows' labels among them, and
    whether the user's sample can be used, a bool () on the device, or None where there is none.
    """
    valid = None
    if sampler is not None:
        w, bias, label, valid = sampling.chosen(exchange, sampler, w, bias, label, logq, dtype)
    elif uniform is not None:
        w, bias, label = sampling.sampled(w, bias, label, uniform(label), logq, dtype)
    if w.shape[0] == 0:  # a rank without classes sweeps one that the merge leaves out
        w, bias = F.pad(w, (0, 0, 0, 1)), None if bias is None else F.pad(bias, (0, 1))
    return w, bias, label, valid


def _noise(margin: nn.Module, x: Tensor) -> Tensor | None:
    """What a margin draws for each row, where it does; by the row's own rank."""
    return margin.draw(x) if hasattr(margin, "draw") and margin.training else None


def _keep_tiles(
    save_tiles: str | bool, obstacles: list[str], x: Tensor, w: Tensor, compute_dtype, backend
) -> bool:
    """Whether forward saves its exponentials."""
    if save_tiles is False or obstacles:
        return False
    if not (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)):
        return False  # no backward will read them
    if save_tiles == "auto" and torch.compiler.is_exporting():
        return False  # the graph is for batches of any size
    height, width = backends.get(backend).tiles_shape(x.shape[0], w.shape[0])
    nbytes = height * width * compute_dtype.itemsize
    return save_tiles is True or nbytes <= _AUTO_TILES_BYTES


def _scale_tensor(scale: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(scale, Tensor):
        # times one: torch.tensor(scale) and torch.full would compile a graph for each value
        scale = torch.ones((), dtype=dtype, device=x.device) * scale
    return scale.to(x.device, dtype)


@torch.no_grad()
def _transform(
    margin: nn.Module, x: Tensor, w: Tensor, label: Tensor, rows: Rows, compute_dtype, exchange
) -> Transform:
    """What the margin makes of the negatives, its operands in the statistics dtype."""
    if not hasattr(margin, "negatives"):
        return IDENTITY
    needs_c = getattr(margin, "needs_target_first", True)
    c = None
    if needs_c:
        c = exchange.total(_target_cosine(x, w, label, rows.x_norm, compute_dtype))
    name, row_parameter, constants = margin.negatives(c, rows)
    dtype = ops.statistics_dtype(compute_dtype)
    if row_parameter is not None:
        if row_parameter.shape != rows.label.shape:
            raise ValueError(
                f"margin: expected {type(margin).__name__} to return a row_parameter "
                f"{tuple(rows.label.shape)}, got {tuple(row_parameter.shape)}"
            )
        row_parameter = row_parameter.to(dtype)
    if constants is not None:
        # a constant may be a buffer, which moves before backward has read it
        constants = ops.snapshot(constants.to(x.device, dtype))
    return Transform(name, row_parameter, constants)


def _target_cosine(x: Tensor, w: Tensor, label: Tensor, x_norm: Tensor, compute_dtype) -> Tensor:
    """c of each row and its class, (N,), of the rounded operands as in the sweep; 0 where the class
    is not here.
    """
    w_y = w[label.clamp_min(0)]
    dot = (ops.rounded(x, compute_dtype) * ops.rounded(w_y, compute_dtype)).sum(1)
    return torch.where(label >= 0, dot / (x_norm * loss.row_norm(w_y, compute_dtype)), 0)
