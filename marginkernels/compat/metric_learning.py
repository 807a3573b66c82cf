# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Fuses classification losses of pytorch-metric-learning 2.9, whose trainers run with the import
changed::

    from marginkernels.compat.metric_learning import ArcFaceLoss

Each loss is a subclass of the one that it is named after, and has its arguments, ``state_dict``,
miners' weights, reducers, regularizers, statistics, ``get_logits`` and first weights. The element
losses come from one sweep over the classes, without the logits. A setting that has no fused form,
such as another distance, and a subclass that overrides the formula take the code of the original,
which holds the logits; a warning says so once. These things differ:

- Products are summed in float32 also where embeddings are float16.
- Angles at which the original's gradient is infinite, those of cosines 1 and -1, have a finite one.
- With an optimizer of :mod:`marginkernels.optim` the weights keep their type and device; without
  one they take those of the embeddings, as in the original.
- Errors about labels and shapes have other words.
"""

import warnings
from typing import Any, ClassVar

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from .. import margins, ops, validation
from .weights import FusedHead

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "ProxyNCALoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
]

_IGNORED = -100


class _FusedLoss(FusedHead):
    """Computes the loss dictionary of the class that comes next from one sweep."""

    # methods of the original that say what is computed; a subclass may have its own
    formula: ClassVar[tuple[str, ...]] = ("get_cosine", "modify_cosine_of_target_classes",
        "get_cos_with_margin", "get_angles", "get_target_mask", "scale_logits")  # fmt: skip
    ignored: ClassVar[int] = ops.NO_LABEL  # the label of rows that the original leaves at 0
    anchors_alone: ClassVar[bool] = False  # whether miners' weights count anchors alone

    # of the original
    distance: Any
    collect_stats: bool
    cast_types: Any
    add_weight_regularization_to_loss_dict: Any

    def __init__(self, *args: Any, **kwargs: Any):
        # until the original has drawn the weights, in the order of its memory
        self.__dict__["transposed"] = False
        super().__init__(*args, **kwargs)
        del self.__dict__["transposed"]
        self.register_parameter(self.weight_name, getattr(self, self.weight_name))
        self._warned = False

    def fused_options(self) -> dict[str, Any]:
        """Returns the options of :func:`marginkernels.margin_cross_entropy` for the settings.

        Raises:
            ValueError, TypeError: they have no fused form.
        """
        raise NotImplementedError

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, Any]:
        """Computes the loss dictionary, whose element losses have gradients."""
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        dtype = embeddings.dtype
        if self._update is None:
            self.cast_types(dtype, embeddings.device)
        try:
            self._check_formula()
            options = self.fused_options()
        except (ValueError, TypeError) as reason:
            self._tell(reason)
            original: Any = super()
            return original.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        weights = lmu.convert_to_weights(
            indices_tuple, labels, dtype=dtype, using_ref=self.anchors_alone
        )
        element = self._element_losses(embeddings, self.classes(labels), options)
        rows = self.counted(element, labels)
        loss_dict = {
            "loss": {
                "losses": (element * weights)[rows],
                "indices": c_f.torch_arange_from_size(embeddings)[rows],
                "reduction_type": "element",
            }
        }
        self.add_weight_regularization_to_loss_dict(loss_dict, self.rows())
        return loss_dict

    def _element_losses(
        self, embeddings: Tensor, labels: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Returns the losses (N,) in the type that the original has them in."""
        settings = dict(
            options, reduction="none", ignore_index=self.ignored,
            return_stats=bool(self.collect_stats),
        )  # fmt: skip
        element = self.fused_loss(embeddings, labels, **settings)
        if self.collect_stats:
            element, stats = element
            self._collect(embeddings, stats.target_cosine)
        # under autocast a cross-entropy is in float32
        autocast = torch.is_autocast_enabled(embeddings.device.type)
        return element if autocast else element.to(embeddings.dtype)

    def classes(self, labels: Tensor) -> Tensor:
        """Returns the class of each row."""
        return labels

    def counted(self, element: Tensor, labels: Tensor) -> slice | Tensor:
        """Returns the rows that the loss dictionary has."""
        return slice(None)

    def reference(self) -> Tensor:
        """Returns the rows that the distance compares the embeddings with."""
        return self.rows()

    def _check_formula(self) -> None:
        """Raises ValueError if a subclass, or another module in it, changes the formula."""
        ours = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        for name in self.formula:
            if getattr(type(self), name, None) is not getattr(ours, name, None):
                raise ValueError(f"{name}: expected that of {ours.__name__}, got an override")
        entropy = getattr(self, "cross_entropy", None)
        if entropy is not None and (
            type(entropy) is not nn.CrossEntropyLoss
            or entropy.weight is not None
            or (entropy.reduction, entropy.label_smoothing) != ("none", 0)
            or entropy.ignore_index != _IGNORED
        ):
            raise ValueError('cross_entropy: expected CrossEntropyLoss(reduction="none"), got '
                             f"{entropy}")  # fmt: skip

    def _tell(self, reason: Exception) -> None:
        """Says once that the logits are held.

        Raises:
            TypeError: an optimizer of :mod:`marginkernels.optim` moves the weights.
        """
        if self._update is not None:
            raise TypeError(
                f"{type(self).__name__}: expected settings with a fused form for an optimizer of "
                f"marginkernels.optim. {reason}"
            ) from reason
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} is not fused: the (N, C) logits are held. {reason}",
                stacklevel=2,
            )

    @torch.no_grad()
    def _collect(self, embeddings: Tensor, cosine: Tensor) -> None:
        """Collects the statistics that the original's distance and angles do."""
        distance, reference = self.distance, self.reference()
        distance.reset_stats()
        distance.set_default_stats(
            embeddings,
            reference,
            distance.maybe_normalize(embeddings),
            distance.maybe_normalize(reference),
        )
        if isinstance(self, losses.LargeMarginSoftmaxLoss):
            self.get_angles(cosine)


