# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Defines the backbone of the demo: a small residual CNN, 32 x 32 pixels to an embedding."""

from typing import Any

import torch
from torch import Tensor, nn

EMBEDDING_SIZE = 128


class Residual(nn.Module):
    """Puts two 3 x 3 convolutions around a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            *conv(channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        return (x + self.body(x)).relu()


def conv(inputs: int, outputs: int, size: int = 3) -> list[nn.Module]:
    """Lists a convolution, its normalisation and its activation."""
    return [
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def backbone() -> nn.Module:
    """Builds the network, (M, 1, 32, 32) -> (M, 128)."""
    network = nn.Sequential(
        # unshuffle and pool instead of strides, whose backward is slow on CPUs
        nn.PixelUnshuffle(2),
        *conv(4, 32),
        nn.MaxPool2d(2),
        *conv(32, 64),
        Residual(64),
        nn.MaxPool2d(2),
        *conv(64, 112),
        *conv(112, 112),
        *conv(112, 32, size=1),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, EMBEDDING_SIZE, bias=False),
        nn.BatchNorm1d(EMBEDDING_SIZE),
    )
    return channels_last(network)


def channels_last(network: nn.Module) -> nn.Module:
    """Lays out the weights in the order in which convolutions are fastest on CPUs."""
    to: Any = network.to  # torch's annotations lack memory_format
    return to(memory_format=torch.channels_last)


def run(model: nn.Module, inputs: Tensor) -> Tensor:
    """Returns embeddings (M, 128) in fp32, computed in bf16 where the processor can."""
    mkldnn = torch.backends.mkldnn.is_available()
    bf16 = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(inputs).float()
