"""Wide residual networks (arXiv 1605.07146) for 32 x 32 images.

Parameters have the names and shapes that mdistiller's checkpoints have, so that those load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnkd_ext.train.models.base import CifarModel, init_convolutions, linear_or_identity

__all__ = ["MODELS", "WideResNet"]


class _Block(nn.Module):
    """BatchNorm, ReLU and a 3 x 3 convolution, twice, beside a shortcut.

    Where the channels change, the shortcut is a 1 x 1 convolution of the activated input.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = None  # the name is that of the checkpoints
        if channels != width:
            self.convShortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, maps: Tensor, both: bool = False) -> Any:
        """Maps to maps; with ``both`` also, first, what ``bn1`` made of the input."""
        normalised = self.bn1(maps)
        active = torch.relu(normalised)
        shortcut = maps if self.convShortcut is None else self.convShortcut(active)
        made = shortcut + self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return (normalised, made) if both else made


class _Stage(nn.Module):
    """Blocks in a row, the first of which may halve the size."""

    def __init__(self, blocks: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                _Block(channels if i == 0 else width, width, stride if i == 0 else 1)
                for i in range(blocks)
            )
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Maps to maps."""
        return self.layer(maps)


class WideResNet(CifarModel):
    """Three stages of pre-activation blocks after a convolution.

    Args:
        depth: layers with weights along the longest path, 6 n + 4 for n blocks per stage.
        widen: factor on the stages' 16, 32 and 64 channels.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Shape:
        images (N, in_chans, H, W), H and W at least 4 (32 in CIFAR), to logits (N, num_classes).
        The features that ``fc`` reads are (N, 64 widen), and not negative.

    A stage's map before the activation is its output through the BatchNorm that the next stage (or
    the head) begins with; the map after it is its raw output, which no activation has touched.

    Raises:
        ValueError: a depth that is not 6 n + 4.
    """

    def __init__(self, depth: int, widen: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6 n + 4 with n at least 1, got {depth}")
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(blocks, 16, widths[0], 1)
        self.block2 = _Stage(blocks, widths[0], widths[1], 2)
        self.block3 = _Stage(blocks, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = linear_or_identity(widths[2], num_classes)
        init_convolutions(self)
        names = [(f"block{i + 1}", width, 2**i) for i, width in enumerate(widths)]
        self._describe("fc", widths[2], num_classes, in_chans, names)
        if isinstance(self.fc, nn.Linear):
            self._init_classifier(self.fc)

    def _init_classifier(self, layer: nn.Linear) -> None:
        nn.init.zeros_(layer.bias)

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        maps = self.block1(self.conv1(images))
        for stage in (self.block2, self.block3):
            if stages is None:
                maps = stage(maps)
                continue
            # The normalisation is part of the next stage: it runs once, not again for the map.
            first, *others = stage.layer
            normalised, made = first(maps, both=True)
            stages.append((normalised, maps))
            maps = made
            for block in others:
                maps = block(maps)
        normalised = self.bn1(maps)
        if stages is not None:
            stages.append((normalised, maps))
        return torch.relu(normalised)


def wrn_16_2(num_classes: int = 100, in_chans: int = 3) -> WideResNet:
    """2 blocks per stage of 32, 64 and 128 channels."""
    return WideResNet(16, 2, num_classes, in_chans)


def wrn_40_1(num_classes: int = 100, in_chans: int = 3) -> WideResNet:
    """6 blocks per stage of 16, 32 and 64 channels."""
    return WideResNet(40, 1, num_classes, in_chans)


def wrn_40_2(num_classes: int = 100, in_chans: int = 3) -> WideResNet:
    """6 blocks per stage of 32, 64 and 128 channels."""
    return WideResNet(40, 2, num_classes, in_chans)


MODELS = (wrn_16_2, wrn_40_1, wrn_40_2)