class _MarginLoss(_FusedLoss):
    """Holds W (D, C), and a margin on the target's cosine."""

    weight_name, transposed = "W", True
    normalize: ClassVar[str] = "both"
    scale: Any

    margin: Any

    def margin_module(self) -> nn.Module:
        """Makes the margin of the present settings."""
        raise NotImplementedError

    def fused_options(self) -> dict[str, Any]:
        _check_distance(self.distance, CosineSimilarity)
        validation.check_scale(self.scale)
        if isinstance(self.margin, Tensor) and self.margin.ndim:
            raise ValueError(f"margin: expected one number, got shape {tuple(self.margin.shape)}")
        return dict(margin=self.margin_module(), scale=self.scale, normalize=self.normalize)


class ArcFaceLoss(_MarginLoss, losses.ArcFaceLoss):
    """Takes cos(theta + margin), and cos(theta) - margin sin(margin) past theta = pi - margin.

    Arguments are those of ``pytorch_metric_learning.losses.ArcFaceLoss``, the margin in degrees:
    ``ArcFaceLoss(num_classes, embedding_size, margin=28.6, scale=64)``. The attribute ``margin`` is
    in radians. ``W`` is (D, C).
    """

    def margin_module(self) -> nn.Module:
        return margins.ArcFace(self.margin, branch="hard")


class SubCenterArcFaceLoss(_MarginLoss, losses.SubCenterArcFaceLoss):
    """Takes ArcFace of the nearest of ``sub_centers`` centres of each class.

    ``SubCenterArcFaceLoss(num_classes=..., embedding_size=..., margin=28.6, scale=64,
    sub_centers=3)``. ``W`` is (D, C K), the K columns of a class side by side. ``get_outliers`` is
    the original's.
    """

    def margin_module(self) -> nn.Module:
        return margins.ArcFace(self.margin, branch="hard")


class CosFaceLoss(_MarginLoss, losses.CosFaceLoss):
    """Takes cos(theta) - margin: ``CosFaceLoss(num_classes, embedding_size, margin=0.35,
    scale=64)``. ``W`` is (D, C).
    """

    def margin_module(self) -> nn.Module:
        return margins.CosFace(self.margin)


