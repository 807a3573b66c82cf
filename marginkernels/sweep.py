# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes one pass over the classes held here: the sample, the transform, the tiles, the Function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, centers, numerics, ops
from .autograd import HeadFunction
from .batch import Batch
from .call import Call
from .distributed.base import Exchange
from .greatest import greatest_cosines
from .margins import name_of
from .norms import row_norm
from .results import SweepResult
from .sampling import sampled
from .transforms import IDENTITY, TRANSFORMS, Transform

_AUTO_TILES_BYTES = 256 << 20
# the rounded w that forward keeps for backward is at most this large
_ROUNDED_BYTES = 256 << 20


class Sweep:
    """Sweeps over the classes of one call.

    Args:
        exchange: merges the results of the ranks.
        call: the checked call.
        batch: the rows of all ranks.
    """

    def __init__(self, exchange: Exchange, call: Call, batch: Batch):
        self.exchange, self.call, self.batch = exchange, call, batch
        w, position, k = call.w, batch.local_class, call.settings.sub_centers
        count = w.shape[0] // k
        bias = None if call.bias is None else call.bias.to(call.stats_dtype)
        self.usable: Tensor | None = None  # whether the sample can be used, a bool () on the device
        self.index: Tensor | None = None  # the rows of w that are swept
        if call.sampling is not None:
            sample = call.sampling.choose(exchange, position.flatten(), count)
            if sample is not None:
                self.usable, self.index = sample.valid, sample.classes
                bias, position = sampled(
                    count, bias, position, sample.classes, call.sampling.logq, call.stats_dtype
                )
        self.state = [] if call.update is None else call.update.state()
        if w.shape[0] == 0:  # a rank without classes sweeps one that the merge leaves out
            self.index = None
            w, bias = F.pad(w, (0, 0, 0, k)), None if bias is None else F.pad(bias, (0, 1))
            self.state = [F.pad(t, (0, 0, 0, k)) for t in self.state]
        self.w, self.bias = w, bias
        # as labels: of the target among the rows of w that are swept, and in w, or -1
        self.position, self.target = position, batch.local_class
        self.transform = IDENTITY  # of the negatives
        if k > 1:
            self._choose_centers(k)

    def _choose_centers(self, k: int) -> None:
        """Goes over from classes to rows of w, k of each, the nearest of which is the target."""
        normalize_w, dtype = self.call.settings.normalize != "none", self.call.compute_dtype
        centre = centers.nearest(self.batch.x, self.w, self.target, k, normalize_w, dtype)
        self.position, self.target = (
            torch.where(place >= 0, place * k + centre, -1)
            for place in (self.position, self.target)
        )
        if self.bias is not None:
            self.bias = self.bias.repeat_interleave(k)
        if self.index is not None:
            self.index = centers.rows_of(self.index, k)

    @property
    def num_rows(self) -> int:
        """Returns the number of the rows of w that are swept."""
        return (self.w if self.index is None else self.index).shape[0]

    def scale(self) -> Tensor:
        """Returns the scale of the step, () in the statistics dtype.

        A scale that observes the batch beforehand moves first, by a sweep of its own.
        """
        scale, observer = self.call.scale, self.call.observer
        if observer is not None and not observer.delayed:
            with torch.no_grad():
                result = self._swept(self._tensor(scale), IDENTITY)
            observer.observe(result.lse, result.target_cosine, self.batch.kept())
            scale = observer()
        return self._tensor(scale)

    def result(self, scale: Tensor) -> SweepResult:
        """Makes the sweep that trains, and returns the results of all ranks."""
        call = self.call
        with torch.no_grad():
            self.transform = self._transform(scale.detach())
        result = self._swept(
            self.exchange.scale(scale, call.learns_scale),
            self.transform,
            save_tiles=self._learns() and saves_tiles(
                call.settings.save_tiles, call.tile_obstacles, self.batch.x.shape[0],
                self.num_rows, call.compute_dtype, call.backend,
            ),
            keep_rounded=self._learns() and self._keeps_rounded(),
            want_sum=call.settings.label_smoothing > 0 or call.margin.one_versus_rest,
            want_max=self.exchange.wants_stats,
        )  # fmt: skip
        observer = call.observer
        if observer is not None and observer.delayed:
            lse, cosine = result.lse.detach(), result.target_cosine.detach()
            observer.observe(lse, cosine, self.batch.kept())
        return result

    def _learns(self) -> bool:
        """Says whether there may be a backward."""
        wanted = self.batch.x.requires_grad or self.w.requires_grad
        return torch.is_grad_enabled() and wanted

    def _keeps_rounded(self) -> bool:
        """Decides whether forward keeps w as it rounds or gathers it."""
        call, d = self.call, self.w.shape[1]
        backend = backends.get(call.backend)
        if not backend.keeps_rounded(self.w.device, d) or torch.compiler.is_exporting():
            return False
        is_copied = self.index is not None or self.w.dtype != call.compute_dtype
        size = self.num_rows * d * call.compute_dtype.itemsize
        return is_copied and call.compute_dtype.itemsize == 2 and size <= _ROUNDED_BYTES

    def _swept(
        self,
        scale: Tensor,
        transform: Transform,
        save_tiles: bool = False,
        keep_rounded: bool = False,
        want_sum: bool = False,
        want_max: bool = False,
    ) -> SweepResult:
        """Sweeps over the classes of this rank, and merges the results of all ranks."""
        call, position, bias = self.call, self.position, self.bias
        settings = ops.SweepSettings(
            backend=call.backend, normalize_x=call.settings.normalize == "both",
            normalize_w=call.settings.normalize != "none", compute_dtype=call.compute_dtype,
            save_tiles=save_tiles, keep_rounded=keep_rounded, want_sum=want_sum,
            want_max=want_max, transform=transform.name, check_w=self.exchange.check_w,
            sub_centers=call.settings.sub_centers,
            update=0 if call.update is None else call.update.number,
        )  # fmt: skip
        known = None
        if call.update is not None and self.index is None:
            known = call.update.known_norms(self.w, call.compute_dtype)
        result = SweepResult(
            *HeadFunction.apply(
                self.batch.x, self.w, bias, scale, position, transform.row_parameter,
                transform.constants, self.index, known, settings, *self.state,
            )
        )  # fmt: skip
        if self.usable is not None:
            result = result._replace(lse=torch.where(self.usable, result.lse, torch.nan))
        if bias is not None:
            bias_y = torch.where(position >= 0, bias[position.clamp_min(0)], 0)
            result = result._replace(bias_y=bias_y)
        return self.exchange.merge(position, result, TRANSFORMS[transform.name].one_versus_rest)

    def _tensor(self, scale: float | Tensor) -> Tensor:
        dtype, device = self.call.stats_dtype, self.batch.x.device
        if not isinstance(scale, Tensor):
            return numerics.filled(scale, dtype, device)
        return scale.to(device, dtype)

    def _transform(self, scale: Tensor) -> Transform:
        """Asks the margin for its transform, and checks and casts the operands."""
        margin, dtype = self.call.margin, self.call.stats_dtype
        if not margin.transforms_negatives:
            return IDENTITY
        c = self.batch.x.new_empty(0, dtype=dtype)
        if margin.needs_target_cosine:
            c = self.exchange.total(self._target_cosine())
        rows, c = self.batch.rows(scale, c)
        if margin.hardest > 0:
            rows.hardest = self.exchange.greatest(self._hardest(margin.hardest))
        name, row_parameter, constants = margin.negatives(c, rows)
        if TRANSFORMS[name].one_versus_rest != margin.one_versus_rest:
            raise ValueError(
                f"margin: expected {name_of(margin)} to have one_versus_rest="
                f"{not margin.one_versus_rest} with the transform {name!r}"
            )
        if row_parameter is not None:
            if row_parameter.shape != rows.label.shape:
                raise ValueError(
                    f"margin: expected {name_of(margin)} to return a row_parameter "
                    f"{tuple(rows.label.shape)}, got {tuple(row_parameter.shape)}"
                )
            row_parameter = row_parameter.to(dtype)
        if constants is not None:
            # a constant may be a buffer, which moves before backward has read it
            constants = ops.snapshot(constants.to(self.batch.x.device, dtype))
        return Transform(name, row_parameter, constants)

    def _target_cosine(self) -> Tensor:
        """Computes the cosine of each row and its target, as labels are, as the sweep does.

        It is 0 where the target is not here.
        """
        dtype, count = self.call.compute_dtype, self.batch.labels_per_row
        w_y = self.w[self.target.clamp_min(0).flatten()]
        x = ops.rounded(self.batch.x, dtype).repeat_interleave(count, 0)
        norms = self.batch.x_norm().repeat_interleave(count) * row_norm(w_y, dtype)
        cosine = (x * ops.rounded(w_y, dtype)).sum(1) / norms
        return torch.where(self.position >= 0, cosine.view(self.position.shape), 0)

    def _hardest(self, k: int) -> Tensor:
        """Finds the k greatest cosines of each row to classes here that are not its own, (N, k)."""
        x, call = self.batch.x, self.call
        if call.w.shape[0] == 0:
            return x.new_full((len(x), k), -torch.inf, dtype=call.stats_dtype)
        return greatest_cosines(
            x, self.w, self.index, self.position, k, call.settings.sub_centers, call.compute_dtype
        )


def saves_tiles(
    asked: str | bool,
    obstacles: list[str],
    rows: int,
    num_classes: int,
    compute_dtype: torch.dtype,
    backend: str,
) -> bool:
    """Decides whether forward saves its exponentials for a backward that may come."""
    if asked is False or obstacles:
        return False
    if asked == "auto" and torch.compiler.is_exporting():
        return False  # the graph is for batches of any size
    height, width = backends.get(backend).tiles_shape(rows, num_classes) or (0, 0)
    return asked is True or height * width * compute_dtype.itemsize <= _AUTO_TILES_BYTES
