# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Keeps the statistics of norms where heads of AdaFace's authors have them."""

from typing import Any

from torch import Tensor, nn

from .. import margins

NAMES = ("batch_mean", "batch_std")


class KeepsStatistics(nn.Module):
    """Shows the moving averages of an :class:`AdaFace` inside as the authors' heads have them.

    They are ``batch_mean`` and ``batch_std`` of the head, (1,) each, in ``state_dict`` too. A head
    without an AdaFace inside has none.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.register_state_dict_post_hook(_named_as_theirs)
        self.register_load_state_dict_pre_hook(_named_as_ours)

    @property
    def batch_mean(self) -> Tensor:
        """Returns the moving average of the norms' means, (1,)."""
        return self._statistic("batch_mean")

    @property
    def batch_std(self) -> Tensor:
        """Returns the moving average of the norms' standard deviations, (1,)."""
        return self._statistic("batch_std")

    def _statistic(self, name: str) -> Tensor:
        for place in _places(self):
            number: Tensor = self.get_submodule(place).get_buffer(name)
            return number.reshape(1)
        raise AttributeError(name)


def _places(head: nn.Module) -> list[str]:
    """Returns the name of the AdaFace inside, if there is one."""
    return [name for name, m in head.named_modules() if isinstance(m, margins.AdaFace)]


def _named_as_theirs(head: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for place in _places(head):
        for name in NAMES:
            state[prefix + name] = state.pop(f"{prefix}{place}.{name}").reshape(1)


def _named_as_ours(head: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for place in _places(head):
        for name in NAMES:
            if prefix + name in state:
                state[f"{prefix}{place}.{name}"] = state.pop(prefix + name).reshape(())
