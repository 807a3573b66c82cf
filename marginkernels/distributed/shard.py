# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Says which rank of a group holds which classes, and keeps equal what all ranks have to share.

:mod:`marginkernels.distributed.exchange` says what the ranks exchange in a step.

All ranks compute the same loss, over the rows of all ranks. A rank gets the gradient of its own
weights, as in one process, and of the features of its own rows, times the number of ranks
(``grad_scale``). It gets the whole gradient of learnable margins and scales, which all ranks hold.
Averaging that one over the ranks changes nothing.

Where the group is one dimension of a larger mesh, the replicas of a class see different rows. The
trainer then averages their gradients.
"""

import contextlib
import functools
import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import arguments

T = TypeVar("T")


def in_group() -> bool:
    """Returns whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def check_settings(grad_scale: str, even_batches: bool, max_local_batch: int | None) -> None:
    """Raises TypeError or ValueError for settings that a :class:`ClassShard` does not take."""
    if grad_scale not in ("ddp", "exact"):
        raise ValueError(f"grad_scale: expected 'ddp' or 'exact', got {grad_scale!r}")
    arguments.boolean("even_batches", even_batches)
    if max_local_batch is not None:
        arguments.integer("max_local_batch", max_local_batch)
        if even_batches:
            raise ValueError("max_local_batch: expected None with even_batches=True")


def chunk(total: int, ranks: int, rank: int) -> tuple[int, int]:
    """Returns the first class that a rank holds in DTensor's split, and the end of its classes.

    The split is that of ``torch.chunk``: ceil(total / ranks) classes on the first ranks, fewer or
    none on the last.
    """
    size = -(-total // ranks)
    return min(rank * size, total), min((rank + 1) * size, total)


def check_whole(name: str, total: int, sub_centers: int, ranks: int) -> None:
    """Raises ValueError where DTensor's split of the rows would cut a class of several."""

    def fits(total: int) -> bool:
        return chunk(total * sub_centers, ranks, 0)[1] == chunk(total, ranks, 0)[1] * sub_centers

    if not fits(total):
        nearest = next(more for more in itertools.count(total) if fits(more))
        raise ValueError(
            f"{name}: expected a number of classes with sub_centers={sub_centers} whose rows "
            f"DTensor splits over {ranks} ranks without cutting a class, such as {nearest}, got "
            f"{total}"
        )


@dataclass(frozen=True)
class ClassShard:
    """Names the classes [start, stop) that this process holds of ``total``, split over a group.

    Args:
        start, stop, total: any split whose parts, rank after rank, make up [0, total). A part may
            be empty.
        group: the process group that the classes are split over.
        grad_scale: "ddp" or "exact". With "ddp", dx is the gradient of the mean loss of the group's
            whole batch, times the size of the group: DistributedDataParallel averages the
            backbone's gradients over its ranks afterwards. "exact" leaves that factor out. dw is
            always the gradient.
        even_batches: a promise that all ranks give as many rows each time. It saves the gather of
            the numbers of rows, for which the host waits.
        max_local_batch: a promise that no rank ever gives more rows, which saves the same gather.
            Shorter batches are padded with rows that are ignored, but have their place in losses
            and statistics by row.

    With either promise every rank computes dx, also where no rank wants it. On a GPU the ranks then
    do not compare their settings, nor tell each other of errors, unless
    ``set_device_checks(True)``; all ranks have to ask for statistics, or none.

    With ``even_batches`` ``torch.compile`` takes the whole call into its graph. There the ranks
    never compare settings or tell each other of errors, and dx is computed by all ranks or by none:
    x requires its gradient on all of them, or on none.
    """

    start: int
    stop: int
    total: int
    group: dist.ProcessGroup
    grad_scale: str = "ddp"
    even_batches: bool = False
    max_local_batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "stop", "total"):
            arguments.integer(name, getattr(self, name), least=0)
        if not 0 <= self.start <= self.stop <= self.total or self.total < 1:
            raise ValueError(
                "shard: expected 0 <= start <= stop <= total and a class at least, got "
                f"start={self.start}, stop={self.stop}, total={self.total}"
            )
        check_settings(self.grad_scale, self.even_batches, self.max_local_batch)
        if not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(
                "group: expected a process group that this rank is in, got "
                f"{type(self.group).__name__}"
            )

    @classmethod
    def chunked(cls, total: int, group: dist.ProcessGroup, **settings: Any) -> "ClassShard":
        """Returns this rank's part of DTensor's split, which :func:`chunk` describes."""
        start, stop = chunk(total, dist.get_world_size(group), dist.get_rank(group))
        return cls(start, stop, total, group, **settings)

    @property
    def size(self) -> int:
        """Returns the number of classes held here."""
        return self.stop - self.start

    def rows(self, per_class: int) -> slice:
        """Returns which rows belong to the classes held here, where each class has some."""
        return slice(self.start * per_class, self.stop * per_class)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClassShard":
        return self  # a process group cannot be copied, and nothing here changes


