# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Lets an optimizer move the class weights inside the backward sweep, once in a step.

A head with an optimizer of :mod:`marginkernels.optim` hands an :class:`Update` to its loss. Forward
opens it and keeps the token that it gets; backward calls the op ``marginkernels::head_step`` with
the token. The op asks the update whether it may write, and calls the backend's op of the same name.

Whatever may change from step to step stays behind the op, which torch.compile does not look into:
learning rates, accumulation, and whether the step is open.
"""

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import device_checks

_numbers = itertools.count(1)
_updates: "weakref.WeakValueDictionary[int, Update]" = weakref.WeakValueDictionary()

_ONE_STEP = (
    "The update of the class weights is part of backward, so that a step has one forward and one "
    "backward of the head"
)


class Numbers(NamedTuple):
    """Holds the numbers of one step, on the device of the weight."""

    of_step: Tensor  # (rules.NUMBERS,) in the statistics dtype
    random: Tensor  # (2,) int64: seed and number of the step


class RowGradients(NamedTuple):
    """Holds what the gradient of w is made of: the operands of a backward sweep, by rows of x."""

    x: Tensor  # (N, D) in the compute type
    y: Tensor  # (N,) or (N, L)
    lse: Tensor  # (N,)
    x_inv: Tensor  # (N,)
    grad_lse: Tensor  # (N,)
    grad_target: Tensor  # as y
    grad_w_norm: Tensor | None  # as y
    grad_sum: Tensor | None  # (N,)
    row_parameter: Tensor | None  # (N,)


class _Norms(NamedTuple):
    """Holds the norms that an update has written, and what tells whether they still hold."""

    w_inv: Tensor  # (C,)
    compute_dtype: torch.dtype
    storage: StorageWeakRef  # of w; a freed one is not taken for its successor in its place
    place: tuple[int, int]
    sample: Tensor  # of w, because its version does not tell of writes to w.data


class Update(ABC):
    """Keeps account of the steps of one optimizer, and refuses what a step cannot be.

    Subclasses say what is updated, and with which numbers.
    """

    optimizer: torch.optim.Optimizer
    rule: str  # of marginkernels.rules
    project: bool

    def __init__(self) -> None:
        self.number = next(_numbers)
        _updates[self.number] = self
        self.accumulates = False
        self.written = False  # whether backward came since the last step
        self.ended = False
        self.torn = ""  # what interrupted a step that had begun to write
        self._torn_version = 0  # of the weights after that
        self._state_loaded = False  # since then
        self._forwards: dict[int, StorageWeakRef] = {}  # alive, and not yet gone back through
        self._forward_numbers = itertools.count(1)
        self._kept: list[RowGradients] = []
        self._kept_place = (0, 0)  # of the weights when the first rows were kept
        self._shared: tuple[Any, ...] = ()  # what all kept rows have in common
        self._known: _Norms | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Returns None: a copy of the head is a plain head."""
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    @abstractmethod
    def weight(self) -> Tensor:
        """Returns the rows of the class weights that this rank holds, (C, D)."""

    @abstractmethod
    def state(self) -> list[Tensor]:
        """Returns the optimizer's state of these rows, (C, D) or (C, 1) each."""

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Returns what the optimizer has: the weight, and the bias where there is one."""

    @abstractmethod
    def numbers(self, upstream: list[Tensor], dtype: torch.dtype) -> Numbers:
        """Returns the numbers of the step; ``upstream`` are the gradients that arrive."""

    @property
    @abstractmethod
    def first_row(self) -> int:
        """Returns the number of this rank's first row among the weights of all ranks."""

    @abstractmethod
    def described(self) -> str:
        """Describes what has to be the same on all ranks."""

    def check(self, w: Tensor) -> None:
        """Raises RuntimeError if backward cannot update the weights ``w`` of a forward."""
        self._require_whole()

    def require_between_steps(self) -> None:
        """Raises RuntimeError while a step is under way, torn, or waits for its update."""
        self._require_whole()
        if self.written or self._kept:
            raise RuntimeError(
                "head_optimizer: expected no step under way, but there was a backward since the "
                "last step(). Call step() first"
            )

    def written_to(self, given: list[Tensor]) -> list[Tensor]:
        """Returns the tensors to update where backward was given these weights and state.

        Hooks on saved tensors may have made copies, which need not be exact. The row that stands
        in on a rank without classes remains.

        Raises:
            RuntimeError: another state has been loaded since forward.
        """
        own = [self.weight(), *self.state()]
        if len(own) != len(given):
            raise RuntimeError(
                "backward: expected the optimizer's state of forward, but another has been loaded "
                "since. Call the head again"
            )
        # aliases without the versions of what is saved, so that a second backward gets our error
        return [
            (mine if mine.shape == t.shape else t).data for mine, t in zip(own, given, strict=True)
        ]

    @abstractmethod
    def applied(self, numbers: Numbers, index: Tensor | None) -> None:
        """Hears that the rows ``index`` of the weights, or all, have been updated."""

    def open(self) -> Tensor:
        """Begins a forward, and returns its token, int64 (2,) on the CPU.

        Raises:
            RuntimeError: backward could not update the weights.
        """
        w = self.weight()
        self.check(w)  # here too, because a compiled forward has not called it
        if w.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "head: expected no capture of a CUDA graph, which would repeat the learning rate "
                "and the random numbers of one step. Capture the backbone alone, or take an "
                "optimizer of torch.optim"
            )
        number = next(self._forward_numbers)
        token = torch.tensor([number, hash(_place(w))], device="cpu")
        self._forwards = {n: ref for n, ref in self._forwards.items() if not ref.expired()}
        self._forwards[number] = StorageWeakRef(token.untyped_storage())
        return token

    def admit(self, token: Tensor) -> None:
        """Admits the backward of one forward.

        Raises:
            RuntimeError: the update would be wrong. Nothing has been written.
        """
        self._require_whole()
        self._forwards.pop(token.tolist()[0], None)
        if self.written:
            raise RuntimeError(
                f"backward: expected step() of the head's optimizer since the last one. {_ONE_STEP}"
                ". Accumulate with `with head_optimizer.accumulate():` around all but the last"
            )
        self.require_unchanged(token)
        if self._kept and self._kept_place != _place(self.weight()):
            self._kept = []
            raise RuntimeError(
                "accumulate: expected the class weights as they were for the batches before, but "
                "they have changed since. Those batches are dropped: begin the step again"
            )
        others = sum(not ref.expired() for ref in self._forwards.values())
        if others and not self.accumulates:
            raise RuntimeError(
                f"backward: expected one forward of the head in a step, got {1 + others}. "
                f"{_ONE_STEP}. Join the batches and call the head once, accumulate with `with "
                "head_optimizer.accumulate():` around all backward calls but the last, or call the "
                "head under torch.no_grad() where no gradient is wanted"
            )

    def require_unchanged(self, token: Tensor) -> None:
        """Raises RuntimeError if the weights have changed since the forward of the token."""
        if token.tolist()[1] != hash(_place(self.weight())):
            raise RuntimeError(
                "backward: expected the class weights as they were in forward, but they have "
                f"changed since. {_ONE_STEP}: retain_graph=True with a second backward, or a "
                "weight that is changed between the two, is not possible"
            )

    def keep(self, rows: RowGradients, shared: tuple[Any, ...]) -> None:
        """Keeps the rows of a batch for the update that is to come.

        Raises:
            RuntimeError: they cannot be in one sweep with rows that are kept already.
        """
        if self._kept and not all(
            itertools.starmap(_equal, zip(shared, self._shared, strict=True))
        ):
            raise RuntimeError(
                "accumulate: expected the same scale and the same state of the margin in all "
                "batches of a step, which one sweep updates the weights with, but they have moved. "
                "Put the margin or the adaptive scale into eval mode for the step"
            )
        if self._kept and self._kept[0].y.shape[1:] != rows.y.shape[1:]:
            raise RuntimeError(
                "accumulate: expected as many labels in a row in all batches of a step, got "
                f"{tuple(rows.y.shape)} after {tuple(self._kept[0].y.shape)}. Fill up with "
                "ignore_index"
            )
        if not self._kept:
            self._kept_place = _place(self.weight())
        # copies, because a compiled graph uses the memory of operands again
        self._kept.append(RowGradients(*map(_copied, rows)))
        self._shared = tuple(map(_copied, shared))

    def take_kept(self) -> RowGradients | None:
        """Returns the rows that were kept as one batch, and forgets them; None without any."""
        kept, self._kept = self._kept, []
        if not kept:
            return None
        x, *columns = zip(*kept, strict=True)
        return RowGradients(torch.cat(x), *(_joined(column, x) for column in columns))

    @property
    def keeps_rows(self) -> bool:
        """Says whether rows of earlier batches wait for their update."""
        return bool(self._kept)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Marks the step as torn while it is written, and the weights as changed afterwards."""
        self._known = None
        self.torn = "an error that is not known"
        try:
            yield
        except BaseException as error:
            self.torn, self._state_loaded = f"{type(error).__name__}: {error}", False
            raise
        finally:
            torch.autograd.graph.increment_version(self.weight())
            self._torn_version = version(self.weight())
        self.torn, self.written = "", True

    def close(self) -> None:
        """Ends the step.

        Raises:
            RuntimeError: there was no backward, or it kept its rows only, or was interrupted.
        """
        self._require_whole()
        if not self.written:
            waiting = " outside of accumulate()" if self._kept else ""
            raise RuntimeError(
                f"step: expected a backward of the head{waiting} since the last step, got none"
            )
        self.written = False

    def end(self) -> None:
        """Ends all that is under way: backward of an earlier forward is refused from now on."""
        self.reset()
        self.ended = True
        _updates.pop(self.number, None)

    def reset(self) -> None:
        """Forgets all that is under way, after the state has been loaded."""
        self.written, self._kept, self._known, self._state_loaded = False, [], None, True

    def remember_norms(self, w_inv: Tensor, compute_dtype: torch.dtype) -> None:
        """Keeps the inverse norms (C,) that the update has written."""
        w = self.weight()
        storage = StorageWeakRef(w.untyped_storage())
        # copies, as of rows that are kept
        sample = _sample(w.detach()).clone()
        self._known = _Norms(w_inv.clone(), compute_dtype, storage, _place(w), sample)

    def known_norms(self, w: Tensor, compute_dtype: torch.dtype) -> Tensor | None:
        """Returns the inverse norms (C,) of w, if nothing has changed it since they were kept."""
        if torch.compiler.is_compiling() or self._known is None:
            return None
        known = self._known
        same = (
            (known.compute_dtype, known.place) == (compute_dtype, _place(w))
            and known.w_inv.shape == w.shape[:1]
            and known.storage.cdata == StorageWeakRef(w.untyped_storage()).cdata
            and (
                not device_checks.checks_values(w.device)
                or torch.equal(known.sample, _sample(w.detach()))
            )
        )
        return known.w_inv if same else None

    def _require_whole(self) -> None:
        if self.torn and self._state_loaded and self._torn_version != version(self.weight()):
            self.torn = ""
        if self.torn:
            raise RuntimeError(
                "head_optimizer: expected whole steps, but the last one was interrupted while it "
                f"was written ({self.torn}): some classes are updated and some are not. Load "
                "weights and state of an earlier step (load_state_dict of both), then go on"
            )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def version(t: Tensor) -> int:
    """Returns a number that changes with each write to the tensor that torch knows of."""
    return -1 if t.is_inference() else t._version  # an inference tensor has none


def _place(w: Tensor) -> tuple[int, int]:
    """Returns address and version, one of which changes with each write that torch knows of."""
    return w.data_ptr(), w._version


def _sample(w: Tensor) -> Tensor:
    """Returns a view of some 1,000 of the numbers."""
    rows, features = w.shape
    return w[:: max(1, rows // 64), :: max(1, features // 16)]


def _joined(parts: tuple[Tensor | None, ...], rows: tuple[Tensor, ...]) -> Any:
    """Joins the numbers (n,) of batches; a batch without any counts as 0."""
    given = next((part for part in parts if part is not None), None)
    if given is None:
        return None
    return torch.cat(
        [given.new_zeros(len(x)) if p is None else p for p, x in zip(parts, rows, strict=True)]
    )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


def of_number(number: int) -> Update:
    """Returns the update with this number.

    Raises:
        RuntimeError: its optimizer is gone, or detached.
    """
    if number not in _updates:
        raise RuntimeError(
            "backward: expected the head's optimizer of forward, which is gone or detached. Call "
            "the head again"
        )
    return _updates[number]


def moved() -> "dict[int, Update]":
    """Returns the update of each parameter that one moves, by the parameter's id."""
    return {id(p): update for update in list(_updates.values()) for p in update.parameters()}


def holder(parameter: Tensor) -> Update | None:
    """Returns the update that moves this parameter, or None."""
    return moved().get(id(parameter))
