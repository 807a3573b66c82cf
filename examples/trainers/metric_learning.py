# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains with the ArcFaceLoss of pytorch-metric-learning and its trainer, MetricLossOnly.

python examples/trainers/metric_learning.py
"""

import torch
from torch.utils.data import SequentialSampler

import compare


def train(ours: bool, run: compare.Run) -> None:
    """Trains with the package's loss, or with the fused one of the same name."""
    from pytorch_metric_learning.trainers import MetricLossOnly

    if ours:
        from marginkernels.compat.metric_learning import ArcFaceLoss
    else:
        from pytorch_metric_learning.losses import ArcFaceLoss  # type: ignore[no-redef]

    examples = run.examples()
    trunk, loss = run.backbone(), ArcFaceLoss(run.classes, compare.EMBEDDING_SIZE, scale=30)
    optimizers = {
        "trunk_optimizer": torch.optim.AdamW(trunk.parameters(), lr=1e-3),
        "metric_loss_optimizer": torch.optim.AdamW(loss.parameters(), lr=1e-2),
    }
    MetricLossOnly(
        {"trunk": trunk}, optimizers, run.batch_size, {"metric_loss": loss}, examples,
        sampler=SequentialSampler(examples), dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        end_of_iteration_hook=lambda trainer: run.log(trainer.losses["total_loss"]),
    ).train()  # fmt: skip


if __name__ == "__main__":
    compare.main(train)
