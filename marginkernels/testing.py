# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds the plain PyTorch head, and its error as a budget, for tests, benchmarks and examples."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .margins import Rows


def plain_margin_cross_entropy(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    margin: nn.Module,
    scale: float | Tensor,
    bias: Tensor | None = None,
    normalize: str = "both",
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    row_margin: Tensor | None = None,
) -> Tensor:
    """Computes the head as trainers write it: normalise, linear, margin, scatter, F.cross_entropy.

    It materialises the (N, C) logits several times. Arguments have the meaning that they have in
    :func:`margin_cross_entropy`. The linear layer runs in x's dtype or autocast's, and everything
    after it in at least fp32.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_norm, w_norm = x.to(wide).norm(dim=1), w.to(wide).norm(dim=1)
    class_of_row = torch.where(y == ignore_index, 0, y)
    logits = F.linear(
        F.normalize(x) if normalize == "both" else x,
        (F.normalize(w) if normalize != "none" else w).to(x.dtype),
    ).to(wide)
    target = logits.gather(1, class_of_row[:, None])[:, 0]
    norms = torch.ones_like(target)
    if normalize != "both":
        norms = x_norm
    if normalize == "none":
        norms = norms * w_norm[class_of_row]
    t = norms * margin(target / norms, Rows(class_of_row, x_norm, w_norm[class_of_row], row_margin))
    logits = scale * logits.scatter(1, class_of_row[:, None], t[:, None].to(wide))
    if bias is not None:
        logits = logits + bias
    row_loss = F.cross_entropy(
        logits, y, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    weight = (y != ignore_index).to(wide) * (1.0 if sample_weight is None else sample_weight)
    weighted = row_loss * weight
    if reduction == "none":
        return weighted
    return weighted.sum() / (weight.sum() if reduction == "mean" else 1)


def row_errors(got: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the l2 error of the rows of ``got`` and the l2 norm of those of ``exact``, in fp64.

    Both are (rows,). The rows of a vector are its numbers.
    """
    got, exact = (t.detach().double().unsqueeze(-1).flatten(1) for t in (got, exact))
    return (got - exact).norm(dim=1), exact.norm(dim=1)


def assert_within_budget(
    name: str, got: Tensor, plain: list[Tensor], exact: Tensor, conditioning: float = 1.0
) -> None:
    """Raises unless the l2 error is within twice the plain path's plus eps(got.dtype) times norm.

    A row's budget is twice the worst of the draws. A row in which the draws were lucky gets the
    worst relative error of the other rows. So that this hides nothing, the root mean square over
    the rows has to stay in the same budget.

    Args:
        got: the quantity that is judged.
        plain: the same from :func:`plain_margin_cross_entropy` in the same type, in several draws
            of its rounding errors.
        exact: the same from fp64.
        conditioning: multiplies eps where the problem amplifies one rounding.

    Raises:
        AssertionError: a row, or all of them together, is over budget.
    """
    error, norm = row_errors(got, exact)
    plain_error = torch.stack([row_errors(draw, exact)[0] for draw in plain]).amax(0)
    worst = (plain_error / norm)[norm > 0].amax() if bool((norm > 0).any()) else 0.0
    rounding = conditioning * torch.finfo(got.dtype).eps * norm
    budget = 2 * torch.maximum(plain_error, worst * norm) + rounding
    over = ~(error <= budget)  # a NaN is over
    if bool(over.any()):
        row = int((error - budget).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{name}: {int(over.sum())} of {len(over)} rows over budget; row {row}: error "
            f"{error[row]:.3g}, budget {budget[row]:.3g}, plain error {plain_error[row]:.3g}, "
            f"norm {norm[row]:.3g}"
        )
    together, allowed = error.norm(), 2 * plain_error.norm() + rounding.norm()
    if not together <= allowed:
        raise AssertionError(f"{name}: error of all rows {together:.3g}, budget {allowed:.3g}")