@dataclass(frozen=True)
class Sharding:
    """Says over which ranks a head splits its classes.

    Args:
        over: the process group whose ranks split the classes, or a device mesh of one dimension,
            such as ``mesh["classes"]`` of a larger one.
        grad_scale, even_batches, max_local_batch: see :class:`ClassShard`.
    """

    over: dist.ProcessGroup | DeviceMesh
    grad_scale: str = "ddp"
    even_batches: bool = False
    max_local_batch: int | None = None

    def __post_init__(self) -> None:
        check_settings(self.grad_scale, self.even_batches, self.max_local_batch)
        if isinstance(self.over, DeviceMesh):
            if self.over.ndim != 1:
                raise ValueError(
                    "sharding: expected a device mesh of one dimension, such as mesh['classes'], "
                    f"got {self.over.ndim}: {self.over}"
                )
        elif not isinstance(self.over, dist.ProcessGroup):
            raise TypeError(
                "sharding: expected a process group that this rank is in, a device mesh of one "
                "dimension, a Sharding or None, got "
                f"{type(self.over).__name__}"
            )

    def split(
        self, total: int, device: torch.device | str | None, sub_centers: int = 1
    ) -> tuple[DeviceMesh, ClassShard]:
        """Returns the mesh that ``total`` classes are split over, and this rank's part of them.

        Args:
            device: of the classes, or None for the default device.

        Raises:
            ValueError: the group is not for this device, or the split would cut a class.
        """
        mesh = self._mesh(device)
        check_whole("num_classes", total, sub_centers, mesh.size())
        shard = ClassShard.chunked(
            total,
            mesh.get_group(),
            grad_scale=self.grad_scale,
            even_batches=self.even_batches,
            max_local_batch=self.max_local_batch,
        )
        return mesh, shard

    def _mesh(self, device: torch.device | str | None) -> DeviceMesh:
        if isinstance(self.over, DeviceMesh):
            return self.over
        types = [d.type for d in self.over._device_types]
        kind = (torch.get_default_device() if device is None else torch.device(device)).type
        if kind not in types:
            if device is not None and kind != "meta":
                raise ValueError(
                    f"device: expected one that the group is for, {types}, got {device}"
                )
            # gloo's groups are for GPUs too, where there may be none
            found = [t for t in types if t != "cpu" and torch.get_device_module(t).is_available()]
            kind = next(iter(found), "cpu")
        return DeviceMesh.from_group(self.over, kind)


def sharding_of(sharding: "Sharding | dist.ProcessGroup | DeviceMesh") -> Sharding:
    """Returns a :class:`Sharding` with its defaults for a process group or a device mesh."""
    return sharding if isinstance(sharding, Sharding) else Sharding(sharding)


def require_agreement(group: dist.ProcessGroup, **values: Any) -> None:
    """Raises ValueError on all ranks where the values differ, naming both. Collective.

    The values are compared, and shown, as strings.
    """
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, {name: str(value) for name, value in values.items()}, group)
    for name in values:
        require_same(name, [theirs.get(name) for theirs in every])


