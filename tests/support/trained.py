# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains as insightface's trainer does, and saves what it saves."""

import copy
import functools
from pathlib import Path

import torch
from torch import nn

from marginkernels.compat.insightface import CombinedMarginLoss, PartialFC_V2
from marginkernels.convert.formats.insightface import split_evenly

C, D = 21, 6
SGD = functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)


class Trainer:
    """Trains a small network and PartialFC_V2 in one process, as insightface's trainer does."""

    def __init__(self, optimizer=SGD, seed=0):
        torch.manual_seed(seed)
        self.backbone = nn.Linear(4, D)
        loss = CombinedMarginLoss(64, 1.0, 0.0, 0.4)
        self.head = PartialFC_V2(loss, D, C, backend="reference")
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        self.optimizer = optimizer(groups, lr=0.1)

    def steps(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            x = torch.randn(16, 4, generator=generator)
            y = torch.randint(C, (16,), generator=generator)
            self.optimizer.zero_grad()
            self.head(self.backbone(x), y).backward()
            self.optimizer.step()
        return self

    def content(self, start=0, stop=C):
        """Returns what train_v2.py saves on the rank with these classes."""
        state = copy.deepcopy(self.optimizer.state_dict())
        last = state["state"].get(state["param_groups"][-1]["params"][-1], {})
        for key, value in last.items():
            if value.ndim:
                last[key] = value[start:stop].clone()
        return {
            "epoch": 3,
            "global_step": 40,
            "state_dict_backbone": self.backbone.state_dict(),
            "state_dict_softmax_fc": {"weight": self.head.weight.detach()[start:stop].clone()},
            "state_optimizer": state,
            "state_lr_scheduler": {"last_epoch": 40, "_last_lr": [0.1]},
        }

    def save(self, folder: Path, ranks: int, name="checkpoint_gpu_{}.pt"):
        folder.mkdir(exist_ok=True)
        start, files = 0, []
        for rank, size in enumerate(split_evenly(C, ranks)):
            files.append(folder / name.format(rank))
            torch.save(self.content(start, start + size), files[-1])
            start += size
        return files

    def load(self, content):
        self.backbone.load_state_dict(content["state_dict_backbone"])
        self.head.load_state_dict(content["state_dict_softmax_fc"])
        self.optimizer.load_state_dict(content["state_optimizer"])
        return self


def loaded(file):
    return torch.load(file, weights_only=True)


def weights(k=1, seed=1):
    return torch.randn(C * k, D, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Returns whether two trees have the same values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
