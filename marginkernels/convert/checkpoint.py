# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Holds what a checkpoint has about its classes, whatever project wrote it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from .rows import Grouped, Rows
from .trees import Path, leaves, named, removed


@dataclass
class Parameter:
    """Joins rows, of classes or centres, with the optimizer's state of them.

    Attributes:
        state: ``Rows`` where it has a row for each row, else a number, as the steps taken.
        settings: of the parameter's group in the optimizer; None: there is no optimizer.
    """

    rows: Rows
    state: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] | None = None

    def part(self, change: Callable[[Rows], Rows]) -> "Parameter":
        """Returns the parameter with all its rows changed."""
        state = {k: change(v) if isinstance(v, Rows) else v for k, v in self.state.items()}
        return replace(self, rows=change(self.rows), state=state)

    def value(self, key: str | None) -> Any:
        """Returns a state by name, or the rows themselves."""
        return self.rows if key is None else self.state[key]


# where a tree has weight, bias and their states: the name of the parameter, and of the state
Places = dict[Path, tuple[str, str | None]]


@dataclass
class Checkpoint:
    """Holds class weights (C K, D), their optimizer's state, and what else the files have.

    Attributes:
        format: the name of the format that was read.
        files: the files that were read.
        parameters: ``"weight"``, and ``"bias"`` (C,) where there is one.
        contents: the tree of each file.
        places: what the contents have of the parameters.
        states: the entries of the contents that are the optimizer's states of the parameters.
        sub_centers: K.
        notes: what to tell the user.
    """

    format: str
    files: list[FilePath]
    parameters: dict[str, Parameter]
    contents: list[Any]
    places: Places
    states: list[Path]
    sub_centers: int = 1
    notes: list[str] = field(default_factory=list)

    @property
    def weight(self) -> Rows:
        """Returns the class weights (C K, D)."""
        return self.parameters["weight"].rows

    @property
    def num_classes(self) -> int:
        """Returns C."""
        return len(self.weight) // self.sub_centers

    def regrouped(self, new_row: Tensor, new_class: Tensor, sub_centers: int) -> "Checkpoint":
        """Returns the checkpoint with other rows.

        Args:
            new_row: the new number of each row of the weight, -1 where it is left out.
            new_class: the same for the rows of the bias.
            sub_centers: K of the new weight.
        """
        new = {"weight": new_row, "bias": new_class}
        parameters = {}
        for name, parameter in self.parameters.items():
            parameter = parameter.part(partial(Grouped, new_row=new[name], directions=False))
            if name == "weight":
                parameter.rows = Grouped(self.weight, new_row, True)
            parameters[name] = parameter
        return replace(self, parameters=parameters, sub_centers=sub_centers)

    def others(self) -> list[tuple[Path, Any]]:
        """Returns what the contents have beside the parameters and their states."""
        return [pair for pair in leaves(self.contents[0]) if pair[0] not in self.places]

    def others_with(self, sizes: set[int]) -> list[str]:
        """Names other tensors of the contents that have a dimension of one of these sizes."""
        return [
            f"{named(path)} {tuple(value.shape)}"
            for path, value in self.others()
            if sizes & set(getattr(value, "shape", ()))
        ]

    def without_state(self) -> "Checkpoint":
        """Returns the checkpoint without the optimizer's state of the classes."""
        parameters = {name: Parameter(p.rows) for name, p in self.parameters.items()}
        places = {path: place for path, place in self.places.items() if place[1] is None}
        kept = self.contents
        for path in self.states:
            kept = [removed(tree, path) for tree in kept]
        return replace(self, parameters=parameters, contents=kept, places=places, states=[])
