# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Collects, and restores, the state of a model and its optimizers by the names of parameters.

``torch.distributed.checkpoint.state_dict`` does it too, but gives an optimizer without state one by
a step with gradients of 0, and that step counts.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import (
    _get_fqns,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from ...arguments import is_dtensor
from ...generators import is_state_of_generators
from ...update import Update
from ..shard import ClassShard, held_shards
from .index import Index
from .optimizers import Optimizers, Settings, Trained, listed, python_number


class State:
    """Collects the state of a model and its optimizers, which is saved as that of one.

    Saving is :meth:`to_save`. Loading is :meth:`targets`, :meth:`read_settings`, the filling of the
    targets, and :meth:`apply`.

    Raises:
        ValueError, TypeError: the model or the optimizer has no state to save.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers):
        _check(model, optimizer)
        self.warnings: list[str] = []
        self._model = model
        self._shards = {
            _name(model, name): shard
            for name, (tensor, shard) in held_shards(model).items()
            if not is_dtensor(tensor)
        }
        self._in_model = get_model_state_dict(model)
        self._parameters = {_name(model, name): p for name, p in model.named_parameters()}
        names = {p: name for name, p in self._parameters.items()}
        self._trained = [Trained(each, names) for each in listed(optimizer)]
        self._names = [name for trained in self._trained for name in trained.names]
        twice = [name for name, count in Counter(self._names).items() if count > 1]
        if twice:
            raise ValueError(f"optimizer: expected each parameter in one, got {twice[0]} in more")
        self._of_parameter = {k: v for trained in self._trained for k, v in trained.state.items()}

    def to_save(self) -> dict[str, Any]:
        """Returns the whole state, as ``torch.distributed.checkpoint.save`` takes it.

        Raises:
            RuntimeError: a step that moves a head inside backward is under way, or torn.
        """
        for module in self._model.modules():
            update = getattr(module, "_update", None)
            if isinstance(update, Update):
                update.require_between_steps()
        in_model = {name: self._split(name, t) for name, t in self._in_model.items()}
        state: dict[str, Any] = {"model": in_model}
        if self._trained:
            of_parameter = {
                name: {key: self._storable(name, key, value) for key, value in values.items()}
                for name, values in self._of_parameter.items()
            }
            groups = [group for trained in self._trained for group in trained.saved_groups()]
            state["optimizer"] = {"state": of_parameter, "param_groups": groups}
        return state

    def _split(self, name: str, value: Any) -> Any:
        """Marks rows of a tensor that is split over ranks as plain tensors."""
        shard = self._shards.get(name)
        return value if shard is None else Rows(value, shard)

    def _storable(self, name: str, key: str, value: Any) -> Any:
        """Returns an entry of the optimizer's state of a parameter as it is saved."""
        parameter, shard = self._parameters[name], self._shards.get(name)
        on_one_rank = isinstance(value, Tensor) and not is_dtensor(value) and value.ndim
        if on_one_rank and shard is not None and len(value) == shard.size == len(parameter):
            return Rows(value, shard)
        if (on_one_rank or isinstance(value, dict | list | tuple)) and (
            shard is not None or is_dtensor(parameter)
        ):
            raise ValueError(
                f"optimizer: expected state of {name}, which is split over ranks, with a row for "
                f"each of its rows, got {key} {tuple(getattr(value, 'shape', ()))}"
            )
        return python_number(value)

    def targets(self, index: Index) -> dict[str, Tensor]:
        """Returns the tensors that take the entries of the checkpoint, by key.

        They are tensors of the model and the optimizer, and new ones where the optimizer has none.

        Raises:
            ValueError: the checkpoint does not fit.
        """
        self._targets: dict[str, Tensor] = {}
        self._settings: Settings = {}  # entries that are read by themselves
        self._model_targets(index)
        if self._trained:
            self._optimizer_targets(index)
        return self._targets

    def _model_targets(self, index: Index) -> None:
        """Finds the targets among the model's tensors, which have to be those of the checkpoint."""
        saved = index.grouped("model")
        for problem, differing in (
            ("has no", self._in_model.keys() - saved.keys()),
            ("has a", saved.keys() - self._in_model.keys()),
        ):
            # the state of random numbers need not be on both sides
            names = sorted(name for name in differing if not is_state_of_generators(name))
            if names:
                raise ValueError(f"model: expected that of {index.folder}, which {problem} {names}")
        for name in saved.keys() & self._in_model.keys():
            value = self._in_model[name]
            for key in saved[name]:
                if not isinstance(value, Tensor):  # a state that a module gives by itself
                    self._settings[key] = None
                    continue
                self._targets[key] = target = self._split(name, value)
                if target.size() != (shape := index.shape(key)):
                    raise ValueError(
                        f"model: expected {name} {shape and tuple(shape)} as in {index.folder}, "
                        f"got {tuple(target.size())}"
                    )

    def _optimizer_targets(self, index: Index) -> None:
        """Finds, or makes, the targets of the optimizer's state of each parameter."""
        if not index.under("optimizer", "param_groups"):
            raise ValueError(f"optimizer: expected None, as {index.folder} has no optimizer's")
        saved = index.grouped("optimizer", "state")
        for name in self._names:
            for key, path in saved.get(name, {}).items():
                shape = index.shape(key)
                if shape is None or not shape:
                    self._settings[key] = None
                else:
                    held = self._of_parameter.get(name, {}).get(path[0])
                    self._targets[key] = self._target(name, path[0], held, shape, index.dtype(key))
        fresh = [n for n in self._names if n not in saved and self._parameters[n].requires_grad]
        if saved and fresh:
            self.warnings.append(f"no optimizer state of {', '.join(fresh)}: it starts afresh")
        self._settings |= dict.fromkeys(index.under("optimizer", "param_groups"))

    def _target(
        self, name: str, key: str, held: Any, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """Returns room for the state ``key`` of a parameter: ``held`` where that fits.

        Args:
            held: what the optimizer has now.
            shape, dtype: of the state in the checkpoint.
        """
        parameter, shard = self._parameters[name].detach(), self._shards.get(name)
        whole = parameter if shard is None else Rows(parameter, shard)
        if isinstance(held, Tensor) and held.ndim and held.shape[1:] != shape[1:]:
            raise ValueError(
                f"optimizer: expected state of {name} as in the checkpoint, {key} {tuple(shape)}, "
                f"got {tuple(held.shape)}"
            )
        if shape == whole.size():
            room = torch.empty_like(parameter, dtype=dtype)
        elif is_dtensor(held) and held.shape == shape:
            room = torch.empty_like(held, dtype=dtype)
        elif is_dtensor(parameter):
            raise ValueError(
                f"optimizer: expected state of {name} {tuple(whole.size())}, got {key} "
                f"{tuple(shape)}"
            )
        elif shard is not None and shape[0] == shard.total:
            room = parameter.new_empty(shard.size, *shape[1:], dtype=dtype)
        else:
            shard, room = None, parameter.new_empty(shape, dtype=dtype)
        if type(held) is type(room) and (held.shape, held.dtype) == (room.shape, room.dtype):
            room = held
        return room if shard is None else Rows(room, shard)

    def read_settings(self, index: Index) -> None:
        """Reads all entries but the targets.

        Raises:
            ValueError: the optimizer's settings do not fit.
        """
        for key in self._settings:
            self._settings[key] = index.read(key)
        self._index = index
        for trained in self._trained:
            trained.take_settings(self._nested("optimizer")["param_groups"])

    def apply(self) -> None:
        """Gives model and optimizer the values that have been read."""
        set_model_state_dict(self._model, self._in_model | self._nested("model"))
        for trained in self._trained:
            trained.load(self._nested("optimizer").get("state", {}))

    def _nested(self, part: str) -> dict[str, Any]:
        """Returns the entries of a part of the checkpoint so far, as nested dictionaries."""
        found = {key: getattr(t, "rows", t) for key, t in self._targets.items()} | self._settings
        paths = self._index.under(part)
        return unflatten_state_dict({key: found[key] for key in paths if key in found}, paths)


class Rows(Tensor):
    """Holds this rank's rows of a tensor that is split over ranks in any way.

    torch's planners of checkpoints take it for a DTensor.
    """

    rows: Tensor
    shard: ClassShard
    whole: torch.Size  # of the tensor with the rows of all ranks
    piece: ChunkStorageMetadata  # the place of the rows in it

    def __new__(cls, rows: Tensor, shard: ClassShard) -> "Rows":
        """Marks rows as the classes of a shard."""
        self = rows.detach().as_subclass(cls)
        self.rows, self.shard = rows.detach(), shard
        self.whole = torch.Size([shard.total, *rows.shape[1:]])
        self.piece = ChunkStorageMetadata(
            torch.Size([shard.start] + [0] * (rows.ndim - 1)), rows.shape
        )
        return self

    def size(self) -> torch.Size:  # type: ignore[override]
        """Returns the size of the whole tensor."""
        return self.whole

    def on_cpu(self) -> "Rows":
        """Returns a copy in the memory of the CPU."""
        return Rows(self.rows.to("cpu", copy=True), self.shard)

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        if not self.rows.shape[0]:  # another rank's rows may start where these do
            return []
        properties = TensorProperties.create_from_tensor(self.rows)
        data = TensorWriteData(self.piece, properties, self.whole)
        return [WriteItem(MetadataIndex(key, self.piece.offsets), WriteItemType.SHARD, None, data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self.piece]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.rows


def _check(model: nn.Module, optimizer: Optimizers) -> None:
    """Raises ValueError or TypeError for a model or optimizer without a state to save."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    for each in listed(optimizer):
        if not hasattr(each, "param_groups"):
            raise TypeError(
                f"optimizer: expected one, or a list of them, or None, got {type(each).__name__}"
            )
        if isinstance(each, torch.optim.LBFGS):
            raise TypeError("optimizer: expected one with a state for each parameter, got LBFGS")
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(
                f"model: expected fully_shard, got {name or 'it'} in a FullyShardedDataParallel"
            )
        update, given = getattr(module, "_update", None), listed(optimizer)
        if given and isinstance(update, Update) and update.optimizer not in given:
            raise ValueError(
                "optimizer: expected all that train the model, [optimizer, head_optimizer], got "
                f"none of marginkernels.optim for {name or 'the head'}"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model: expected values, got {name} on the meta device")


def _name(model: nn.Module, name: str) -> str:
    """Returns the name of a parameter without the names of wrappers, as in torch's checkpoints."""
    [name] = _get_fqns(model, name)
    return name
