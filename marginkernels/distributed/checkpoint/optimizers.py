# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names the state and the settings of optimizers by parameters, and moves them between optimizers.

Several optimizers are saved as one. So a parameter's state may be loaded by another optimizer that
takes the same steps, ``torch.optim.SGD`` and :class:`marginkernels.optim.SGD`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...optim.loading import MEANS, OF_PARAMETERS

# settings that may differ between optimizers that take the same steps
_MEANS = MEANS | {"seed"}
# the values of settings that optimizers without them have, where it is not None, False or 0
_WITHOUT = {"decoupled_weight_decay": True}

Settings = dict[str, Any]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def listed(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """Returns the optimizers as a list."""
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


class Trained:
    """Holds the groups and the state of an optimizer, with names in the place of parameters.

    Args:
        names: of the parameters of the model.

    Raises:
        ValueError: the optimizer has a parameter that is not the model's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]):
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            if p not in names:
                raise ValueError(
                    f"optimizer: expected parameters of the model, got one of {tuple(p.shape)}"
                )
        self.names = [names[p] for p in parameters]
        packed = optimizer.state_dict()
        self.state = {self.names[i]: values for i, values in packed["state"].items()}
        self.groups = [
            group | {"params": [self.names[i] for i in group["params"]]}
            for group in packed["param_groups"]
        ]

    def saved_groups(self) -> list[Settings]:
        """Returns the groups as they are saved."""
        return [{key: python_number(v) for key, v in group.items()} for group in self.groups]

    def take_settings(self, saved: list[Settings]) -> None:
        """Takes the settings that the parameters of each group were saved with.

        Raises:
            ValueError: they are those of several groups, or of another kind of optimizer.
        """
        self.groups = [_group_as_saved(group, saved, self.optimizer) for group in self.groups]

    def load(self, state: dict[str, Any]) -> None:
        """Gives the optimizer its groups, and the state of its parameters."""
        numbers = {name: i for i, name in enumerate(self.names)}
        groups = [g | {"params": [numbers[name] for name in g["params"]]} for g in self.groups]
        own = {numbers[name]: values for name, values in state.items() if name in numbers}
        self.optimizer.load_state_dict({"state": own, "param_groups": groups})


def _group_as_saved(
    group: Settings, saved: list[Settings], optimizer: torch.optim.Optimizer
) -> Settings:
    """Returns a parameter group with the settings that its parameters were saved with."""
    sources = [s for s in saved if set(s["params"]) & set(group["params"])]
    settings = [_converted(s, group, optimizer) for s in sources]
    compared = [{k: v for k, v in s.items() if k not in _MEANS} for s in settings]
    for i, other in enumerate(compared):
        if other != compared[0]:
            raise ValueError(
                f"optimizer: expected the settings {compared[0]} for all parameters of a "
                f"group, got {other} too, in which {sources[0]['params'][0]} and "
                f"{sources[i]['params'][0]} were saved"
            )
    return group | copy.deepcopy(settings[0]) if settings else group


def _converted(saved: Settings, group: Settings, optimizer: torch.optim.Optimizer) -> Settings:
    """Returns the saved settings of a group as the optimizer has them.

    Raises:
        ValueError: the optimizer would take other steps than the one that was saved.
    """
    found = {key: value for key, value in saved.items() if key not in OF_PARAMETERS}
    lacking = optimizer.defaults.keys() - found.keys()
    foreign = {key for key in found.keys() - group.keys() if key != "initial_lr"}
    if not lacking:
        return found
    # of another class: one that takes the same steps has the same settings, as far as they matter
    differing = [
        sorted(key for key in keys if key not in _MEANS and _matters(key, given[key]))
        for keys, given in ((foreign, found), (lacking, group))
    ]
    if foreign and any(differing):
        raise ValueError(
            f"optimizer: expected one with {differing[0]} and without {differing[1]}, "
            f"got {type(optimizer).__name__}"
        )
    own = {key: group[key] for key in lacking}
    return own | {key: value for key, value in found.items() if key not in foreign}


def _matters(key: str, value: Any) -> bool:
    """Returns whether an optimizer without this setting takes other steps."""
    return value is not None and value != _WITHOUT.get(key, 0)


def python_number(value: Any) -> Any:
    """Turns a number of numpy's, which loading does not take, into one of Python's."""
    return value.item() if type(value).__module__ == "numpy" and value.ndim == 0 else value
