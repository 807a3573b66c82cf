# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Trains a small Wav2Vec2ForXVector with transformers' Trainer; each image is a signal of its rows.

python examples/trainers/transformers_xvector.py
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import compare

SAMPLES = 32 * 32


class Signals(Dataset[dict[str, Tensor]]):
    """Gives the examples of a run as the Trainer takes them."""

    def __init__(self, run: compare.Run):
        self._examples = run.examples()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self._examples[index]
        return {"input_values": image.reshape(SAMPLES), "labels": label}


def make(num_labels: int) -> torch.nn.Module:
    """Builds the model from its configuration, so that nothing comes from a hub."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForXVector

    size = compare.EMBEDDING_SIZE
    return Wav2Vec2ForXVector(
        Wav2Vec2Config(
            num_labels=num_labels, xvector_output_dim=size, hidden_size=64, num_hidden_layers=1,
            num_attention_heads=4, intermediate_size=128, conv_dim=(32, 64), conv_kernel=(32, 2),
            conv_stride=(32, 1), num_feat_extract_layers=2, feat_extract_norm="layer",
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, tdnn_dim=(128, size),
            tdnn_kernel=(5, 1), tdnn_dilation=(1, 1), initializer_range=0.1, mask_time_prob=0.0,
        )
    )  # fmt: skip


def train(ours: bool, run: compare.Run) -> None:
    """Trains with the model's objective, or with the fused one in its place."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Log(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                run.log(logs["loss"])

    signals, model = Signals(run), make(run.classes)
    if ours:
        from marginkernels.compat.transformers import replace_objective

        model = replace_objective(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=run.steps, per_device_train_batch_size=run.batch_size,
            learning_rate=2e-3, warmup_steps=20, logging_steps=1, save_strategy="no", report_to=[],
            disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=signals, callbacks=[Log()]).train()


if __name__ == "__main__":
    compare.main(train)