class LargeMarginSoftmaxLoss(_MarginLoss, losses.LargeMarginSoftmaxLoss):
    """Takes (-1)^k cos(margin theta) - 2k, times the norms of both sides:
    ``LargeMarginSoftmaxLoss(num_classes, embedding_size, margin=4, scale=1)``. ``W`` is (D, C).
    """

    normalize = "none"

    def margin_module(self) -> nn.Module:
        return margins.SphereFace(self.margin)


class SphereFaceLoss(_MarginLoss, losses.SphereFaceLoss):
    """Takes (-1)^k cos(margin theta) - 2k, times the norm of the embedding:
    ``SphereFaceLoss(num_classes, embedding_size, margin=4, scale=1)``. ``W`` is (D, C).
    """

    normalize = "weight"

    def margin_module(self) -> nn.Module:
        return margins.SphereFace(self.margin)


class NormalizedSoftmaxLoss(_FusedLoss, losses.NormalizedSoftmaxLoss):
    """Takes cos(theta) / temperature: ``NormalizedSoftmaxLoss(num_classes, embedding_size,
    temperature=0.05)``. ``W`` is (D, C).

    Fused are ``DotProductSimilarity``, with the embeddings normalised or not, and
    ``CosineSimilarity``.
    """

    weight_name, transposed = "W", True
    formula = ("get_logits",)
    ignored = _IGNORED
    temperature: Any

    def fused_options(self) -> dict[str, Any]:
        """Returns the options for the distance and the temperature."""
        _check_distance(self.distance, DotProductSimilarity, CosineSimilarity)
        validation.check_scale(self.temperature, "temperature")
        return dict(
            margin=margins.NSoftmax(),
            scale=1 / self.temperature,
            normalize="both" if self.distance.normalize_embeddings else "weight",
        )

    def reference(self) -> Tensor:
        """Returns the normalised rows."""
        return self.distance.normalize(self.rows())


class ProxyNCALoss(_FusedLoss, losses.ProxyNCALoss):
    """Takes the softmax of the negative distances to the proxies, times ``softmax_scale``:
    ``ProxyNCALoss(num_classes, embedding_size, softmax_scale=1)``. ``proxies`` is (C, D).

    Fused are ``LpDistance(power=2)``, the default, and ``DotProductSimilarity`` and
    ``CosineSimilarity``. As in the original a row whose target's probability is 0 in the type of
    the embeddings, or whose label is not a class, has no part in the loss.
    """

    weight_name = "proxies"
    formula = ("nca_computation",)
    ignored = _IGNORED
    anchors_alone = True
    softmax_scale: Any
    proxies: nn.Parameter

    def fused_options(self) -> dict[str, Any]:
        """Returns the options for the distance and the softmax's scale."""
        scale, distance = self.softmax_scale, self.distance
        validation.check_scale(scale, "softmax_scale")
        options: dict[str, Any] = dict(
            margin=margins.NSoftmax(), normalize="both" if distance.normalize_embeddings else "none"
        )
        if type(distance) is not LpDistance:
            _check_distance(distance, DotProductSimilarity, CosineSimilarity)
            return options | dict(scale=scale)
        _check_distance(distance, LpDistance, power=2)
        if not distance.normalize_embeddings:
            # -|x - p|^2 = 2 x p - |p|^2 - |x|^2, whose last is the same for all classes
            options["bias"] = -scale * self.proxies.square().sum(1)
        return options | dict(scale=2 * scale)

    def classes(self, labels: Tensor) -> Tensor:
        """Returns the labels, and -100 for those that are no class."""
        known = labels == labels.clamp(0, len(self.proxies) - 1).long()
        return torch.where(known, labels, _IGNORED).long()

    def counted(self, element: Tensor, labels: Tensor) -> Tensor:
        """Returns which rows have a class, and a probability of it above 0."""
        return (self.classes(labels) != _IGNORED) & (torch.exp(-element.detach()) != 0)


def _check_distance(distance: Any, *kinds: type, power: int = 1) -> None:
    """Raises ValueError unless it is one of the kinds, with p = 2 and this power."""
    if type(distance) not in kinds or (distance.p, distance.power) != (2, power):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"distance: expected {expected} with p=2 and power={power}, got "
            f"{type(distance).__name__} with p={distance.p} and power={distance.power}"
        )