def require_same(name: str, values: list[Any]) -> None:
    """Raises ValueError where the ranks' values differ, naming two."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"{name}: expected the same on all ranks, got {values[0]} on rank 0 and {value} "
                f"on rank {rank}"
            )


def raise_together(group: dist.ProcessGroup, error: Exception | None) -> None:
    """Raises on every rank where one has an error: the rank's own, or the first other rank's.

    The error of another rank begins with its number. Collective.
    """
    kind = next((k for k in (ValueError, TypeError) if isinstance(error, k)), RuntimeError)
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, None if error is None else (kind, str(error)), group)
    if error is not None:
        raise error
    for rank, theirs in enumerate(every):
        if theirs is not None:
            kind, text = theirs
            raise kind(f"rank {rank}: {text}")


@contextlib.contextmanager
def raising_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Raises an error of the block on one rank on all ranks of the group, at the block's end.

    Collective unless the group is None. The block itself must not exchange anything.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    if group is not None:
        raise_together(group, error)
    elif error is not None:
        raise error


@torch.no_grad()
def copy_first(group: dist.ProcessGroup, tensors: Iterable[Tensor]) -> None:
    """Gives all ranks rank 0's values. Collective."""
    tensors = [t for t in tensors if not t.is_meta]
    values = [[t.cpu() for t in tensors]]  # objects, because the group may be of another device
    dist.broadcast_object_list(values, group=group, group_src=0)
    for t, value in zip(tensors, values[0], strict=True):
        t.copy_(value)


def sharded(local: Tensor, mesh: DeviceMesh, shape: tuple[int, ...]) -> Tensor:
    """Returns the DTensor of this shape, Shard(0), of which every rank gives its rows."""
    from torch.distributed.tensor import DTensor, Shard  # it takes seconds to import

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def local(tensor: T) -> T:
    """Returns a DTensor's rows on this rank, and any other tensor itself."""
    held: Any = tensor
    return held.to_local() if arguments.is_dtensor(held) else tensor


def held_shards(module: nn.Module) -> dict[str, tuple[Tensor, ClassShard]]:
    """Returns, by name, the weights and biases in a module of which this rank holds a part."""
    return {
        f"{path}.{own}" if path else own: (getattr(head, own), head.shard)
        for path, head in module.named_modules()
        if isinstance(getattr(head, "shard", None), ClassShard)
        for own in ("weight", "bias")
        if isinstance(getattr(head, own, None), Tensor)
    }


# wrappers that average or shard the gradients of the modules in them
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@functools.cache  # once
def watch_wrappers() -> None:
    """Lets :func:`is_wrapped` know of the modules that are wrapped from now on."""
    nn.modules.module.register_module_module_registration_hook(_watch_wrapper)


def _watch_wrapper(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if not _WRAPPERS.isdisjoint(kind.__name__ for kind in type(module).__mro__):
        _wrapped.add(module)


def is_wrapped(parameter: nn.Parameter) -> bool:
    """Returns whether a wrapper exchanges the parameter's gradients between processes."""
    return any(p is parameter for module in _wrapped for p in _exchanged(module))


def _exchanged(wrapper: nn.Module) -> Iterator[nn.Parameter]:
    ignored: Any = getattr(wrapper, "parameters_to_ignore", ())  # of DistributedDataParallel
    for name, parameter in wrapper.named_parameters():
        if name.removeprefix("module.") not in ignored:
            yield parameter


def look_for_replicas(head: Any) -> None:
    """Warns where the processes of a group would train copies of the head that drift apart."""
    if not (in_group() and torch.is_grad_enabled() and head.weight.requires_grad):
        return
    head._looked_for_replicas = True
    world = dist.get_world_size()
    # FullyShardedDataParallel puts a view of its own in the place of the parameter
    owned = isinstance(head.weight, nn.Parameter) and not head._split
    if world > 1 and owned and not is_wrapped(head.weight):
        warnings.warn(
            f"MarginSoftmaxHead: each of the {world} processes trains a head of its own, and "
            "their weights will differ. Split its classes (sharding=dist.group.WORLD, which is "
            "None before init_process_group) or "
            "put it into DistributedDataParallel. If you exchange its gradients yourself: "
            "warnings.filterwarnings('ignore', 'MarginSoftmaxHead: each')",
            stacklevel=3,
        )


@functools.cache  # once
def refuse_ddp() -> None:
    """Makes DistributedDataParallel refuse a model with a sharded head inside."""
    nn.modules.module.register_module_module_registration_hook(_refuse_ddp)


def _refuse_ddp(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # DDP registers the model before it copies rank 0's parameters to all ranks
    ddp = nn.parallel.DistributedDataParallel
    if submodule is None or name != "module" or not isinstance(module, ddp):
        return
    shards = list(held_shards(submodule))
    if not set(shards) <= set(module.parameters_to_ignore):
        raise ValueError(
            f"DistributedDataParallel: {', '.join(shards)} would be rank 0's on all ranks, but "
            "each holds its own classes. Wrap the backbone alone, or before wrapping call "
            "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, "
            f"{shards})"
        )
