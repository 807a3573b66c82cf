# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Saves and loads checkpoints that move between world sizes.

The format is that of ``torch.distributed.checkpoint``, with four promises more:

- A directory of the given name exists only as a whole checkpoint.
- Saving changes nothing that is saved.
- Loading checks everything before it changes anything, a checksum of every byte included.
- Loading runs no code from the files. ``torch.load(weights_only=True)`` reads tensors and settings,
  and the index is read by an unpickler that knows the index's own classes and no other.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from ..shard import in_group, raising_together, require_agreement
from . import files
from .extra import Extra
from .index import Index
from .optimizers import Optimizers, listed
from .staging import staged
from .state import State

# writes the checkpoints of async_save_checkpoint, one after another; Python waits for it at its end
_background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
_pending: Future[None] | None = None


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Writes the state of model and optimizer into a new directory. Collective.

    Each rank writes its own part, and one rank writes what all ranks hold alike. Files go to a
    directory beside ``path``, ``<name>.<random>.partial``, which is renamed in one step at the end.
    So ``path`` exists only as a whole checkpoint, and earlier checkpoints are not touched. Two
    saves at once do not mix: the second fails. A save that was killed leaves its partial directory,
    which nothing reads; delete such directories when no job is saving.
    ``torch.distributed.checkpoint.load`` reads checkpoints too.

    Args:
        path: a directory that does not exist yet, on storage that all ranks share.
        model: the head, or a module that contains it. A module wrapped in DistributedDataParallel
            saves as the one inside. The weights of
            :class:`marginkernels.compat.insightface.PartialFC_V2` are saved as one tensor of all
            classes.
        optimizer: an optimizer of the model's parameters, or a list of several, such as the
            backbone's and the head's; of ``torch.optim``, but not LBFGS, or of
            :mod:`marginkernels.optim`. The state is saved by the names of parameters, so that it
            may be loaded by other optimizers of the same kind: ``torch.optim.SGD`` of the whole
            model, say, or that and :class:`marginkernels.optim.SGD`.
        extra: what else a run needs to go on, by name: objects with ``state_dict()``, such as a
            scheduler or a GradScaler, and plain values, such as the number of the step. Rank 0's
            are saved.
        process_group: the ranks that save; None: the default group, or this process alone.

    Raises:
        FileExistsError: on all ranks, if ``path`` exists.
        ValueError, TypeError, RuntimeError, OSError: on all ranks, if arguments do not fit, a head
            is between the backward that moves it and ``step()``, or writing fails on one.
    """
    group = _group(process_group)
    _wait_for_earlier()
    folder = _agreed(path, optimizer, group)
    with raising_together(group):
        state = State(model, optimizer).to_save() | Extra(extra).to_save()
    write_state(folder, state, group)


def async_save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Future[None]:
    """Writes a checkpoint in the background, as :func:`save_checkpoint` does. Collective.

    It returns when the state has been copied into the memory of the CPU, so that training may go
    on. ``path`` exists when the checkpoint is whole. Another save, or a load, waits for the end of
    this one, and so does the end of the process.

    Args:
        process_group: a group of the ranks that save, for saves alone: the background exchanges
            messages while the training exchanges its own. ``dist.new_group(backend="gloo")`` makes
            one. None: this process alone, without a default group.
        path, model, optimizer, extra: those of :func:`save_checkpoint`.

    Returns:
        A future, whose ``result()`` waits for the end and raises the error of a write that failed.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks, if arguments do not fit, or a head is
            between the backward that moves it and ``step()``.
    """
    global _pending
    if in_group() and process_group in (None, dist.group.WORLD):
        raise ValueError(
            "process_group: expected a group for saves alone, dist.new_group(backend='gloo'), got "
            f"{'None' if process_group is None else 'the default group'}"
        )
    _wait_for_earlier()
    folder = _agreed(path, optimizer, process_group)
    with raising_together(process_group):
        state = staged(State(model, optimizer).to_save() | Extra(extra).to_save())
    _pending = _background.submit(write_state, folder, state, process_group)
    return _pending


def _wait_for_earlier() -> None:
    """Waits for a save in the background; who holds its future learns of its error."""
    if _pending is not None:
        _pending.exception()


def write_state(folder: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Writes the state and publishes the directory, or removes what it has written. Collective."""
    name = _on_first(group, lambda: files.new_folder(folder))
    partial = folder.with_name(name)
    try:
        with raising_together(group):
            if not partial.is_dir():
                raise ValueError(f"path: expected storage that all ranks share, got {folder}")
        writer = files.Writer(partial)
        with _as_ours(folder):
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
        sums = _gathered(group, writer.sums)
        _on_first(group, lambda: files.publish(partial, folder, sums))
    except BaseException:
        if _rank(group) == 0:
            files.remove(partial)
        raise


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    extra: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint of :func:`save_checkpoint` into model and optimizer in place. Collective.

    The number of ranks may have changed since the save. Names, shapes, settings and checksums are
    compared on all ranks before anything is changed. Only storage that fails between that and the
    reading leaves a part of the new values.

    Gradients stay as they are. Parameters without a saved state of the optimizer, such as
    parameters that were frozen, start afresh, and a warning names them. The state of a sampler need
    not be on both sides.

    The arguments are those of :func:`save_checkpoint`. The optimizer may have a state or not. Its
    parameter groups may differ from the saved ones, as long as each group's parameters were saved
    with the same settings. Weights and states are converted to the types that they have now.
    Objects of ``extra`` with ``load_state_dict()`` get the state that was saved under their name;
    a name that was not saved is an error.

    Returns:
        What was saved as ``extra``, by name: the plain values, and the states of objects.

    Raises:
        FileNotFoundError: on all ranks, if there is no checkpoint, or a partial one only.
        ValueError, TypeError, RuntimeError: on all ranks, if files do not fit the model, have
            changed since, or hold anything but tensors and plain settings.
    """
    group = _group(process_group)
    _wait_for_earlier()
    folder = _agreed(path, optimizer, group)
    if not _on_first(group, folder.is_dir):
        raise FileNotFoundError(f"path: expected a checkpoint, got {folder}, which does not exist")
    with raising_together(group), _as_ours(folder):
        state, others = State(model, optimizer), Extra(extra)
        index = Index(folder)
        targets = state.targets(index)
    parts = ("model", "extra", *(["optimizer"] if listed(optimizer) else []))
    with raising_together(group), _as_ours(folder):
        index.check_bytes(parts, _rank(group), 1 if group is None else dist.get_world_size(group))
    with raising_together(group), _as_ours(folder):
        state.read_settings(index)
        others.read(index)
    with _as_ours(folder):
        dcp.load(
            targets,
            storage_reader=index.reader(),
            process_group=group,
            no_dist=group is None,
        )
    state.apply()
    if _rank(group) == 0:
        for warning in index.warnings + state.warnings:
            warnings.warn(f"{folder}: {warning}", stacklevel=2)
    return others.apply()


def _group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return dist.group.WORLD if process_group is None and in_group() else process_group


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _agreed(
    path: str | os.PathLike[str],
    optimizer: Optimizers,
    group: dist.ProcessGroup | None,
) -> Path:
    """Returns the path, after an error on all ranks unless all give this one and this optimizer."""
    with raising_together(group):
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path: expected a path, got {type(path).__name__}")
        folder = Path(path)
    if group is not None:
        optimizers = [type(each).__name__ for each in listed(optimizer)]
        require_agreement(group, path=folder, optimizer=optimizers)
    return folder


def _gathered(group: dist.ProcessGroup | None, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of all ranks in one dictionary."""
    if group is None:
        return values
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, values, group)
    return {key: value for theirs in every for key, value in theirs.items()}


def _on_first(group: dist.ProcessGroup | None, function: Callable[[], Any]) -> Any:
    """Gives all ranks what the function returns or raises on the first rank; they wait for it."""
    if group is None:
        return function()
    result: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            result[0] = function()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result, group=group, group_src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


@contextlib.contextmanager
def _as_ours(path: Path) -> Iterator[None]:
    """Raises RuntimeError in place of errors of storage and of torch's CheckpointException.

    The latter is no Exception. A warning that there is no process group is left out, but not in a
    thread: filters of warnings are those of the whole process.
    """
    try:
        with contextlib.ExitStack() as stack:
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = f"{path}: rank {rank}: {type(cause).__name__}: {cause}"
        raise RuntimeError(reason) from error
    except OSError as error:
        raise RuntimeError(f"{path}: {error}") from error
