"""Residual networks for 32 x 32 images, as in "Deep Residual Learning" (arXiv 1512.03385).

Parameters have the names and shapes that mdistiller's checkpoints have, so that those load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnkd_ext.train.models.base import (
    CifarModel,
    init_convolutions,
    linear_or_identity,
    through_stage,
)

__all__ = ["MODELS", "CifarBottleneckResNet", "CifarResNet"]


def _projection(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))


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
            self.downsample = _projection(channels, width, stride)

    def _both(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The output before and after its activation."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = torch.relu(self.bn1(self.conv1(maps)))
        before = self.bn2(self.conv2(inner)) + shortcut
        return before, torch.relu(before)

    def forward(self, maps: Tensor, both: bool = False) -> Any:
        """Maps to maps; with ``both`` those before and after the activation."""
        pair = self._both(maps)
        return pair if both else pair[1]


class _Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of 1 x 1, the second four times as wide, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != wide:
            self.shortcut = _projection(channels, wide, stride)

    def _both(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The output before and after its activation."""
        inner = torch.relu(self.bn1(self.conv1(maps)))
        inner = torch.relu(self.bn2(self.conv2(inner)))
        before = self.bn3(self.conv3(inner)) + self.shortcut(maps)
        return before, torch.relu(before)

    def forward(self, maps: Tensor, both: bool = False) -> Any:
        """Maps to maps; with ``both`` those before and after the activation."""
        pair = self._both(maps)
        return pair if both else pair[1]


class CifarResNet(CifarModel):
    """Three stages of residual blocks after a convolution, averaged to a feature.

    Args:
        depth: layers with weights along the longest path, 6 n + 2 for n blocks per stage.
        widths: channels of the first convolution and of the stages.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Shape:
        images (N, in_chans, H, W), H and W at least 4 (32 in CIFAR), to logits (N, num_classes).
        The features that ``fc`` reads are (N, widths[-1]), and not negative.

    Raises:
        ValueError: a depth that is not 6 n + 2.
    """

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int],
        num_classes: int,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, got {depth}")
        channels = widths[0]
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        stages = []
        for number, width in enumerate(widths[1:]):
            stage = []
            for position in range(blocks):
                stage.append(_Block(channels, width, 2 if number > 0 and position == 0 else 1))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = linear_or_identity(channels, num_classes)
        init_convolutions(self)
        names = [(f"layer{i + 1}", width, 2**i) for i, width in enumerate(widths[1:])]
        self._describe("fc", channels, num_classes, in_chans, names)

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        maps = torch.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3):
            maps = through_stage(stage, maps, stages)
        return maps


class CifarBottleneckResNet(CifarModel):
    """ImageNet's residual network of bottlenecks with a 3 x 3 stem of stride 1 and no pooling.

    Args:
        blocks: of every one of the four stages.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Shape:
        images (N, in_chans, H, W), H and W at least 8 (32 in CIFAR), to logits (N, num_classes).
        The features that ``linear`` reads are (N, 2048), and not negative.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], num_classes: int, in_chans: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels, stages = 64, []
        for number, count in enumerate(blocks):
            width, stage = 64 * 2**number, []
            for position in range(count):
                stride = 2 if number > 0 and position == 0 else 1
                stage.append(_Bottleneck(channels, width, stride))
                channels = 4 * width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = linear_or_identity(channels, num_classes)
        init_convolutions(self)
        names = [(f"layer{i + 1}", 256 * 2**i, 2**i) for i in range(4)]
        self._describe("linear", channels, num_classes, in_chans, names)

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        maps = torch.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = through_stage(stage, maps, stages)
        return maps


def resnet20(num_classes: int = 100, in_chans: int = 3) -> CifarResNet:
    """3 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(20, (16, 16, 32, 64), num_classes, in_chans)


def resnet32(num_classes: int = 100, in_chans: int = 3) -> CifarResNet:
    """5 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(32, (16, 16, 32, 64), num_classes, in_chans)


def resnet44(num_classes: int = 100, in_chans: int = 3) -> CifarResNet:
    """7 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(44, (16, 16, 32, 64), num_classes, in_chans)


def resnet56(num_classes: int = 100, in_chans: int = 3) -> CifarResNet:
    """9 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(56, (16, 16, 32, 64), num_classes, in_chans)


def resnet110(num_classes: int = 100, in_chans: int = 3) -> CifarResNet:
    """18 blocks per stage of 16, 32 and 64 channels."""
    return CifarResNet(110, (16, 16, 32, 64), num_classes, in_chans)


def resnet8x4(num_classes: int = 100, in_chans: int = 3) -> CifarResNet:
    """1 block per stage of 64, 128 and 256 channels."""
    return CifarResNet(8, (32, 64, 128, 256), num_classes, in_chans)


def resnet32x4(num_classes: int = 100, in_chans: int = 3) -> CifarResNet:
    """5 blocks per stage of 64, 128 and 256 channels."""
    return CifarResNet(32, (32, 64, 128, 256), num_classes, in_chans)


def resnet50(num_classes: int = 100, in_chans: int = 3) -> CifarBottleneckResNet:
    """3, 4, 6 and 3 bottlenecks of 256, 512, 1024 and 2048 channels."""
    return CifarBottleneckResNet((3, 4, 6, 3), num_classes, in_chans)


MODELS = (
    *(resnet20, resnet32, resnet44, resnet56, resnet110),
    *(resnet8x4, resnet32x4, resnet50),
)
