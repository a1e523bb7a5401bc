"""ShuffleNet V1 (arXiv 1707.01083) and V2 (arXiv 1807.11164) for 32 x 32 images.

Parameters have the names and shapes that mdistiller's checkpoints have, so that those load.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnkd_ext.train.models.base import CifarModel, linear_or_identity, through_stage

__all__ = ["MODELS", "ShuffleNetV1", "ShuffleNetV2"]

STEM = 24


def _shuffle(maps: Tensor, groups: int) -> Tensor:
    """Channel i of group g becomes channel g of block i."""
    return maps.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class _BlockV1(nn.Module):
    """Grouped 1 x 1, shuffled, 3 x 3 per channel, grouped 1 x 1; added or put beside the input.

    With stride 2 the input is averaged and put beside, so that the block itself makes only
    ``width - channels`` channels.
    """

    def __init__(self, channels: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        made = width - channels if stride == 2 else width
        inner = made // 4
        # The stem's 24 channels are too few to divide.
        self.groups = 1 if channels == STEM else groups
        self.conv1 = nn.Conv2d(channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, made, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.shortcut = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None

    def _both(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The output before and after its activation."""
        inner = _shuffle(torch.relu(self.bn1(self.conv1(maps))), self.groups)
        made = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(inner)))))
        beside = self.shortcut
        before = made + maps if beside is None else torch.cat([made, beside(maps)], 1)
        return before, torch.relu(before)

    def forward(self, maps: Tensor, both: bool = False) -> Any:
        """Maps to maps; with ``both`` those before and after the activation."""
        pair = self._both(maps)
        return pair if both else pair[1]


class _DownV2(nn.Module):
    """Two branches of stride 2, each giving half of the channels, shuffled."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(channels, channels, 3, 2, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps to maps of half the size."""
        left = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(maps)))))
        right = torch.relu(self.bn3(self.conv3(maps)))
        right = torch.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return _shuffle(torch.cat([left, right], 1), 2)


class _BlockV2(nn.Module):
    """Half of the channels pass through three convolutions, the others through nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def _halves(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        kept, half = maps.chunk(2, 1)
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(half)))))
        return kept, self.bn3(self.conv3(inner))

    def forward(self, maps: Tensor, both: bool = False) -> Any:
        """Maps to maps; with ``both`` those before and after the activation.

        Before it the channels are not yet shuffled, which is how published ReviewKD reads them.
        """
        kept, before = self._halves(maps)
        after = _shuffle(torch.cat([kept, torch.relu(before)], 1), 2)
        return (torch.cat([kept, before], 1), after) if both else after


class ShuffleNetV1(CifarModel):
    """A 1 x 1 stem and three stages, each halving the size.

    Args:
        widths: channels of the stages.
        blocks: of the stages.
        groups: of the 1 x 1 convolutions.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Shape:
        images (N, in_chans, H, W), H and W at least 8 (32 in CIFAR), to logits (N, num_classes).
        The features that ``linear`` reads are (N, widths[-1]), and not negative.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        blocks: tuple[int, int, int],
        groups: int,
        num_classes: int,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        channels, stages = STEM, []
        for width, count in zip(widths, blocks, strict=True):
            stage = [_BlockV1(channels, width, 2, groups)]
            stage += [_BlockV1(width, width, 1, groups) for _ in range(count - 1)]
            stages.append(nn.Sequential(*stage))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = linear_or_identity(channels, num_classes)
        names = [(f"layer{i + 1}", width, 2 ** (i + 1)) for i, width in enumerate(widths)]
        self._describe("linear", channels, num_classes, in_chans, names)

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        maps = torch.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3):
            maps = through_stage(stage, maps, stages)
        return maps


class ShuffleNetV2(CifarModel):
    """A 1 x 1 stem, three stages, each halving the size, and a last 1 x 1 convolution.

    Args:
        widths: channels of the stages and of the features.
        blocks: of the stages, besides the one that halves.
        num_classes: width of the logits; 0 for a network without a classifier.
        in_chans: channels of the images.

    Shape:
        images (N, in_chans, H, W), H and W at least 8 (32 in CIFAR), to logits (N, num_classes).
        The features that ``linear`` reads are (N, widths[-1]), and not negative.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int],
        blocks: tuple[int, int, int],
        num_classes: int,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        channels, stages = STEM, []
        for width, count in zip(widths, blocks, strict=False):
            stage = [_DownV2(channels, width), *(_BlockV2(width) for _ in range(count))]
            stages.append(nn.Sequential(*stage))
            channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = nn.Conv2d(channels, widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.linear = linear_or_identity(widths[3], num_classes)
        names = [(f"layer{i + 1}", width, 2 ** (i + 1)) for i, width in enumerate(widths[:3])]
        self._describe("linear", widths[3], num_classes, in_chans, names)

    def _body(self, images: Tensor, stages: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        maps = torch.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3):
            maps = through_stage(stage, maps, stages)
        return torch.relu(self.bn2(self.conv2(maps)))


def shufflenetv1(num_classes: int = 100, in_chans: int = 3) -> ShuffleNetV1:
    """4, 8 and 4 blocks of 240, 480 and 960 channels, in 3 groups."""
    return ShuffleNetV1((240, 480, 960), (4, 8, 4), 3, num_classes, in_chans)


def shufflenetv2(num_classes: int = 100, in_chans: int = 3) -> ShuffleNetV2:
    """4, 8 and 4 blocks of 116, 232 and 464 channels, 1024 features."""
    return ShuffleNetV2((116, 232, 464, 1024), (3, 7, 3), num_classes, in_chans)


MODELS = (shufflenetv1, shufflenetv2)
