# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Moves backbone and head: optimizers, schedules, loss scale and clipping of insightface_train.py.

One optimizer of ``torch.optim`` has both, as in insightface. With ``fused_optimizer`` it has the
backbone alone, and one of ``marginkernels.optim`` moves the classes inside backward.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import marginkernels.optim
from insightface_config import Config
from marginkernels import GradScaler
from marginkernels.compat.insightface import PartialFC_V2, PolynomialLRWarmup

MAX_GRADIENT_NORM = 5  # of the backbone
GROWTH_INTERVAL = 100  # steps after which the loss scale doubles
RATES = ("base_lrs", "_last_lr")  # what a schedule has for each group
State = dict[str, Any]


class Steps:
    """Takes the steps.

    Args:
        batches: of an epoch.
    """

    def __init__(self, config: Config, backbone: nn.Module, head: PartialFC_V2, batches: int):
        self.backbone = backbone
        self.scaler = GradScaler(
            head.weight.device.type,
            growth_interval=GROWTH_INTERVAL,
            enabled=config.fp16,
            process_group=dist.group.WORLD if dist.is_initialized() else None,
        )
        settings: State = dict(lr=config.lr, weight_decay=config.weight_decay)
        if config.optimizer == "sgd":
            settings["momentum"] = config.momentum
        name = {"sgd": "SGD", "adamw": "AdamW"}[config.optimizer]
        # the head's group is the last
        groups = [{"params": list(module.parameters())} for module in (backbone, head)]
        self.of_head: marginkernels.optim.HeadOptimizer | None = None
        if config.fused_optimizer:
            groups.pop()
            scaler = self.scaler if config.fp16 else None
            self.of_head = getattr(marginkernels.optim, name)(head, scaler=scaler, **settings)
        self.optimizers: list[torch.optim.Optimizer] = [
            getattr(torch.optim, name)(groups, **settings)
        ]
        if self.of_head is not None:
            self.optimizers.append(self.of_head)
        warm_up = max(0, config.warmup_epoch) * batches
        self.schedules = [
            PolynomialLRWarmup(each, warm_up, batches * config.num_epoch)
            for each in self.optimizers
        ]

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Takes the gradients of a batch, and moves everything if it is the last of a step."""
        wait: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.of_head is not None and not is_last:
            wait = self.of_head.accumulate()
        with wait:
            self.scaler.scale(loss).backward()
        if is_last:
            self.scaler.unscale_(self.optimizers[0])
            nn.utils.clip_grad_norm_(self.backbone.parameters(), MAX_GRADIENT_NORM)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
                optimizer.zero_grad()
            self.scaler.update()
        for schedule in self.schedules:
            schedule.step()

    def learning_rate(self) -> float:
        """Returns the rate of the backbone."""
        return float(self.schedules[0].get_last_lr()[0])

    def state_dict(self) -> State:
        """Returns the states under insightface's keys, as those of one optimizer, and the scale."""
        optimizer, schedule = self.optimizers[0].state_dict(), self.schedules[0].state_dict()
        if self.of_head is not None:
            optimizer = joined(optimizer, self.of_head.state_dict())
            rates = self.schedules[1].state_dict()
            schedule |= {key: schedule[key] + rates[key] for key in RATES}
        return {
            "state_optimizer": optimizer,
            "state_lr_scheduler": schedule,
            "state_scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Takes the states of a checkpoint, insightface's too, and of either kind of optimizer."""
        states, schedule = [state["state_optimizer"]], state["state_lr_scheduler"]
        if self.of_head is not None:
            states = split(state["state_optimizer"])
        start = 0
        for optimizer, own, rates in zip(self.optimizers, states, self.schedules, strict=True):
            optimizer.load_state_dict(own)
            end = start + len(optimizer.param_groups)
            rates.load_state_dict(schedule | {key: schedule[key][start:end] for key in RATES})
            start = end
        if self.scaler.is_enabled() and state.get("state_scaler"):  # insightface has none
            self.scaler.load_state_dict(state["state_scaler"])


def joined(of_backbone: State, of_head: State) -> State:
    """Makes of two states that of one optimizer, whose last parameter is the head's."""
    groups, (group,) = of_backbone["param_groups"], of_head["param_groups"]
    (own,) = group["params"]
    number = sum(len(group["params"]) for group in groups)
    state = of_backbone["state"] | {number: of_head["state"][own]}
    return {"state": state, "param_groups": [*groups, group | {"params": [number]}]}


def split(state: State) -> list[State]:
    """Splits the state of one optimizer by its groups: the backbone's, then the head's."""
    return [
        {
            "state": {key: state["state"][key] for key in group["params"] if key in state["state"]},
            "param_groups": [group],
        }
        for group in state["param_groups"]
    ]
