"""Residual networks for 32 x 32 images, as in "Deep Residual Learning" (arXiv 1512.03385), 4.2.

Parameters have the names and shapes that mdistiller's checkpoints have, so that those load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "CifarResNet",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
]


class _Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm beside a shortcut.

    The shortcut is the input, or its 1 x 1 convolution where size or channels change.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Maps to maps."""
        shortcut = images if self.downsample is None else self.downsample(images)
        inner = torch.relu(self.bn1(self.conv1(images)))
        return torch.relu(self.bn2(self.conv2(inner)) + shortcut)


class CifarResNet(nn.Module):
    """Three stages of residual blocks after a convolution, averaged to a feature.

    Args:
        depth: layers with weights along the longest path, 6 n + 2 for n blocks per stage.
        widths: channels of the first convolution and of the stages.
        num_classes: width of the logits.

    Shape:
        images (N, 3, H, W), H and W at least 4 (32 in CIFAR), to logits (N, num_classes). The
        features that ``fc`` reads are (N, widths[-1]), and not negative.

    Raises:
        ValueError: a depth that is not 6 n + 2.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, got {depth}")
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for number, width in enumerate(widths[1:]):
            stage = []
            for position in range(blocks):
                stage.append(_Block(channels, width, 2 if number > 0 and position == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        maps = torch.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return self.fc(torch.flatten(self.pool(maps), 1))


def resnet20(num_classes: int = 100) -> CifarResNet:
    """3 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(20, (16, 16, 32, 64), num_classes)


def resnet32(num_classes: int = 100) -> CifarResNet:
    """5 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(32, (16, 16, 32, 64), num_classes)


def resnet44(num_classes: int = 100) -> CifarResNet:
    """7 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(44, (16, 16, 32, 64), num_classes)


def resnet56(num_classes: int = 100) -> CifarResNet:
    """9 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(56, (16, 16, 32, 64), num_classes)


def resnet110(num_classes: int = 100) -> CifarResNet:
    """18 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(110, (16, 16, 32, 64), num_classes)


def resnet8x4(num_classes: int = 100) -> CifarResNet:
    """1 block per stage of 64, 128 and 256 channels."""
    return CifarResNet(8, (32, 64, 128, 256), num_classes)


def resnet32x4(num_classes: int = 100) -> CifarResNet:
    """5 blocks per stage of 64, 128 and 256 channels."""
    return CifarResNet(32, (32, 64, 128, 256), num_classes)
