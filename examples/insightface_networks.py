# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Makes backbones by insightface's names: IResNet, the demo's network, and those of timm."""

import importlib.util

import torch
from torch import Tensor, nn

import model

# blocks in each of the four stages
DEPTHS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 14, 3),
    "r100": (3, 13, 30, 3),
    "r200": (6, 26, 60, 6),
}
WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """Is the residual unit of ArcFace (Deng et al., 2019): normalised before and after."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map with ``outputs`` channels, smaller by the stride."""
        body = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(body)) + self.downsample(x)


class IResNet(nn.Module):
    """Is insightface's network, with its names of parameters: (N, channels, size, size) -> (N, D).

    Args:
        depths: blocks in each stage.
        embedding_size: D.
        channels, size: of the images.
    """

    def __init__(self, depths: tuple[int, ...], embedding_size: int, channels: int, size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        inputs = WIDTHS[0]
        for number, (width, depth) in enumerate(zip(WIDTHS, depths, strict=True), start=1):
            blocks = [Block(inputs, width, 2), *(Block(width, width, 1) for _ in range(depth - 1))]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inputs, size = width, (size + 1) // 2
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * size * size, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        self.features.weight.requires_grad_(False)  # stays 1
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the embeddings; under autocast the last two layers compute in fp32 still."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for number in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        x = self.bn2(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))


def make(name: str, embedding_size: int, channels: int, size: int) -> nn.Module:
    """Makes a backbone for images (N, channels, size, size).

    Raises:
        ValueError: there is no such network, or the demo's does not fit.
    """
    if name in DEPTHS:
        return IResNet(DEPTHS[name], embedding_size, channels, size)
    if name == "demo":
        got, expected = (channels, size, embedding_size), (1, 32, model.EMBEDDING_SIZE)
        if got != expected:
            raise ValueError(
                "network: expected channels, image size and embedding_size to be "
                f"{expected} for demo, got {got}"
            )
        return model.backbone()
    if importlib.util.find_spec("timm") is not None:
        import timm

        if timm.is_model(name):
            return timm.create_model(name, num_classes=embedding_size, in_chans=channels)
    raise ValueError(
        f"network: expected {', '.join(DEPTHS)}, demo, or a name of timm where that is installed, "
        f"got {name!r}"
    )
